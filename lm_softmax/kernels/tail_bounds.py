"""Which rows need not open a cluster, told from its weights without its normaliser.

The logit of word w is `b_w + w.z`. With `q = softmax(b)` and the mean row `c = sum(q_w w)`,

    logsumexp(b + W z) >= logsumexp(b) + c.z                    (Jensen's inequality)
    b_w + w.z <= b_w + c.z + |w - c| |z|                        (Cauchy and Schwarz's)

so `log p(w) <= b_w + |w - c| |z| - logsumexp(b)`, in which `c.z` is gone. Words are put in order
of that bound at a typical `|z|`, falling. A row looks at the first words of that order, as many
as the bound is too high for, and opens the cluster only if one of them is good enough.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels.dense import accumulation_dtype
from lm_softmax.kernels.kept import derived_from
from lm_softmax.kernels.ranking import BLOCK

PREVIEW = 8  # at most one in so many words is looked at before the cluster is opened
LENGTHS = 34  # of projected rows that bounds are kept for, up to twice the typical one
DERIVED_ROWS = 2**14  # of the weights that are centred at once


class TailBounds(NamedTuple):
    """What is kept of a cluster of n words: about n / PREVIEW ids, and some numbers a block.

    The table bounds `b_w + |w - c| |z|` over each block of the order, for rows no longer than
    `step`, twice that and so on; of still longer ones nothing is known.
    """

    centre: Tensor  # (width,): the mean row
    log_sum: float  # log-sum-exp of the biases
    ids: Tensor  # (P * BLOCK,): the words of highest bound, block by block
    step: float
    table: Tensor  # (LENGTHS, B)
    peak: Tensor  # (LENGTHS,): the largest of all blocks
    bias_size: float  # largest absolute value
    row_size: float  # largest norm

    def limit(self, mass: Tensor, least: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
        """What a bound must be above, lest the log-probabilities of words be `least` or below.

        It is lower by what logits may be off whose operands and values are rounded to `dtype`, and
        by what log-probabilities may be.

        Args:
            mass: `(n,)`, log-probability of the cluster.
            least: `(n,)`, log-probability.
            norm: `(n,)`, of the projected rows.
            dtype: Of the products.
        """
        eps = 8 * torch.finfo(dtype).eps
        exact = 8 * torch.finfo(least.dtype).eps
        limit = torch.sub(least * (1 + exact), mass, alpha=1 - exact)
        limit.sub_(norm, alpha=eps * self.row_size)
        return limit.add_(self.log_sum - eps * (1 + self.bias_size))

    def lengths(self, norm: Tensor) -> Tensor:
        """The row of the table for each projected row, `(n,)`."""
        return (norm / self.step).ceil_().clamp_(max=LENGTHS - 1).nan_to_num_(LENGTHS - 1).long()


def tail_bounds(weight: Tensor, bias: Tensor | None, rows: Tensor) -> TailBounds | None:
    """The bounds of a cluster, from the second call on that finds its weights unchanged.

    See `derived_from` for how long they are kept.

    Args:
        weight: `(n, width)`.
        bias: `(n,)` or None.
        rows: `(N, width)`, projected; their length is taken for typical.
    """
    kept = derived_from(weight, bias)
    if kept is None:
        return None
    if "bounds" not in kept:  # weights that change at each call would be derived from in vain
        kept["bounds"] = None
    elif kept["bounds"] is None:
        with torch.inference_mode(False):
            typical = float(rows.to(accumulation_dtype(rows.dtype)).norm(dim=1).nanmean())
            made = _derive(weight.detach(), None if bias is None else bias.detach(), typical)
        kept["bounds"] = made
    found: TailBounds | None = kept["bounds"]
    return found


def _derive(weight: Tensor, bias: Tensor | None, typical: float) -> TailBounds:
    b, centre, norms = centred(weight, bias)
    step = 2 * typical / (LENGTHS - 2) if 0 < typical < torch.inf else 1.0
    order = (b + typical * norms).argsort(descending=True)
    order = torch.cat([order, order[-1:].expand(-len(order) % BLOCK)]).view(-1, BLOCK)
    table = torch.stack([(b + i * step * norms)[order].amax(1) for i in range(LENGTHS)])
    table[-1] = torch.inf  # of rows that are longer
    return TailBounds(
        centre,
        float(b.logsumexp(0)),
        order[: -(-order.shape[0] // PREVIEW)].flatten(),
        step,
        table,
        table.amax(1),
        float(b.where(b.isfinite(), 0).abs().amax()),
        float(norms.amax() + centre.norm()),
    )


def centred(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Biases `(n,)`, the mean row `(width,)` in their softmax, and the distance of each from it."""
    dtype = accumulation_dtype(weight.dtype)
    b = weight.new_zeros(weight.shape[0], dtype=dtype) if bias is None else bias.to(dtype)
    parts = torch.split(weight, DERIVED_ROWS)
    shares = torch.split(b.softmax(0), DERIVED_ROWS)
    centre = sum(share @ part.to(dtype) for share, part in zip(shares, parts, strict=True))
    assert isinstance(centre, Tensor)
    return b, centre, torch.cat([(part.to(dtype) - centre).norm(dim=1) for part in parts])
