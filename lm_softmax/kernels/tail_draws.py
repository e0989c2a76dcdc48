"""Words of a large cluster, drawn without its normaliser.

The logit of word w is `b_w + w.z`. With `c` the mean row and `r >= |z|`,

    b_w + w.z <= c.z + b_w + r |w - c|                          (Cauchy and Schwarz's inequality)

so words proposed in proportion to `exp(b_w + r |w - c|)`, whose running sums are kept, and accepted
with probability `exp((w - c).z - r |w - c|)`, have the distribution of the cluster (von Neumann
1951, "Various techniques used in connection with random digits"). At least

    exp(logsumexp(b) - logsumexp(b + r |w - c|))                (Jensen's inequality)

of them are accepted. Where that is little, as of long rows, nothing is proposed. What is done
depends on weights and rows, not on what was drawn before: equal generators draw equal words.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lm_softmax.kernels.dense import accumulation_dtype
from lm_softmax.kernels.draws import uniform
from lm_softmax.kernels.kept import derived_from
from lm_softmax.kernels.tail_bounds import centred
from lm_softmax.kernels.workspace import reads_are_cheap

MIN_WORDS = 3 * 2**14  # of a cluster: a smaller one is as soon summed up
LEAST_ACCEPTED = 1 / 32  # of what is proposed
LOG_MISSED = 7.0  # proposals are as many as leave exp(-LOG_MISSED) of the draws without a word
MOST_VALUES = 2**18  # of the rows of all proposals: more draws share a product
PER_OCTAVE = 2  # radii from one power of two to the next, for which running sums are kept
MOST_KEPT = 8  # of those sums, 8 bytes a word each


class _Cluster(NamedTuple):
    """What is kept of a cluster of n words, and the proposals for rows up to some radii."""

    bias: Tensor  # (n,), a copy
    centre: Tensor  # (width,): the mean row
    distance: Tensor  # (n,): of each row from it
    least_radius: float  # shorter rows are as well served by it
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

    None where few would be accepted or many draws share a product, and of weights that are no
    parameters, which may be made anew for each call.

    Args:
        rows: `(N, width)`, projected.
        row: `(D,)` int64, the row of each draw.
        weight: `(n, width)`.
        bias: `(n,)` or None.
        generator: Of the device of `rows`.
    """
    if weight.shape[0] < MIN_WORDS or not reads_are_cheap(rows):
        return None
    if row.shape[0] * weight.shape[1] > MOST_VALUES or not isinstance(weight, nn.Parameter):
        return None
    if rows.dtype != accumulation_dtype(rows.dtype):  # whose logits are rounded
        return None
    length = float(rows.norm(dim=1).amax()) * (1 + 1e-6)  # which it may have been rounded by
    if not 0 < length < 1e30:  # nan is not
        return None
    cluster = _cluster(weight, bias)
    if cluster is None:
        return None
    radius = _radius(max(length, cluster.least_radius))
    running, accepted = _proposals(cluster, radius)
    if running is None:
        return None
    number = math.ceil(LOG_MISSED / -math.log1p(-min(accepted, 0.999)))
    if number * row.shape[0] * weight.shape[1] > MOST_VALUES:
        return None
    position = uniform(rows.new_empty(row.shape[0], number), generator)
    words = torch.searchsorted(running, position.mul_(running[-1]), right=True)
    chosen = weight[words].to(rows.dtype) - cluster.centre
    above = (chosen * rows[row].unsqueeze(1)).sum(2) - radius * cluster.distance[words]
    taken = uniform(above, generator) < above.exp()
    first = taken.to(torch.uint8).argmax(1, keepdim=True)
    return words.gather(1, first).masked_fill_(~taken.gather(1, first), -1).squeeze(1)


def _radius(length: float) -> float:
    """The next one from a length on."""
    return float(2 ** (math.ceil(PER_OCTAVE * math.log2(length)) / PER_OCTAVE))


def _cluster(weight: Tensor, bias: Tensor | None) -> _Cluster | None:
    """What is kept of these weights; None where nothing can be."""
    kept = derived_from(weight, bias)
    if kept is None:
        return None
    found: _Cluster | None = kept.get("draws")
    if found is None or not (bias is None or torch.equal(bias.to(found.bias.dtype), found.bias)):
        with torch.inference_mode(False), torch.no_grad():
            offset, centre, distance = centred(
                weight.detach(), None if bias is None else bias.detach()
            )
            largest = float(distance.amax())
            least = 1 / largest if 1e-30 < largest < 1e30 else 1.0
            found = _Cluster(offset.clone(), centre, distance, least, {})
        kept["draws"] = found
    return found


def _proposals(cluster: _Cluster, radius: float) -> _Proposals:
    """Those for rows no longer than a radius."""
    found = cluster.proposals.get(radius)
    if found is not None:
        return found
    with torch.inference_mode(False):
        offset = cluster.bias.double()
        bounds = offset + radius * cluster.distance
        accepted = float((offset.logsumexp(0) - bounds.logsumexp(0)).exp())
        if not accepted >= LEAST_ACCEPTED:  # nan is not
            found = _Proposals(None, 0.0)
        else:
            found = _Proposals(bounds.sub_(bounds.amax()).exp_().cumsum_(0), accepted)
            sums = [key for key, one in list(cluster.proposals.items()) if one.running is not None]
            for key in sums[: max(0, len(sums) + 1 - MOST_KEPT)]:
                cluster.proposals.pop(key, None)
    cluster.proposals[radius] = found
    return found
