"""The most probable words of an adaptive softmax, opening few of its clusters.

The short-list comes first. The log-probability of a cluster bounds those of its words, so only rows
whose k-th best is below it go on; those share one product. Of a large cluster they first look at
the few words that bounds by norm leave (`tail_bounds`), and most stop there.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels.clusters import Clusters, Tail
from lm_softmax.kernels.dense import (
    Matrix,
    accumulation_dtype,
    autocast_off,
    product_dtype,
)
from lm_softmax.kernels.dense_search import Normaliser, dense_logits, dense_topk
from lm_softmax.kernels.ranking import BLOCK, by_value_and_id, merge_topk, wide_topk
from lm_softmax.kernels.tail_bounds import TailBounds, tail_bounds
from lm_softmax.kernels.workspace import workspace

OPEN_BYTES = 2**24  # of logits of a cluster that are held at once, of one row at least
WORTH = 2**14  # words of a cluster that is not opened without a look at its bounds


class ClusterTopK(NamedTuple):
    """The most probable words of each row, and what it took to find them."""

    log_probs: Tensor  # (N, k)
    indices: Tensor  # (N, k)
    opened: Tensor  # (N, K), bool: clusters whose normaliser was computed


class _Rows(NamedTuple):
    """Rows at one cluster."""

    inputs: Tensor  # (n, width), then (n, tail width)
    mass: Tensor  # (n,): log-probability of the cluster
    least: Tensor  # (n,): k-th best log-probability so far
    place: Tensor  # (n,): which rows of all

    def at(self, which: Tensor) -> "_Rows":
        """Those at some places."""
        return _Rows(*(tensor.index_select(0, which) for tensor in self))

    def where(self, kept: Tensor) -> "_Rows":
        """Those that a mask keeps."""
        which = kept.nonzero().squeeze(1)
        return self if len(which) == len(kept) else self.at(which)

    def split(self, size: int) -> "Iterator[_Rows]":
        """A few at a time."""
        if len(self.place) <= size:
            return iter([self])
        parts = zip(*(torch.split(tensor, size) for tensor in self), strict=True)
        return (_Rows(*part) for part in parts)


def cluster_topk(hidden: Tensor, clusters: Clusters, k: int, softcap: float | None) -> ClusterTopK:
    """The `k` words of highest log-probability of each row, equal ones by lower id.

    nan in the weights of a cluster is seen by rows that open it.

    Args:
        hidden: `(N, width)`.
        clusters: The parameters; without tails one softmax over all words.
        k: Number of words, at most that of the short-list.
        softcap: Of the logits of every softmax. Bounds by norm are then left out.
    """
    with autocast_off(hidden):
        rows = hidden.to(product_dtype(hidden, clusters.weight))
        matrix = clusters.head_matrix()
        if not clusters.tails:
            log_probs, ids = dense_topk(rows, matrix, k, softcap)
            return ClusterTopK(log_probs, ids, ids.new_empty(len(rows), 0, dtype=torch.bool))
        parts = torch.split(rows, _rows_held(matrix.num_rows, rows.dtype))
        found = [_topk(part, clusters, matrix, k, softcap) for part in parts]
        return ClusterTopK(*map(torch.cat, zip(*found, strict=True))) if found[1:] else found[0]


def _rows_held(num_words: int, dtype: torch.dtype) -> int:
    """How many rows have all their logits held at once."""
    return max(1, OPEN_BYTES // (num_words * accumulation_dtype(dtype).itemsize))


def _topk(
    rows: Tensor, clusters: Clusters, matrix: Matrix, k: int, softcap: float | None
) -> ClusterTopK:
    """The same of a few rows, in the dtype of the products."""
    start = clusters.weight.shape[0]
    logits = dense_logits(rows, matrix, softcap)
    log_probs = torch.log_softmax(logits, 1)
    values, ids = wide_topk(log_probs[:, :start], k)
    masses = log_probs[:, start:]
    opened = torch.zeros(masses.shape, dtype=torch.bool, device=rows.device)
    everyone = torch.arange(len(rows), device=rows.device)
    for index, tail in enumerate(clusters.tails):
        at_tail = _Rows(rows, masses[:, index], values[:, -1], everyone)
        chosen = _choose(at_tail, tail, softcap)
        if chosen.place.shape[0]:
            opened[chosen.place, index] = True
            for part in chosen.split(_rows_held(tail.weight.shape[0], rows.dtype)):
                place, best, words = _open(part, tail, k, softcap)
                if place.shape[0]:
                    merged = merge_topk(values[place], ids[place], best, words + start, k)
                    values[place], ids[place] = merged
        start += tail.weight.shape[0]
    return ClusterTopK(*by_value_and_id(values, ids), opened)


def _choose(rows: _Rows, tail: Tail, softcap: float | None) -> _Rows:
    """The rows that open a cluster, projected."""
    rows = rows.where(~(rows.mass <= rows.least))  # nan opens
    if not rows.place.shape[0]:
        return rows
    if tail.projection is not None:
        rows = rows._replace(inputs=rows.inputs @ tail.projection.to(rows.inputs.dtype).t())
    if softcap is not None or tail.weight.shape[0] < WORTH:
        return rows
    bounds = tail_bounds(tail.weight, tail.bias, rows.inputs)
    return rows if bounds is None else _not_excluded(rows, tail, bounds)


def _not_excluded(rows: _Rows, tail: Tail, bounds: TailBounds) -> _Rows:
    """Rows whose k-th best some word of the cluster may be above; see `TailBounds`."""
    norm = rows.inputs.norm(dim=1, dtype=rows.mass.dtype)
    limit = bounds.limit(rows.mass, rows.least, norm, rows.inputs.dtype)
    length = bounds.lengths(norm)
    reaches = (~(bounds.peak[length] <= limit)).nonzero().squeeze(1)  # nan reaches
    if reaches.shape[0] < limit.shape[0]:
        rows, limit, length = rows.at(reaches), limit[reaches], length[reaches]
    if not limit.shape[0]:
        return rows
    above = ~(bounds.table[length] <= limit.unsqueeze(1))
    needed = (above * torch.arange(1, above.shape[1] + 1, device=length.device)).amax(1)
    look = (needed * BLOCK <= bounds.ids.shape[0]).nonzero().squeeze(1)
    if not look.shape[0]:
        return rows
    ids = bounds.ids[: int(needed[look].amax()) * BLOCK]
    bias = None if tail.bias is None else tail.bias.index_select(0, ids)
    inputs = rows.inputs[look]
    logits = dense_logits(inputs, Matrix([tail.weight.index_select(0, ids)], bias), None)
    centred = logits.amax(1) - inputs.to(limit.dtype) @ bounds.centre
    kept = torch.ones_like(needed, dtype=torch.bool)
    kept[look] = ~(centred <= limit[look])
    return rows.where(kept)


def _open(rows: _Rows, tail: Tail, k: int, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and places of the best words of a cluster, of rows that they matter to.

    First come the places of these rows.
    """
    logits = dense_logits(rows.inputs, Matrix([tail.weight], tail.bias), softcap)
    shares = torch.softmax(logits, 1, out=workspace("shares", logits.shape, logits, logits.dtype))
    log_sum = -shares.amax(1).log()
    better = (~(rows.mass - log_sum <= rows.least)).nonzero().squeeze(1)
    place, mass = rows.place, rows.mass
    if better.shape[0] < place.shape[0]:
        logits, log_sum, place, mass = (x[better] for x in (logits, log_sum, place, mass))
    best, words = wide_topk(logits, min(k, logits.shape[1]))
    log_probs = Normaliser(best[:, 0], log_sum).subtracted_from(best)
    return place, mass.unsqueeze(1) + log_probs, words
