"""Negative log-likelihood of words along their paths through a binary tree, and its gradients.

A step is one inner node on the way of one token. Rows of nodes are never copied out to one a step:
the scalar products of a step's node and token, and the sums of scaled rows over the steps of a
token or of a node, are those that `embedding_bag` and its derivative are made of. On a CPU only
real steps are made; elsewhere each token makes as many as the tree is deep, those past the root
masked, so that no shape depends on the data, and a matrix in low precision is copied to float32 as
a whole.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_softmax.kernels.dense import accumulation_dtype
from lm_softmax.kernels.workspace import reads_are_cheap

Sparse = tuple[Tensor, Tensor | None, Tensor | None]  # node ids, rows, biases
CHUNK_BYTES = 2**24  # of rows that are copied out at once where the derivative is missing
# The derivative of embedding_bag by the weights of its samples. It checks no bounds.
_bag_derivative = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)


class Tree(NamedTuple):
    """A binary tree over V words with V - 1 inner nodes, the root being inner node 0."""

    up: Tensor  # (2V - 1,): 2 * parent + side of each word and inner node; -1 for the root
    depth: Tensor  # (V,): of each word
    max_depth: int


class _Steps(NamedTuple):
    """Of all tokens, one after the other."""

    node: Tensor  # (S,)
    token: Tensor  # (S,)
    sign: Tensor  # (S,): 1 to the left, -1 to the right, 0 for no step
    start: Tensor  # (N,): first step of each token


def row_products(rows: Tensor, weight: Tensor, row: Tensor, node: Tensor) -> Tensor:
    """`(rows[row] * weight[node]).sum(1)` in at least float32; `row` must not fall."""
    rows, weight, node = _operands(rows, weight, node, may_read=True)
    start = torch.searchsorted(row, torch.arange(rows.shape[0], device=row.device))
    return _products(rows, weight, row, node, start)


def _operands(
    rows: Tensor, weight: Tensor, node: Tensor, may_read: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Both matrices in at least float32, and the rows of the second that the nodes have there."""
    dtype = accumulation_dtype(torch.promote_types(rows.dtype, weight.dtype))
    if weight.dtype != dtype and may_read:  # only the rows that are used
        used, node = torch.unique(node, return_inverse=True)
        weight = weight[used]
    return rows.to(dtype).contiguous(), weight.to(dtype).contiguous(), node


def _products(rows: Tensor, weight: Tensor, row: Tensor, node: Tensor, start: Tensor) -> Tensor:
    """`(rows[row] * weight[node]).sum(1)`, in one pass where there is an operation for it.

    Args:
        rows: `(N, width)`.
        weight: `(M, width)` of the same dtype.
        row: `(S,)`, not falling.
        node: `(S,)`, which must be in range: nothing checks it.
        start: `(N,)`, the first place of each row in `row`.
    """
    if not row.numel():
        return rows.new_empty(row.shape)
    if _bag_derivative is not None and rows.device.type in ("cpu", "cuda"):
        products: Tensor = _bag_derivative(rows, weight, node, start, row, 0)
        return products
    size = max(1, CHUNK_BYTES // (rows.shape[1] * rows.element_size()))
    chunks = zip(torch.split(row, size), torch.split(node, size), strict=True)
    return torch.cat([(rows[some] * weight[nodes]).sum(1) for some, nodes in chunks])


def _steps(target: Tensor, kept: Tensor, tree: Tree) -> _Steps:
    """The way from each word up to the root."""
    up, depth, _ = tree
    vocab_size = depth.shape[0]
    word = torch.where(kept, target, 0)
    if not reads_are_cheap(target):
        return _padded_steps(word, kept, tree)
    length = torch.where(kept, depth[word], 0)
    start = length.cumsum(0) - length
    length, order = length.sort(descending=True)
    longer = length.flip(0)  # how many tokens are on the way at each level
    levels = torch.arange(int(longer[-1]) if longer.numel() else 0, device=target.device)
    walking = (target.shape[0] - torch.searchsorted(longer, levels, right=True)).tolist()
    place, at = start[order], word[order]
    code = place.new_empty(int(length.sum()))
    for count in walking:
        place, at = place[:count], at[:count]
        found = up[at].long()
        code[place] = found
        place, at = place + 1, (found >> 1) + vocab_size
    token = torch.repeat_interleave(
        torch.arange(target.shape[0], device=target.device), depth[word].where(kept, 0)
    )
    return _Steps(code >> 1, token, 1 - 2 * (code & 1), start)


def _padded_steps(word: Tensor, kept: Tensor, tree: Tree) -> _Steps:
    up, depth, max_depth = tree
    codes, at = [word.new_empty(0, word.shape[0])], word
    for _ in range(max_depth):
        found = torch.where(at >= 0, up[at.clamp(min=0)].long(), -1)
        codes.append(found.unsqueeze(0))
        at = torch.where(found >= 0, (found >> 1) + depth.shape[0], -1)
    code = torch.cat(codes).t()
    sign = torch.where((code >= 0) & kept.unsqueeze(1), 1 - 2 * (code & 1), 0)
    token = torch.arange(word.shape[0], device=word.device)
    return _Steps(
        (code >> 1).clamp(min=0).flatten(),
        token.repeat_interleave(max_depth),
        sign.flatten(),
        token * max_depth,
    )


class Pass(NamedTuple):
    """What the losses and the gradients of a batch are made of."""

    steps: _Steps
    margin: Tensor  # (S,): logit of the side that is taken
    hidden: Tensor  # (N, width), 0 where ignored
    weight: Tensor  # rows of at least float32
    row: Tensor  # (S,): row of `weight` of each step


def follow(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tree: Tree,
    ignore_index: int,
) -> Pass:
    """Takes every step of every token."""
    kept = target != ignore_index
    steps = _steps(target, kept, tree)
    hidden = hidden.masked_fill(~kept.unsqueeze(1), 0)
    hidden, weight, row = _operands(hidden, weight, steps.node, reads_are_cheap(target))
    logit = _products(hidden, weight, steps.token, row, steps.start)
    if bias is not None:
        logit = logit + bias[steps.node].to(logit.dtype)
    return Pass(steps, logit * steps.sign, hidden, weight, row)


def bags(rows: Tensor, index: Tensor, start: Tensor, scale: Tensor) -> Tensor:
    """Sum of scaled rows of each bag."""
    if not index.numel():
        return rows.new_zeros(start.shape[0], rows.shape[1])
    return F.embedding_bag(index, rows, start, mode="sum", per_sample_weights=scale)


def losses_of(made: Pass) -> Tensor:
    """Loss of each token, `(N,)`."""
    losses = -F.logsigmoid(made.margin).masked_fill(made.steps.sign == 0, 0)
    total = losses.new_zeros(made.hidden.shape[0])
    return total.index_add_(0, made.steps.token, losses)


def slopes(made: Pass, scale: Tensor) -> Tensor:
    """Derivative of `sum(scale * loss)` by the logit of each step."""
    sign = made.steps.sign
    return -sign * torch.sigmoid(-made.margin) * scale.to(made.margin.dtype)[made.steps.token]


def by_node(made: Pass, slope: Tensor, needs_weight: bool, needs_bias: bool) -> Sparse:
    """Gradients of the nodes that are passed, by rising id."""
    node, order = made.steps.node.sort(stable=True)
    used, counts = torch.unique_consecutive(node, return_counts=True)
    slope = slope[order]
    start = counts.cumsum(0) - counts
    rows = biases = None
    if needs_weight:
        rows = bags(made.hidden, made.steps.token[order], start, slope)
    if needs_bias:
        which = torch.repeat_interleave(torch.arange(used.numel(), device=used.device), counts)
        biases = slope.new_zeros(used.shape).index_add_(0, which, slope)
    return used, rows, biases


def all_nodes(
    made: Pass, slope: Tensor, num_nodes: int, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of all nodes."""
    if reads_are_cheap(slope):
        used, rows, biases = by_node(made, slope, needs_weight, needs_bias)
        return tuple(  # type: ignore[return-value]
            None if x is None else x.new_zeros(num_nodes, *x.shape[1:]).index_copy_(0, used, x)
            for x in (rows, biases)
        )
    rows = biases = None
    if needs_bias:
        biases = slope.new_zeros(num_nodes).index_add_(0, made.steps.node, slope)
    if needs_weight:
        rows = slope.new_zeros(num_nodes, made.hidden.shape[1])
        num = made.hidden.shape[0]
        shape = num, slope.shape[0] // max(num, 1)  # level by level: no row is copied to each step
        levels = zip(slope.view(shape).t(), made.steps.node.view(shape).t(), strict=True)
        for of_level, node in levels:
            rows.index_add_(0, node, of_level.unsqueeze(1) * made.hidden)
    return rows, biases


def gradient_of_hidden(
    scale: Tensor,
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tree: Tree,
    ignore_index: int,
    needed: bool,
) -> tuple[Pass, Tensor, Tensor | None]:
    """The steps taken, the derivatives by their logits, and the gradient of hidden."""
    made = follow(hidden, target, weight, bias, tree, ignore_index)
    slope = slopes(made, scale)
    of_hidden = bags(made.weight, made.row, made.steps.start, slope) if needed else None
    return made, slope, of_hidden


def passed_nodes(made: Pass, slope: Tensor, needs_weight: bool, needs_bias: bool) -> Sparse:
    """Gradients of the nodes of all steps; summed by node where that costs no synchronisation."""
    if reads_are_cheap(slope):
        return by_node(made, slope, needs_weight, needs_bias)
    rows = slope.unsqueeze(1) * made.hidden[made.steps.token] if needs_weight else None
    return made.steps.node, rows, slope if needs_bias else None
