"""The most probable words of an adaptive softmax, opening few of its clusters.

The short-list comes first. The log-probability of a cluster bounds those of its words, so only rows
whose k-th best is below it go on; those share one product. Of a large cluster they first look at
the few words that bounds by norm leave (`tail_bounds`), and most stop there.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_softmax.kernels.clusters import Clusters, Tail
from lm_softmax.kernels.dense import (
    Matrix,
    accumulation_dtype,
    autocast_off,
    dense_logits,
    product_dtype,
)
from lm_softmax.kernels.dense_search import dense_topk
from lm_softmax.kernels.ranking import BLOCK, by_value_and_id, merge_topk, wide_topk
from lm_softmax.kernels.tail_bounds import TailBounds, tail_bounds

OPEN_BYTES = 2**24  # of logits of a cluster that are held at once, of one row at least
WORTH = 3 * 2**14  # words that rows would open together, from which on they look at bounds first
FEW = 4  # rows share most of a product: more of them do not count


class _Rows(NamedTuple):
    """Rows at one cluster."""

    inputs: Tensor  # (n, width), then (n, tail width)
    mass: Tensor  # (n,): log-probability of the cluster
    least: Tensor  # (n,): k-th best log-probability so far
    place: Tensor | None  # (n,): which rows of all; None is each of them

    @property
    def num(self) -> int:
        """How many."""
        return self.mass.shape[0]

    def at(self, which: Tensor) -> "_Rows":
        """Those at some places."""
        inputs, mass, least = (tensor.index_select(0, which) for tensor in self[:3])
        return _Rows(inputs, mass, least, which if self.place is None else self.place[which])

    def without(self, dropped: Tensor) -> "_Rows | None":
        """Those that a mask leaves; None is none."""
        if self.num == 1:  # text in the making, where every call counts
            return None if dropped.item() else self
        which = (~dropped).nonzero().squeeze(1)
        if which.shape[0] == self.num:
            return self
        return self.at(which) if which.shape[0] else None

    def among_all(self) -> Tensor | slice:
        """The index of these among all."""
        return slice(None) if self.place is None else self.place

    def split(self, size: int) -> "Iterator[_Rows]":
        """A few at a time."""
        if self.num <= size:
            return iter([self])
        places = torch.arange(self.num, device=self.mass.device)
        return (self.at(which) for which in torch.split(places, size))


def cluster_topk(
    hidden: Tensor,
    clusters: Clusters,
    k: int,
    softcap: float | None,
    opened: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` words of highest log-probability of each row, equal ones by lower id.

    nan in the weights of a cluster is seen by rows that open it.

    Args:
        hidden: `(N, width)`.
        clusters: The parameters; without tails one softmax over all words.
        k: Number of words, at most that of the short-list.
        softcap: Of the logits of every softmax. Bounds by norm are then left out.
        opened: `(N, K)` bool; becomes true where the normaliser of a cluster was computed.

    Returns:
        Log-probabilities and ids, `(N, k)`.
    """
    with autocast_off(hidden):
        rows = hidden.to(product_dtype(hidden, clusters.weight))
        matrix = clusters.head_matrix()
        if not clusters.tails:
            return dense_topk(rows, matrix, k, softcap)
        size = _rows_held(matrix, rows.dtype)
        if rows.shape[0] <= size:
            return _topk(rows, clusters, k, softcap, opened)
        parts = [slice(i, i + size) for i in range(0, rows.shape[0], size)]
        marks = [None if opened is None else opened[part] for part in parts]
        found = [
            _topk(rows[part], clusters, k, softcap, mark)
            for part, mark in zip(parts, marks, strict=True)
        ]
        values, ids = zip(*found, strict=True)
        return torch.cat(values), torch.cat(ids)


def _rows_held(matrix: Matrix | Tail, dtype: torch.dtype) -> int:
    """How many rows have all their logits held at once."""
    num_words = matrix.num_rows if isinstance(matrix, Matrix) else matrix.weight.shape[0]
    return max(1, OPEN_BYTES // (num_words * accumulation_dtype(dtype).itemsize))


def _topk(
    rows: Tensor, clusters: Clusters, k: int, softcap: float | None, opened: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same of a few rows, in the dtype of the products."""
    start = clusters.weight.shape[0]
    log_probs = torch.log_softmax(dense_logits(rows, clusters.head_matrix(), softcap), 1)
    values, ids = wide_topk(log_probs[:, :start], k)
    masses = log_probs[:, start:]
    excluded = (masses <= values[:, -1:]).all(0).tolist()  # of all rows; nan is not
    fresh = rows.shape[0] == 1  # no row is excluded at a cluster that is not
    for index, tail in enumerate(clusters.tails):
        chosen = None
        if not excluded[index]:
            at_tail = _Rows(rows, masses[:, index], values[:, -1], None)
            chosen = _choose(at_tail, tail, softcap, known=fresh)
        for part in () if chosen is None else chosen.split(_rows_held(tail, rows.dtype)):
            if opened is not None:
                opened[part.among_all(), index] = True
            found = _open(part, tail, k, softcap)
            if found is not None:
                at, best, words = found
                merged = merge_topk(values[at], ids[at], best, words + start, k)
                (values[at], ids[at]), fresh = merged, False
        start += tail.weight.shape[0]
    return by_value_and_id(values, ids)


def _choose(rows: _Rows, tail: Tail, softcap: float | None, *, known: bool) -> _Rows | None:
    """The rows that open a cluster, projected; `known` if none has a k-th best above its mass."""
    left = rows if known else rows.without(rows.mass <= rows.least)  # nan stays
    if left is None:
        return None
    if tail.projection is not None:
        projection = tail.projection.to(left.inputs.dtype)
        left = left._replace(inputs=F.linear(left.inputs, projection))
    if softcap is not None or tail.weight.shape[0] * min(left.num, FEW) < WORTH:
        return left
    bounds = tail_bounds(tail.weight, tail.bias, left.inputs)
    return left if bounds is None else _not_excluded(left, tail, bounds)


def _not_excluded(rows: _Rows, tail: Tail, bounds: TailBounds) -> _Rows | None:
    """Rows whose k-th best some word of the cluster may be above; see `TailBounds`."""
    norm = rows.inputs.norm(dim=1, dtype=rows.mass.dtype)
    limit = bounds.limit(rows.mass, rows.least, norm, rows.inputs.dtype)
    length = bounds.lengths(norm)
    unreached = bounds.peak[length] <= limit  # nan is not
    left = rows.without(unreached)
    if left is None:
        return None
    if left.num < rows.num:
        limit, length = limit[~unreached], length[~unreached]
    above = ~(bounds.table[length] <= limit.unsqueeze(1))
    needed = (above * torch.arange(1, above.shape[1] + 1, device=length.device)).amax(1)
    look = (needed * BLOCK <= bounds.ids.shape[0]).nonzero().squeeze(1)
    if not look.shape[0]:
        return left
    ids = bounds.ids[: int(needed[look].amax()) * BLOCK]
    bias = None if tail.bias is None else tail.bias.index_select(0, ids)
    inputs = left.inputs[look]
    logits = dense_logits(inputs, Matrix([tail.weight.index_select(0, ids)], bias), None)
    centred = logits.amax(1) - inputs.to(limit.dtype) @ bounds.centre
    dropped = torch.zeros_like(needed, dtype=torch.bool)
    dropped[look] = centred <= limit[look]
    return left.without(dropped)


def _open(
    rows: _Rows, tail: Tail, k: int, softcap: float | None
) -> tuple[Tensor | slice, Tensor, Tensor] | None:
    """Log-probabilities and places of the best words of a cluster, of rows that they matter to.

    First comes the index of these rows.
    """
    logits = dense_logits(rows.inputs, Matrix([tail.weight], tail.bias), softcap)
    shares = torch.log_softmax(logits, 1, out=logits)
    worse = rows.mass + shares.amax(1) <= rows.least
    better = rows.without(worse)
    if better is None:
        return None
    if better.num < rows.num:
        shares = shares[~worse]
    best, words = wide_topk(shares, min(k, shares.shape[1]))
    return better.among_all(), better.mass.unsqueeze(1) + best, words
