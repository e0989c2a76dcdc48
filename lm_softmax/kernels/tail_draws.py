"""Words of a large cluster, drawn without its normaliser.

The logit of word w is `b_w + w.z`. With `c` the mean row and `r >= |z|`,

    b_w + w.z <= c.z + b_w + r |w - c|                          (Cauchy and Schwarz's inequality)

so words proposed in proportion to `exp(b_w + r |w - c|)`, whose running sums are kept, and accepted
with probability `exp((w - c).z - r |w - c|)`, have the distribution of the cluster (von Neumann
1951, "Various techniques used in connection with random digits"). At least

    exp(logsumexp(b) - logsumexp(b + r |w - c|))                (Jensen's inequality)

of them are accepted. Where that is little, as of long rows, nothing is proposed. All of it depends
on weights and rows alone, so that equal generators draw equal words.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels.dense import accumulation_dtype
from lm_softmax.kernels.draws import uniform
from lm_softmax.kernels.kept import derived_from
from lm_softmax.kernels.tail_bounds import centred
from lm_softmax.kernels.workspace import reads_are_cheap

MIN_WORDS = 3 * 2**14  # of a cluster: a smaller one is as soon summed up
LEAST_ACCEPTED = 1 / 32  # of what is proposed
MISSED = 7.0  # proposals are as many as leave at most exp(-MISSED) of the draws without a word
MOST_PROPOSALS = 2**14  # of all draws: more rows share a product
RADII = 2  # from one power of two to the next, for which running sums are kept
MOST_KEPT = 8  # of those sums, 8 bytes a word each


class _Cluster(NamedTuple):
    """What is kept of a cluster of n words, and the proposals for rows up to some radii."""

    bias: Tensor  # (n,)
    centre: Tensor  # (width,): the mean row
    distance: Tensor  # (n,): of each row from it
    proposals: "dict[float, _Proposals]"


class _Proposals(NamedTuple):
    """For rows no longer than a radius."""

    running: Tensor | None  # (n,) float64; None where too few would be accepted
    accepted: float  # at least


def draw_by_rejection(
    rows: Tensor,
    row: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    """A word of `softmax(rows @ weight.t() + bias)[row]` for each draw, -1 where none was accepted.

    None where that would not be faster than the sum over all words, or is not possible.

    Args:
        rows: `(N, width)`, projected.
        row: `(D,)` int64, the row of each draw.
        weight: `(n, width)`.
        bias: `(n,)` or None.
        generator: Of the device of `rows`.
    """
    if weight.shape[0] < MIN_WORDS or not reads_are_cheap(rows):
        return None
    if rows.dtype != accumulation_dtype(rows.dtype):  # whose logits are rounded
        return None
    length = float(rows.norm(dim=1).amax()) * (1 + 1e-6)  # which it may have been rounded by
    if not 0 < length < 1e30:  # nan is not
        return None
    radius = 2 ** (math.ceil(RADII * math.log2(length)) / RADII)
    cluster = _cluster(weight, bias)
    proposals = None if cluster is None else _proposals(cluster, radius)
    if cluster is None or proposals is None or proposals.running is None:
        return None
    number = math.ceil(MISSED / -math.log1p(-min(proposals.accepted, 0.999)))
    if number * row.shape[0] > MOST_PROPOSALS:
        return None
    position = uniform(rows.new_empty(row.shape[0], number), generator)
    words = torch.searchsorted(proposals.running, position.mul_(proposals.running[-1]), right=True)
    chosen = weight[words].to(rows.dtype) - cluster.centre
    above = (chosen * rows[row].unsqueeze(1)).sum(2) - radius * chosen.norm(dim=2)
    accepted = uniform(above, generator) < above.exp()
    first = accepted.to(torch.uint8).argmax(1, keepdim=True)
    return words.gather(1, first).masked_fill_(~accepted.gather(1, first), -1).squeeze(1)


def _cluster(weight: Tensor, bias: Tensor | None) -> _Cluster | None:
    """What is kept of these weights; None where nothing can be."""
    kept = derived_from(weight, bias)
    if kept is None:
        return None
    if "draws" not in kept:
        with torch.inference_mode(False), torch.no_grad():
            of_words = centred(weight.detach(), None if bias is None else bias.detach())
        kept["draws"] = _Cluster(*of_words, {})
    found: _Cluster = kept["draws"]
    return found


def _proposals(cluster: _Cluster, radius: float) -> _Proposals:
    """Those for rows no longer than a radius."""
    if radius not in cluster.proposals:
        while len(cluster.proposals) >= MOST_KEPT:
            del cluster.proposals[next(iter(cluster.proposals))]
        with torch.inference_mode(False):
            bounds = cluster.bias.double() + radius * cluster.distance
            accepted = float((cluster.bias.double().logsumexp(0) - bounds.logsumexp(0)).exp())
            running = None
            if accepted >= LEAST_ACCEPTED:  # nan is not
                running = bounds.sub_(bounds.amax()).exp_().cumsum_(0)
            cluster.proposals[radius] = _Proposals(running, accepted)
    return cluster.proposals[radius]
