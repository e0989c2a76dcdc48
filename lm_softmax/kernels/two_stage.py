"""Draws in two stages: of a cluster or an expert, then of a word in it."""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_softmax.kernels.clusters import Clusters
from lm_softmax.kernels.dense import Matrix, autocast_off, dense_logits, product_dtype
from lm_softmax.kernels.draws import (
    COLDEST,
    MAX_ROWS,
    Draws,
    Words,
    draw,
    draw_words,
    log_power_sum,
    matrix_words,
    softmax_weights,
    sum_dtype,
    uniform,
)
from lm_softmax.kernels.mixture import Mixture
from lm_softmax.kernels.tail_draws import draw_by_rejection

FEW_DRAWS = 2**8  # are sorted by the host sooner
TABLE_BYTES = 2**26  # of a float64 softmax over the short-list and the clusters


class _Rows(NamedTuple):
    """A clustered softmax of some rows."""

    inputs: Tensor  # (N, width), in the dtype of the products
    clusters: Clusters
    softcap: float | None

    def projected(self, i: int, rows: Tensor) -> Tensor:
        """What the words of a cluster are multiplied with, of some of the rows."""
        projection = self.clusters.tails[i].projection
        inputs = self.inputs[rows] if self.inputs.shape[0] > 1 else self.inputs
        return inputs if projection is None else F.linear(inputs, projection.to(inputs.dtype))

    def tail(self, i: int, projected: Tensor) -> Words:
        """The softmax over the words of a cluster, of rows that are projected."""
        _, weight, bias = self.clusters.tails[i]
        return matrix_words(projected, Matrix([weight], bias), self.softcap)


def draw_from_clusters(
    hidden: Tensor,
    clusters: Clusters,
    softcap: float | None,
    draws: Draws,
) -> Tensor:
    """Ids `(N, num_samples)`, drawn in proportion to `p(w) ** (1 / temperature)`.

    First a word of the short-list or a cluster is drawn, then a word of that cluster, and only
    rows that drew it open it. The weight of a cluster is `p(cluster) ** (1 / temperature)` times
    the sum of `p(w | cluster) ** (1 / temperature)`: unknown until it is opened, but at most 1
    below temperature 1, and `n ** (1 - 1 / temperature)` above, for n words. Clusters are proposed
    by these bounds. One that is proposed is opened, accepted with the share of its weight in the
    bound, and from then on proposed by its weight; what is rejected is proposed again. A proposal
    is accepted in proportion to the true weights whatever the bounds are, so that accepted ones
    have the distribution wanted; each rejection opens a cluster, so there are no more of them than
    clusters. Tempering cluster and word each for itself would be another distribution.

    Args:
        hidden: `(N, width)`.
        clusters: The parameters.
        softcap: Logits become `softcap * tanh(logits / softcap)`.
        draws: What to draw; not `top_p`.

    Raises:
        ValueError: If a row has no distribution but nan.
    """
    inputs = hidden.to(product_dtype(hidden, clusters.weight))
    num_entries = clusters.weight.shape[0] + len(clusters.tails)
    size = max(1, min(MAX_ROWS, TABLE_BYTES // (8 * num_entries))) if clusters.tails else MAX_ROWS
    parts = [inputs] if inputs.shape[0] <= size else torch.split(inputs, size)
    drawn = []
    with autocast_off(hidden):
        for part in parts:
            rows = _Rows(part, clusters, softcap)
            found = _draw(rows, draws.rows(part), draws.temperature, draws.generator)
            drawn.append(draws.view(found))
    return torch.cat(drawn) if drawn[1:] else drawn[0]


def _draw(
    rows: _Rows, row: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """One id for each entry of `row`."""
    clusters = rows.clusters
    if not clusters.tails:
        words = matrix_words(rows.inputs, clusters.head_matrix(), rows.softcap)
        return draw_words(words, row, temperature, generator)
    first = clusters.weight.shape[0]
    entry = _draw_entries(rows, row, temperature, generator)
    opens = [i - first for i in _distinct(entry) if i >= first]
    if not opens:
        return entry
    starts = list(accumulate(clusters.sizes))
    if row.shape[0] == 1:
        found = _draw_from_tail(rows, opens[0], row, temperature, generator)
        return found.add_(starts[opens[0]])
    drawn = entry.clone()
    for i in opens:
        mine = (entry == first + i).nonzero().squeeze(1)
        found = _draw_from_tail(rows, i, row[mine], temperature, generator)
        drawn[mine] = found.add_(starts[i])
    return drawn


def _draw_from_tail(
    rows: _Rows, i: int, row: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """A word of a cluster, told from its first, for each entry of `row`."""
    if row.shape[0] == 1:
        opened, local = row, row if rows.inputs.shape[0] == 1 else torch.zeros_like(row)
    else:
        opened, local = torch.unique(row, return_inverse=True)
    projected = rows.projected(i, opened)
    words, drawn = rows.tail(i, projected), None
    if temperature == 1 and rows.softcap is None:
        _, weight, bias = rows.clusters.tails[i]
        drawn = draw_by_rejection(projected, local, weight, bias, generator)
    if drawn is None:
        return draw_words(words, local, temperature, generator)
    missed = (drawn < 0).nonzero().squeeze(1)
    if missed.numel():
        drawn[missed] = draw_words(words, local[missed], temperature, generator)
    return drawn


def _distinct(values: Tensor) -> list[int]:
    """`torch.unique(values).tolist()`."""
    if values.shape[0] <= FEW_DRAWS:
        return sorted(set(values.tolist()))
    return torch.unique(values).tolist()


def _draw_entries(
    rows: _Rows, row: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """A word of the short-list, or behind them a cluster, for each entry of `row`."""
    table = dense_logits(rows.inputs, rows.clusters.head_matrix(), rows.softcap)
    if temperature == 1:
        return draw(softmax_weights(table, out=table), row, generator)
    power, first = 1 / max(temperature, COLDEST), rows.clusters.weight.shape[0]
    sizes = [len(tail.weight) for tail in rows.clusters.tails]
    bounds = [max(0.0, 1 - power) * math.log(size) for size in sizes]
    table = torch.log_softmax(table.to(sum_dtype(table)), 1).mul_(power)
    table[:, first:] += table.new_tensor(bounds)
    is_open = torch.zeros(table.shape[0], len(sizes), dtype=torch.bool, device=table.device)
    entry = torch.empty_like(row)
    waiting = torch.arange(row.shape[0], device=row.device)
    while waiting.numel():
        some, local = torch.unique(row[waiting], return_inverse=True)
        proposed = draw(softmax_weights(table[some]), local, generator)
        entry[waiting] = proposed
        rejected = []
        for i in torch.unique(proposed[proposed >= first] - first).tolist():
            mine = waiting[proposed == first + i]
            opened = torch.unique(row[mine])
            opened = opened[~is_open[opened, i]]
            if not opened.numel():
                continue
            words = rows.tail(i, rows.projected(i, opened))
            above = log_power_sum(words, temperature) - bounds[i]
            table[opened, first + i] += above
            is_open[opened, i] = True
            share = table.new_ones(table.shape[0])
            share[opened] = above.exp()
            rejected.append(mine[uniform(mine, generator) >= share[row[mine]]])
        waiting = torch.cat(rejected) if rejected else waiting[:0]
    return entry


def draw_from_mixture(
    inputs: Tensor, mixture: Mixture, softcap: float | None, draws: Draws
) -> Tensor:
    """Ids `(N, num_samples)` at temperature 1: an expert is drawn, then a word of its softmax.

    Args:
        inputs: `(N, K, width)`, of each expert, in the dtype of the products.
        mixture: Prior and output rows.
        softcap: Logits of each expert become `softcap * tanh(logits / softcap)`.
        draws: What to draw; neither `temperature` nor `top_p`.
    """
    row = draws.rows(inputs)
    expert = draw(softmax_weights(mixture.log_prior), row, draws.generator)
    drawn = torch.empty_like(row)
    matrix = Matrix([mixture.weight], mixture.bias)
    with autocast_off(inputs):
        for k in torch.unique(expert).tolist():
            mine = (expert == k).nonzero().squeeze(1)
            rows, local = torch.unique(row[mine], return_inverse=True)
            words = matrix_words(inputs[rows, k], matrix, softcap)
            drawn[mine] = draw_words(words, local, 1.0, draws.generator)
    return draws.view(drawn)
