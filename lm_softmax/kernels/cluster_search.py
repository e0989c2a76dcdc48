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
from lm_softmax.kernels.dense import accumulation_dtype, autocast_off, product_dtype, workspace
from lm_softmax.kernels.dense_search import Normaliser, dense_best, dense_logits
from lm_softmax.kernels.ranking import BLOCK, merge_topk, wide_topk
from lm_softmax.kernels.tail_bounds import TailBounds, tail_bounds

OPEN_BYTES = 2**24  # of logits of a cluster that are held at once, of one row at least
WORTH = 2**14  # words of a cluster that is not opened without a look at its bounds
ROUNDING = 1e-6  # of log-probabilities that bounds are compared with, as a part of them


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

    def where(self, kept: Tensor) -> "_Rows":
        """Those that a mask keeps."""
        which = kept.nonzero().squeeze(1)
        if len(which) == len(kept):
            return self
        return _Rows(*(tensor[which] for tensor in self))


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
        values, ids, masses = _short_list(rows, clusters, k, softcap)
        opened = torch.zeros(masses.shape, dtype=torch.bool, device=rows.device)
        everyone = torch.arange(len(rows), device=rows.device)
        start = clusters.weight.shape[0]
        for index, tail in enumerate(clusters.tails):
            at_tail = _Rows(rows, masses[:, index], values[:, -1], everyone)
            chosen = _choose(at_tail, tail, softcap)
            opened[chosen.place, index] = True
            for part in _parts(chosen, tail):
                place, best, words = _open(part, tail, k, softcap)
                if len(place):
                    found = merge_topk(values[place], ids[place], best, words + start, k)
                    values[place], ids[place] = found
            start += tail.weight.shape[0]
    return ClusterTopK(values, ids, opened)


def _short_list(
    rows: Tensor, clusters: Clusters, k: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of the short-list, and the log-probability of each cluster."""
    weight, cluster_weight, bias, tails = clusters
    num_words = weight.shape[0]
    of_words = None if bias is None else bias[:num_words]
    logits, ids, lse = dense_best(rows, weight, of_words, softcap, k)
    masses = logits[:, :0]
    if tails:
        assert cluster_weight is not None
        of_clusters = None if bias is None else bias[num_words:]
        masses = dense_logits(rows, cluster_weight, of_clusters, softcap, "logits")
        top = masses.amax(1)
        lse = lse + Normaliser(top, masses.logsumexp(1) - top)
        masses = lse.subtracted_from(masses)
    return lse.subtracted_from(logits), ids, masses


def _choose(rows: _Rows, tail: Tail, softcap: float | None) -> _Rows:
    """The rows that open a cluster, projected."""
    rows = rows.where(~(rows.mass <= rows.least))  # nan opens
    if not len(rows.place):
        return rows
    if tail.projection is not None:
        rows = rows._replace(inputs=rows.inputs @ tail.projection.to(rows.inputs.dtype).t())
    if softcap is not None or tail.weight.shape[0] < WORTH:
        return rows
    bounds = tail_bounds(tail.weight, tail.bias, rows.inputs)
    return rows if bounds is None else rows.where(_not_excluded(rows, tail, bounds))


def _not_excluded(rows: _Rows, tail: Tail, bounds: TailBounds) -> Tensor:
    """Rows whose k-th best some word of the cluster may be above, `(n,)`; see `TailBounds`."""
    exact = rows.inputs.to(rows.mass.dtype)
    norm = exact.norm(dim=1)
    least = rows.least - rows.mass
    least = least - bounds.rounding(norm, rows.inputs.dtype) - ROUNDING * rows.least.abs()
    needed = bounds.blocks_needed(norm, least)
    result = needed > 0
    look = (result & (needed * BLOCK <= len(bounds.ids))).nonzero().squeeze(1)
    if len(look):
        ids = bounds.ids[: int(needed[look].max()) * BLOCK]
        bias = None if tail.bias is None else tail.bias[ids]
        logits = dense_logits(rows.inputs[look], tail.weight[ids], bias, None, "logits")
        floor = bounds.log_sum + exact[look] @ bounds.centre
        result[look] = ~(logits.amax(1) - floor <= least[look])
    return result


def _parts(rows: _Rows, tail: Tail) -> Iterator[_Rows]:
    """A few rows at a time, lest all their logits be held at once."""
    row_bytes = tail.weight.shape[0] * accumulation_dtype(rows.inputs.dtype).itemsize
    size = max(1, OPEN_BYTES // row_bytes)
    if len(rows.place) <= size:
        return iter([rows] if len(rows.place) else [])
    parts = zip(*(torch.split(tensor, size) for tensor in rows), strict=True)
    return (_Rows(*part) for part in parts)


def _open(
    rows: _Rows, tail: Tail, k: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and places of the best words of a cluster, of rows that they matter to.

    First come the places of these rows.
    """
    logits = dense_logits(rows.inputs, tail.weight, tail.bias, softcap, "logits")
    shares = torch.softmax(logits, 1, out=workspace("shares", logits.shape, logits, logits.dtype))
    log_sum = -shares.amax(1).log()
    better = (~(rows.mass - log_sum <= rows.least)).nonzero().squeeze(1)
    if len(better) < len(log_sum):
        logits, log_sum, mass = logits[better], log_sum[better], rows.mass[better]
    else:
        mass = rows.mass
    best, words = wide_topk(logits, min(k, logits.shape[1]))
    log_probs = Normaliser(best[:, 0], log_sum).subtracted_from(best)
    return rows.place[better], mass.unsqueeze(1) + log_probs, words
