"""Draws from a binary tree of decisions by walking down from the root."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_softmax.kernels.draws import COLDEST, Draws, check_total, sum_dtype, uniform
from lm_softmax.kernels.paths import row_products

ROUNDS = 16  # of walks until the words of a row are made one by one


class TreeNodes(NamedTuple):
    """A binary tree over V words with V - 1 inner nodes, the root being inner node 0."""

    weight: Tensor  # (V - 1, width)
    bias: Tensor | None  # (V - 1,)
    children: Tensor  # (V - 1, 2): an entry below V is a word, V + i inner node i
    num_leaves: Tensor  # (V - 1,): words below each inner node


def walk(
    rows: Tensor,
    nodes: TreeNodes,
    row: Tensor,
    power: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """One proposal a draw: a word, or -1 where it is rejected, and the word's log-probability.

    A word is reached with probability `p(w)` if `power` is 1, and below it with probability
    `p(w) ** power / V ** (1 - power)`: the words below a node, n of them, hold at most
    `p(node) ** power * n ** (1 - power)` of the powers (Hoelder), so the bounds of two children add
    up to no more than that of their parent; each child is entered with the share of its bound in
    that, and what is left over is rejected.

    Args:
        rows: `(N, width)`.
        nodes: The tree.
        row: `(D,)` int64, not falling: the row of each draw.
        power: In `(0, 1]`.
        generator: Of the device of `rows`.

    Raises:
        ValueError: If a row meets nan.
    """
    num_words = nodes.children.shape[0] + 1
    word = torch.full_like(row, -1)
    log_prob = torch.zeros(row.shape, dtype=sum_dtype(rows), device=rows.device)
    going, node = torch.arange(row.shape[0], device=rows.device), torch.zeros_like(row)
    while going.numel():
        logit = row_products(rows, nodes.weight, row[going], node)
        if nodes.bias is not None:
            logit = logit + nodes.bias[node].to(logit.dtype)
        logit = logit.to(log_prob.dtype)
        sides = torch.stack([F.logsigmoid(logit), F.logsigmoid(-logit)], 1)
        below, shares = nodes.children[node], sides
        if power != 1:
            inner = (below - num_words).clamp(min=0)
            leaves = nodes.num_leaves[inner].where(below >= num_words, 1)
            part = leaves.to(sides.dtype) / nodes.num_leaves[node].unsqueeze(1)
            shares = power * sides + (1 - power) * part.log()
        left, right = shares.exp().unbind(1)
        check_total(left + right)
        position = uniform(node, generator)
        side = (position >= left).long()
        log_prob[going] += sides.gather(1, side.unsqueeze(1)).squeeze(1)
        node = below.gather(1, side.unsqueeze(1)).squeeze(1)
        kept = (position < left + right) if power != 1 else torch.ones_like(going, dtype=torch.bool)
        arrived = kept & (node < num_words)
        word[going[arrived]] = node[arrived]
        kept &= node >= num_words
        going, node = going[kept], node[kept] - num_words
    return word, log_prob


def draw_from_tree(rows: Tensor, nodes: TreeNodes, draws: Draws, best: Tensor | None) -> Tensor:
    """Ids `(N, num_samples)` in proportion to `p ** (1 / temperature)`, -1 where given up.

    At temperature 1 one walk a draw. Else walks are rejected, and after `ROUNDS` of them a draw is
    given up. Below 1 a word that was reached is accepted with probability
    `(p(w) / p(best)) ** (1 / temperature - 1)`, which at least `p(best)` of the walks are; above 1
    the share that arrives is `sum(p ** (1 / temperature)) / V ** (1 - 1 / temperature)`.

    Args:
        rows: `(N, width)`.
        nodes: The tree.
        draws: What to draw; not `top_p`.
        best: `(N,)`, the highest log-probability of each row, below temperature 1.

    Raises:
        ValueError: If a row meets nan.
    """
    power = 1 / max(draws.temperature, COLDEST)
    row = draws.rows(rows)
    drawn = torch.full_like(row, -1)
    waiting = torch.arange(row.shape[0], device=rows.device)
    for _ in range(ROUNDS):
        word, log_prob = walk(rows, nodes, row[waiting], min(power, 1.0), draws.generator)
        accepted = word >= 0
        if best is not None and power > 1:
            share = ((log_prob - best[row[waiting]]) * (power - 1)).exp()
            accepted &= uniform(word, draws.generator) < share
        drawn[waiting[accepted]] = word[accepted]
        waiting = waiting[~accepted]
        if not waiting.numel():
            break
    return draws.view(drawn)
