"""The full softmax with its output matrix factored."""

from typing import Any

import torch
from torch import Tensor, nn

from lm_softmax.heads.base import is_size
from lm_softmax.heads.clustered import (
    ClusteredHead,
    dense_log_probs,
    log_frequencies,
    output_rows,
    project,
    tied_weight,
)
from lm_softmax.heads.singular import ROWS, right_singular
from lm_softmax.kernels import Clusters, Objective, autocast_off


class LowRankSoftmax(ClusteredHead):
    """Exact softmax whose output matrix is a product of two thin ones.

    Equals `F.log_softmax(F.linear(F.linear(hidden, projection), weight, bias), -1)`: each word has
    `rank` weights instead of `hidden_size`, and time and memory shrink with them.

    Source: Sainath et al. 2013, "Low-rank matrix factorization for deep neural network training
    with high-dimensional output targets", section 2.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies; the bias starts at their log-probabilities.
        rank: Width of a word's row; None is a quarter of `hidden_size`.
        bias: Whether each word has a bias.
        softcap: Logits become `softcap * tanh(logits / softcap)`, in `log_prob` as well.
        label_smoothing: Share of the target's probability spread over all words, as in
            `F.cross_entropy` (Szegedy et al. 2016, section 7); in the loss only.
        z_loss: Weight of `logsumexp(logits) ** 2` added to the loss (Chowdhery et al. 2022,
            section 5, use 1e-4); in the loss only.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If `rank` is not in `[1, hidden_size]` or an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        rank: int | None = None,
        bias: bool = True,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        objective = Objective(softcap, label_smoothing, z_loss)
        super().__init__(
            hidden_size, vocab_size, counts, objective=objective, ignore_index=ignore_index
        )
        if rank is None:
            rank = max(hidden_size // 4, 1)
        if not (is_size(rank) and rank <= hidden_size):
            raise ValueError(f"rank must be in [1, hidden_size={hidden_size}], got {rank}")
        self.rank = rank
        self.projection = nn.Parameter(torch.empty(rank, hidden_size))
        self.weight = nn.Parameter(torch.empty(vocab_size, rank))
        # the projection keeps the variance of its input: logits start at the full head's scale
        nn.init.uniform_(self.projection, -((3 / hidden_size) ** 0.5), (3 / hidden_size) ** 0.5)
        nn.init.uniform_(self.weight, -(rank**-0.5), rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        if self.bias is not None and counts is not None:
            self.bias.data.copy_(log_frequencies(counts))

    def clusters(self) -> Clusters:
        """One cluster over the projected inputs."""
        return Clusters(self.weight, None, self.bias)

    def _inputs(self, rows: Tensor, target: Tensor | None = None) -> Tensor:
        if target is not None:  # 0 * nan is nan, in the gradient of the projection
            rows = rows.masked_fill((target == self.ignore_index).unsqueeze(1), 0)
        return project(rows, self.projection)

    def _all_log_probs(self, rows: Tensor) -> Tensor:
        inputs = self._inputs(rows)
        return dense_log_probs(inputs, self.weight, self.bias, self.objective.softcap)

    def structure(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}

    def tie_weight(self, embedding: nn.Module) -> None:
        """Share the output rows with an embedding that is `rank` wide.

        The projection stays this head's own; a factored input embedding has one on its side.

        Raises:
            ValueError: If `embedding` has no weight of `(vocab_size, rank)`.
        """
        shape = (self.vocab_size, self.rank)
        self.weight = tied_weight(embedding, shape, "LowRankSoftmax", "(vocab_size, rank)")

    @classmethod
    @torch.no_grad()
    def from_full(cls, head: ClusteredHead, rank: int | None = None) -> "LowRankSoftmax":
        """The head of this rank whose output matrix is nearest to that of a trained one.

        The singular value decomposition of the output rows is cut after `rank` terms, which is
        nearest in the Frobenius and in the spectral norm (Eckart and Young 1936); each factor takes
        the square roots of the singular values. Bias and options are copied. At
        `min(vocab_size, hidden_size)` the distribution is that of `head`.

        Args:
            head: A head with one row a word over `hidden` itself, or a low-rank one.
            rank: Width of the new rows, as in the constructor.

        Raises:
            ValueError: If `head` has tail clusters, other inputs or rows that are not finite, or
                `rank` is out of range.
        """
        rows, bias = _dense_rows(head)
        objective = head.objective
        made = cls(
            head.hidden_size,
            head.vocab_size,
            rank=rank,
            bias=bias is not None,
            softcap=objective.softcap,
            label_smoothing=objective.label_smoothing,
            z_loss=objective.z_loss,
            ignore_index=head.ignore_index,
        ).to(rows)
        values, vectors = right_singular(rows)
        vectors = vectors[: made.rank]
        # rows of a lower rank: nothing to share, and a direction that is rounding alone would
        # never train, because the gradient of each factor is a multiple of the other
        least = values[0] * torch.finfo(torch.float64).eps * max(rows.shape)
        roots = values[: made.rank].where(values[: made.rank] > least, 1).sqrt()
        made.projection.copy_(roots.unsqueeze(1) * vectors)
        for own, part in zip(*(torch.split(m, ROWS) for m in (made.weight, rows)), strict=True):
            own.copy_(part.to(vectors) @ vectors.t() / roots)
        if made.bias is not None and bias is not None:
            made.bias.copy_(bias)
        return made

    def extra_repr(self) -> str:
        """Sizes, for `print(head)`."""
        return f"{super().extra_repr()}, rank={self.rank}"


def _dense_rows(head: ClusteredHead) -> tuple[Tensor, Tensor | None]:
    """Output rows over `hidden` itself, those of a low-rank head multiplied out, and bias."""
    if not isinstance(head, LowRankSoftmax):
        return output_rows(head)
    with autocast_off(head.weight):
        rows = head.weight @ head.projection
    if not rows.isfinite().all():
        raise ValueError(f"the output rows of {type(head).__name__} must be finite")
    return rows, head.bias
