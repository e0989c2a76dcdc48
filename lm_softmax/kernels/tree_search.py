"""The most probable words of a binary tree by branch and bound.

The log-probability of a node bounds those of all words below it. A beam of the k best nodes on each
level leads to k words; the k-th best of them is a bound that the k best words reach. Then the nodes
that reach it are opened level by level, as one flat list of (row, node) pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_softmax.kernels.dense import accumulation_dtype
from lm_softmax.kernels.paths import row_products

MOST = 16.0  # a row that would open more than this part of all nodes is ranked as a whole sooner


class _Opener(NamedTuple):
    """What it takes to open nodes, and what came of it; the last two are written in place."""

    rows: Tensor  # (N, width)
    weight: Tensor  # (V - 1, width)
    bias: Tensor | None
    children: Tensor  # (V - 1, 2)
    limit: int  # of nodes that a row may open
    opened: Tensor  # (N,): nodes so far
    failed: Tensor  # (N,): rows that are given up

    def admit(self, count: Tensor) -> Tensor:
        """Which rows may open so many more nodes, `(N,)`; the others are given up."""
        self.failed.logical_or_(self.opened + count > self.limit)
        self.opened.add_(count.masked_fill(self.failed, 0))
        return ~self.failed

    def __call__(self, row: Tensor, node: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Children and their log-probabilities, `(M, 2)` each; `row` must not fall."""
        logit = row_products(self.rows, self.weight, row, node)
        if self.bias is not None:
            logit = logit + self.bias[node].to(logit.dtype)
        self.failed[row[logit.isnan()]] = True  # no order that a search could follow
        sides = torch.stack([F.logsigmoid(logit), F.logsigmoid(-logit)], 1)
        return self.children[node], value.unsqueeze(1) + sides


def tree_topk(
    rows: Tensor, weight: Tensor, bias: Tensor | None, children: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `k` words of highest log-probability of each row, equal ones by lower id.

    Args:
        rows: `(N, width)`.
        weight: `(V - 1, width)`, one row an inner node, the root first.
        bias: `(V - 1,)`, or None.
        children: `(V - 1, 2)`: an entry below V is a word, V + i inner node i.
        k: Number of words.

    Returns:
        Log-probabilities `(N, k)` and ids `(N, k)`; which rows `(N,)` were given up, since they
        would open too many nodes or met nan; how many nodes each row opened `(N,)`.
    """
    num, num_nodes = rows.shape[0], weight.shape[0]
    limit = max(int(num_nodes / MOST), 1)
    dtype = accumulation_dtype(torch.promote_types(rows.dtype, weight.dtype))
    opened = torch.zeros(num, dtype=torch.int64, device=rows.device)
    values = rows.new_zeros(num, k, dtype=dtype)
    indices = torch.zeros(num, k, dtype=torch.int64, device=rows.device)
    if num == 0 or num_nodes == 0 or k > limit:
        return values, indices, torch.ones_like(opened, dtype=torch.bool), opened
    failed = torch.zeros_like(opened, dtype=torch.bool)
    opener = _Opener(rows.to(dtype), weight, bias, children, limit, opened, failed)
    row, word, value = _reaching(opener, _beam(opener, k))
    failed |= row.bincount(minlength=num) < k
    kept = ~failed[row]
    best = best_of_rows(row[kept], word[kept], value[kept], num, k, ~failed)
    values[~failed], indices[~failed] = best
    return values, indices, failed, opened


def best_of_rows(
    row: Tensor, word: Tensor, value: Tensor, num_rows: int, k: int, which: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `k` best of a flat list of values for each row, equal ones by lower id: `(N, k)` each.

    Args:
        row: `(M,)`, of each value.
        word: `(M,)`, its id.
        value: `(M,)`.
        num_rows: Number of rows.
        k: Number of words.
        which: `(num_rows,)`, rows that are wanted, of at least `k` values each; None is all.
    """
    order = word.argsort()
    order = order[value[order].argsort(descending=True, stable=True)]
    order = order[row[order].argsort(stable=True)]
    count = row.bincount(minlength=num_rows)
    first = count.cumsum(0) - count
    if which is not None:
        first = first[which]
    best = order[first.unsqueeze(1) + torch.arange(k, device=row.device)]
    return value[best], word[best]


def _beam(opener: _Opener, k: int) -> Tensor:
    """A log-probability that at least k words of each row reach, `(N,)`."""
    num, num_words = opener.rows.shape[0], opener.weight.shape[0] + 1
    entry = opener.children.new_full((num, 1), num_words)
    value = opener.rows.new_zeros(num, 1)
    while True:
        inner = (entry >= num_words) & (value > -torch.inf)
        inner &= opener.admit(inner.sum(1)).unsqueeze(1)
        row, column = inner.nonzero().unbind(1)
        if not row.numel():
            break
        below, values = opener(row, entry[row, column] - num_words, value[row, column])
        pairs = entry.new_zeros(*entry.shape, 2)
        of_pairs = value.new_full((*entry.shape, 2), -torch.inf)
        pairs[..., 0] = entry  # words stay
        of_pairs[..., 0] = value.masked_fill(inner, -torch.inf)
        pairs[row, column], of_pairs[row, column] = below, values
        value, best = of_pairs.flatten(1).topk(min(k, 2 * entry.shape[1]), 1)
        entry = pairs.flatten(1).gather(1, best)
    return value[:, -1] if value.shape[1] == k else value.new_full((num,), -torch.inf)


def _reaching(opener: _Opener, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, word and log-probability of all words that reach the bound of their row.

    A row that is given up is left where it is.
    """
    num_rows, num_words = opener.rows.shape[0], opener.weight.shape[0] + 1
    row = torch.arange(num_rows, device=bound.device)
    node, value = torch.zeros_like(row), torch.zeros_like(bound)
    found = []
    while row.numel():
        kept = opener.admit(row.bincount(minlength=num_rows))[row]
        row, node, value = row[kept], node[kept], value[kept]
        below, values = opener(row, node, value)
        row = row.unsqueeze(1).expand(-1, 2)
        reach = values >= bound[row]
        row, below, values = row[reach], below[reach], values[reach]
        is_word = below < num_words
        found.append((row[is_word], below[is_word], values[is_word]))
        row, node, value = row[~is_word], below[~is_word] - num_words, values[~is_word]
    rows, words, of_words = zip(*found, strict=True)
    return torch.cat(rows), torch.cat(words), torch.cat(of_words)
