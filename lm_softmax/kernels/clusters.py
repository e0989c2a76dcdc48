"""The loss of a full or an adaptive softmax, cluster by cluster.

Tokens are sorted by cluster once. The short-list and the cluster words form one softmax over all
tokens, each tail one over its own (Grave et al. 2017, section 4). Both rest on `dense_pass`.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels.dense import (
    Gradients,
    Matrix,
    Objective,
    accumulation_dtype,
)
from lm_softmax.kernels.dense_pass import dense_pass
from lm_softmax.kernels.workspace import reads_are_cheap


class Tail(NamedTuple):
    """Words `[start, start + n)`: logits are `weight @ (projection @ hidden) + bias`."""

    projection: Tensor | None  # (tail width, width); None is the identity, in all tails
    weight: Tensor  # (n, tail width)
    bias: Tensor | None  # (n,)


class Clusters(NamedTuple):
    """Parameters of a clustered softmax; without tails it is a full softmax."""

    weight: Tensor  # (c0, width): the short-list
    cluster_weight: Tensor | None  # (K, width): one row a tail; None without tails
    bias: Tensor | None  # (c0 + K,)
    tails: Sequence[Tail] = ()

    def flatten(self) -> list[Tensor]:
        """All tensors in a fixed order, as a registered operation wants them."""
        projected = [tail.projection is not None for tail in self.tails]
        assert all(projected) or not any(projected), "projections are in all tails or in none"
        head = [self.weight, self.cluster_weight, self.bias]
        return [tensor for tensor in (*head, *sum(self.tails, ())) if tensor is not None]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], has_bias: bool) -> "Clusters":
        """The inverse of `flatten`."""
        rest = list(tensors)
        weight = rest.pop(0)
        cluster_weight = rest.pop(0) if len(tensors) > 2 else None
        bias = rest.pop(0) if has_bias else None
        size = len(rest) // cluster_weight.shape[0] if cluster_weight is not None else 1
        projected = size == 2 + has_bias
        tails: list[Tail] = []
        for start in range(0, len(rest), size):
            projection = rest[start] if projected else None
            of_words = rest[start + projected : start + size]
            tails.append(Tail(projection, of_words[0], of_words[1] if has_bias else None))
        return cls(weight, cluster_weight, bias, tails)

    @property
    def sizes(self) -> list[int]:
        """Number of words of the short-list and of each tail."""
        return [self.weight.shape[0], *(tail.weight.shape[0] for tail in self.tails)]

    def head_matrix(self) -> Matrix:
        """The softmax over the short-list and the cluster words."""
        if self.cluster_weight is None:
            return Matrix([self.weight], self.bias)
        return Matrix([self.weight, self.cluster_weight], self.bias)


class Order(NamedTuple):
    """Tokens sorted by cluster."""

    tokens: Tensor  # their positions, (kept,)
    hidden: Tensor  # (kept, width)
    target: Tensor  # (kept,), in the softmax over the short-list and the cluster words
    slices: list[slice]  # of each tail, among the kept
    tail_targets: list[Tensor]  # of each tail, relative to its first word


def sort_by_cluster(hidden: Tensor, target: Tensor, sizes: Sequence[int], ignored: Tensor) -> Order:
    """Order of the tokens that count, by one sort and one host synchronisation."""
    *starts, _ = accumulate(sizes)
    cluster = torch.zeros_like(target)
    for start in starts:  # a tensor of them would be a copy to the device that the host waits for
        cluster += target >= start
    cluster, tokens = cluster.masked_fill(ignored, len(sizes)).sort(stable=True)
    borders = torch.arange(1, len(sizes) + 1, device=target.device)
    ends = torch.searchsorted(cluster, borders).tolist()
    tokens, cluster = tokens[: ends[-1]], cluster[: ends[-1]]
    wanted = target.index_select(0, tokens)
    slices = [slice(start, end) for start, end in pairwise(ends)]
    relative = [wanted[part] - start for part, start in zip(slices, starts, strict=True)]
    wanted = torch.where(cluster == 0, wanted, sizes[0] - 1 + cluster)
    return Order(tokens, hidden.index_select(0, tokens), wanted, slices, relative)


def clustered_losses(
    hidden: Tensor,
    target: Tensor,
    scale: Tensor | None,
    clusters: Clusters,
    dtype: torch.dtype,
    ignore_index: int,
    objective: Objective,
    buffers: Sequence[Tensor | None] = (),
) -> Tensor:
    """Loss of each token; `buffers` (hidden, then `Clusters.flatten`) get the gradients."""
    ignored = target == ignore_index
    if clusters.tails or reads_are_cheap(target):
        order = sort_by_cluster(hidden, target, clusters.sizes, ignored)
        scale = None if scale is None else scale[order.tokens]
        losses = _sorted_losses(order, scale, clusters, dtype, objective, buffers)
        return losses.new_zeros(target.shape).index_copy_(0, order.tokens, losses)
    # a full softmax on an accelerator needs no look at the targets: rows to ignore weigh nothing
    hidden = hidden.masked_fill(ignored.unsqueeze(1), 0)
    one = hidden.new_ones((), dtype=accumulation_dtype(dtype)) if scale is None else scale
    slots = iter(buffers)
    gradients = _gradients(slots, next(slots), clusters.head_matrix()) if buffers else None
    losses = dense_pass(
        hidden,
        clusters.head_matrix(),
        target.masked_fill(ignored, 0),
        objective,
        dtype,
        scale=torch.where(ignored, 0, one),
        gradients=gradients,
    )
    return losses.masked_fill(ignored, 0)


def _gradients(slots: Iterator[Tensor | None], hidden: Tensor | None, matrix: Matrix) -> Gradients:
    """The next buffers, those of one softmax."""
    blocks = [next(slots) for _ in matrix.blocks]
    return Gradients(hidden, blocks, None if matrix.bias is None else next(slots))


def _sorted_losses(
    order: Order,
    scale: Tensor | None,
    clusters: Clusters,
    dtype: torch.dtype,
    objective: Objective,
    buffers: Sequence[Tensor | None],
) -> Tensor:
    """Loss of the sorted tokens: one softmax for all, then one a tail."""
    slots = iter(buffers)
    of_hidden = next(slots, None)
    sorted_hidden = None if of_hidden is None else of_hidden.new_empty(order.hidden.shape)
    matrix = clusters.head_matrix()
    losses = dense_pass(
        order.hidden,
        matrix,
        order.target,
        objective,
        dtype,
        scale=scale,
        gradients=_gradients(slots, sorted_hidden, matrix) if buffers else None,
    )
    for tail, part, target in zip(clusters.tails, order.slices, order.tail_targets, strict=True):
        inputs = order.hidden[part]
        narrow = projected(inputs, tail.projection, dtype)
        matrix = Matrix([tail.weight], tail.bias)
        of_projection = None if tail.projection is None else next(slots, None)
        of_projected, gradients = None, None
        if of_projection is not None or sorted_hidden is not None:
            of_projected = losses.new_empty(narrow.shape)
        if buffers:
            gradients = _gradients(slots, of_projected, matrix)
        losses[part] += dense_pass(
            narrow,
            matrix,
            target,
            objective,
            dtype,
            scale=None if scale is None else scale[part],
            gradients=gradients,
        )
        if of_projected is not None and of_projection is not None:
            torch.mm(of_projected.t(), inputs.to(losses.dtype), out=of_projection)
        if of_projected is not None and sorted_hidden is not None:
            if tail.projection is None:
                sorted_hidden[part] += of_projected
            else:
                sorted_hidden[part].addmm_(of_projected, tail.projection.to(losses.dtype))
    if of_hidden is not None and sorted_hidden is not None:
        if len(order.tokens) < len(of_hidden):
            of_hidden.zero_()
        of_hidden.index_copy_(0, order.tokens, sorted_hidden)
    return losses


def projected(inputs: Tensor, projection: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the words of a tail are multiplied with."""
    if projection is None:
        return inputs.to(dtype)
    return inputs.to(dtype) @ projection.to(dtype).t()
