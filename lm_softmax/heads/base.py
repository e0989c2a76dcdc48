"""The contract of every output head, and what they all share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_softmax.kernels import Draws, accumulation_dtype, draw_from_table
from lm_softmax.kernels.draws import check_total
from lm_softmax.kernels.ranking import stable_topk

Reduction = Literal["mean", "sum", "none"]
ROW_CHUNK_BYTES = 2**26  # of log-probabilities that topk and sample hold at once


class TopK(NamedTuple):
    """The most probable words of each position, best first; equal ones by lower id."""

    log_probs: Float[Tensor, "*batch k"]
    indices: Int[Tensor, "*batch k"]


class Search(NamedTuple):
    """What `topk` found, and how much of the head it opened for it."""

    top: TopK
    opened: Tensor  # what this counts, the `search` of a head tells


class OutputHead(nn.Module, ABC):
    """`p(target | hidden)` over `vocab_size` words. Ids are ranked: id 0 is the most frequent.

    A subclass writes `log_prob`; whatever it can do cheaper than through the log-probabilities of
    all words, it overrides. Nothing here depends on `self.training`: `loss` is always the training
    objective, `log_prob` always the exact, normalised distribution in nats, so perplexities of
    different heads compare. Wrappers that hook `forward` alone (FSDP2) need
    `torch.distributed.fsdp.register_fsdp_forward_method(head, "log_prob")` and so on for the other
    public methods.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: How often each word occurs in the training set, by id, `(vocab_size,)`; a count of 0
            counts as 1. Where they decide a structure, None assumes Zipf's law with exponent 1.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If a size is below 1, or counts are negative, increasing, or not one a word.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        sizes = (hidden_size, vocab_size)
        if not all(map(is_size, sizes)):
            raise ValueError(
                f"hidden_size and vocab_size must be whole numbers of at least 1,"
                f" got {hidden_size} and {vocab_size}"
            )
        if 0 <= ignore_index < vocab_size:
            raise ValueError(
                f"ignore_index must not be a word's id, got {ignore_index} in [0, {vocab_size})"
            )
        if not -(2**63) <= ignore_index < 2**63:
            raise ValueError(
                f"ignore_index must fit into 64 bits as targets do, got {ignore_index}"
            )
        if counts is not None:
            _check_counts(counts, vocab_size)
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.ignore_index = ignore_index

    @property
    def loss_is_nll(self) -> bool:
        """Whether `loss` is the negative log-likelihood; only then may it be exponentiated."""
        return True

    @abstractmethod
    def log_prob(
        self, hidden: Float[Tensor, "*batch hidden"], target: Int[Tensor, "*batch"] | None = None
    ) -> Tensor:
        """Exact, normalised log-probabilities in nats, at least float32, differentiable.

        Equals `F.log_softmax(logits, -1)`, and with `target` its gather, 0 where ignored.

        Args:
            hidden: `(*batch, hidden_size)`.
            target: `(*batch,)` int64; None asks for all words.

        Returns:
            `(*batch,)` with target, which may cost far less than `(*batch, vocab_size)` without.

        Raises:
            ValueError: If shapes or dtypes do not fit or a target is out of range.
        """

    def loss(
        self,
        hidden: Float[Tensor, "*batch hidden"],
        target: Int[Tensor, "*batch"],
        *,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """The training objective in nats, at least float32.

        Args:
            hidden: `(*batch, hidden_size)`.
            target: `(*batch,)` int64; `ignore_index` positions count for nothing.
            reduction: "mean" over the positions that count (0 if there are none), "sum", or "none"
                for `(*batch,)` with 0 where ignored.

        Raises:
            ValueError: If shapes or dtypes do not fit or a target is out of range.
        """
        self._check_reduction(reduction)
        return self._reduce(-self.log_prob(hidden, target), target, reduction)

    def forward(
        self, hidden: Float[Tensor, "*batch hidden"], target: Int[Tensor, "*batch"] | None = None
    ) -> Tensor:
        """`loss(hidden, target)` with a target, `log_prob(hidden)` without."""
        return self.log_prob(hidden) if target is None else self.loss(hidden, target)

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> TopK:
        """The `k` most probable words of each position, exact.

        Equals a stable descending sort of `log_prob(hidden)` cut after `k`; equal log-probabilities
        are ordered by lower id. Where `hidden` is nan the log-probabilities are.

        Raises:
            ValueError: If `k` is not in `[1, vocab_size]`.
        """
        self._check_k(k)
        rows = self._flatten(hidden)
        found = [TopK(*stable_topk(self._log_probs(part), k)) for part in self._row_chunks(rows)]
        shape = (*hidden.shape[:-1], k)
        values = torch.cat([chunk.log_probs for chunk in found]).view(shape)
        return TopK(values, torch.cat([chunk.indices for chunk in found]).view(shape))

    @torch.no_grad()
    def sample(
        self,
        hidden: Float[Tensor, "*batch hidden"],
        num_samples: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "*batch num_samples"]:
        """Words drawn independently, with replacement, from the exact distribution.

        `p(w) ** (1 / temperature)` over the whole vocabulary is normalised, then cut to the `top_k`
        most probable words, then to the smallest set of most probable words that holds `top_p` of
        what is left, in this order. A temperature of 0 takes the most probable word. Equal to
        `torch.multinomial` of these probabilities in distribution, not in the numbers it takes from
        the generator; a head computes no more of them than its structure asks for, but with `top_p`
        and no `top_k` all of them, for a limited number of positions at a time.

        Raises:
            ValueError: If `num_samples` or `top_k` is out of range, `temperature` is negative,
                `top_p` is not in `(0, 1]`, or a position has no distribution but nan.
        """
        self._check_sampling(num_samples, temperature, top_k, top_p)
        rows, shape = self._flatten(hidden), (*hidden.shape[:-1], num_samples)
        if not rows.shape[0]:
            return torch.empty(shape, dtype=torch.int64, device=rows.device)
        if temperature == 0:
            found = self._best(rows, 1)
            check_total(found.log_probs.exp())
            return found.indices.expand(-1, num_samples).reshape(shape)
        top_p = None if top_p == 1 else top_p
        draws = Draws(num_samples, temperature, top_p, generator)
        if top_k is not None and top_k < self.vocab_size:
            found = self._best(rows, top_k)
            place = draw_from_table(found.log_probs, draws)
            return found.indices.gather(1, place).view(shape)
        drawn = self._draw(rows, draws)
        return drawn if drawn.shape == shape else drawn.view(shape)

    def _draw(self, rows: Tensor, draws: Draws) -> Tensor:
        """Ids `(N, num_samples)` drawn from all words; whatever is cheaper overrides it."""
        return torch.cat(
            [draw_from_table(self._log_probs(part), draws) for part in self._row_chunks(rows)]
        )

    def _best(self, rows: Tensor, k: int) -> TopK:
        """`topk` of the class: that of a wrapped module (FSDP2) leaves parameters in parts."""
        return type(self).topk(self, rows, k)

    def _log_probs(self, rows: Tensor) -> Tensor:
        """`log_prob` of the class, for the reason of `_best`."""
        return type(self).log_prob(self, rows)

    def tie_weight(self, embedding: nn.Module) -> None:
        """Share the output matrix with the input embedding (Press and Wolf 2017).

        Raises:
            ValueError: If this head has no matrix of that shape to share.
        """
        raise ValueError(f"{type(self).__name__} has no output matrix that an embedding could be")

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Update what is learned without gradients; `LanguageModel` calls it, so does your loop."""

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients are sparse tensors: all of a head with `sparse`, else none.

        A head with others overrides it; an `nn.Embedding` within speaks for itself by its `sparse`.
        """
        return list(self.parameters()) if getattr(self, "sparse", False) else []

    def structure(self) -> dict[str, Any]:
        """Keyword arguments that pin what was derived from data; a checkpoint keeps them."""
        return {}

    def _flatten(self, hidden: Tensor) -> Tensor:
        """`(*batch, hidden_size)` as `(N, hidden_size)`, checked."""
        if hidden.dim() < 1 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden must be (*batch, {self.hidden_size}), got {tuple(hidden.shape)}"
            )
        if not hidden.is_floating_point():
            raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
        return hidden if hidden.dim() == 2 else hidden.reshape(-1, self.hidden_size)

    def _flatten_with_target(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, targets, and a number to add to the loss: 0, or nan if a target is out of range.

        Where looking at the values costs no synchronisation the latter raises; elsewhere the
        target becomes `ignore_index` and the loss nan.
        """
        rows = self._flatten(hidden)
        if target.shape != hidden.shape[:-1]:
            raise ValueError(
                f"target must have hidden's leading shape {tuple(hidden.shape[:-1])},"
                f" got {tuple(target.shape)}"
            )
        if target.dtype != torch.int64:
            raise ValueError(f"target must be int64, got {target.dtype}")
        flat = target.reshape(-1)
        wrong = ((flat < 0) | (flat >= self.vocab_size)) & (flat != self.ignore_index)
        if flat.is_cpu and not torch.compiler.is_compiling():
            if wrong.any():
                raise ValueError(
                    f"targets must be in [0, {self.vocab_size}) or {self.ignore_index},"
                    f" got {int(flat[wrong][0])} among {int(wrong.sum())} wrong ones"
                )
            return rows, flat, rows.new_zeros((), dtype=torch.float32)
        flat = flat.masked_fill(wrong, self.ignore_index)
        poison = rows.new_zeros((), dtype=torch.float32)
        return rows, flat, poison.masked_fill(wrong.any(), torch.nan)

    def _reduce(self, losses: Tensor, target: Tensor, reduction: Reduction) -> Tensor:
        """Reduce losses that are 0 where ignored."""
        if reduction == "none":
            return losses
        total = losses.sum()
        return total if reduction == "sum" else total / self._num_targets(target)

    def _num_targets(self, target: Tensor) -> Tensor:
        """Positions that count, at least 1."""
        return (target != self.ignore_index).sum().clamp(min=1)

    @staticmethod
    def _check_reduction(reduction: str) -> None:
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')

    def _check_k(self, k: int) -> None:
        if not (is_size(k) and k <= self.vocab_size):
            raise ValueError(f"k must be in [1, vocab_size={self.vocab_size}], got {k}")

    def _check_sampling(
        self, num_samples: int, temperature: float, top_k: int | None, top_p: float | None
    ) -> None:
        if not is_size(num_samples):
            raise ValueError(f"num_samples must be a whole number of at least 1, got {num_samples}")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be at least 0 (0 is greedy), got {temperature}")
        if top_k is not None and not (is_size(top_k) and top_k <= self.vocab_size):
            raise ValueError(f"top_k must be in [1, vocab_size={self.vocab_size}], got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")

    def _row_chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """Parts of the rows whose log-probabilities fit a fixed memory; at least one part."""
        itemsize = accumulation_dtype(rows.dtype).itemsize
        size = max(1, ROW_CHUNK_BYTES // (itemsize * self.vocab_size))
        return iter(torch.split(rows, size) if rows.shape[0] else (rows,))

    def extra_repr(self) -> str:
        """Sizes, for `print(head)`."""
        return f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}"


def is_size(value: object) -> bool:
    """Whether a value is a whole number of at least 1, and not True."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_counts(counts: Tensor, vocab_size: int) -> None:
    if not isinstance(counts, Tensor) or counts.shape != (vocab_size,):
        got = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"counts must be a tensor, one number a word, ({vocab_size},), got {got}")
    if not counts.isfinite().all():
        raise ValueError("counts must be finite")
    parts = counts[(counts != 0) & (counts < 1)]
    if parts.numel():
        raise ValueError(f"counts must be 0 or at least 1, got {parts[0].item()}: no frequencies")
    effective = counts.clamp(min=1)
    rises = (effective[1:] > effective[:-1]).nonzero()
    if rises.numel():
        word = int(rises[0]) + 1
        raise ValueError(
            f"ids must be ranked by frequency: word {word} has count {counts[word].item()}"
            f" after {counts[word - 1].item()}"
        )
