"""Sampled softmax: a full softmax trained on the target and a few negatives."""

import torch
from torch import Tensor

from lm_softmax.heads.negatives import Comparison, NegativesHead
from lm_softmax.heads.noise import NoiseKind
from lm_softmax.kernels.negatives import NO_HIT


class SampledSoftmax(NegativesHead):
    """Full softmax whose loss is over the target and negatives that the batch shares.

    With logits `s = F.linear(hidden, weight, bias)`, negatives drawn from a noise distribution and
    `E(w)` the expected number of draws of `w`, `loss` of a target `y` is

        u = [s[n] - log(E(n)) for n in negatives if n != y]
        logsumexp([s[y] - log(P(y)), *u]) - (s[y] - log(P(y)))

    where `P(y)` is the probability that `y` is drawn at all: one that was not the target would be
    there as often. It equals `E(y)` where negatives are unique. So a word's weight does not
    depend on whether it is there as the target or by chance, the loss has its optimum at the
    distribution of the data, and with more samples its gradient approaches that of the full
    softmax; with `num_samples=vocab_size` unique ones it is the full softmax. The number is not
    a likelihood: compare `log_prob`, which is exact.

    Source: Bengio and Senecal 2008, "Adaptive importance sampling to accelerate training of a
    neural probabilistic language model", section III; Jean et al. 2015, "On using very large target
    vocabulary for neural machine translation", sections 3.1 and 3.2.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies: the bias starts at their log-probabilities, and "unigram"
            noise follows them.
        num_samples: Number of negatives, shared by the batch; None is 1024, or half of a vocabulary
            below 2048.
        noise: "unigram", "log_uniform", "uniform", or masses of all words; see `Noise`.
        noise_power: The noise is raised to it.
        unique: Whether all negatives of a step differ.
        bias: Whether each word has a bias.
        softcap: Logits become `softcap * tanh(logits / softcap)`, in `log_prob` as well.
        sparse: Whether gradients of `loss` by weight and bias are sparse tensors, which hold the
            rows of targets and negatives alone, for optimizers that take them (Adagrad).
        label_smoothing: Must be 0: over all words it would need the logits of all.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        num_samples: int | None = None,
        noise: NoiseKind | Tensor = "unigram",
        noise_power: float = 1.0,
        unique: bool = True,
        bias: bool = True,
        softcap: float | None = None,
        sparse: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(
            hidden_size,
            vocab_size,
            counts,
            num_samples=num_samples,
            noise=noise,
            noise_power=noise_power,
            unique=unique,
            bias=bias,
            softcap=softcap,
            sparse=sparse,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )

    def _compare(self, target: Tensor) -> Comparison:
        """Negatives in ascending order, so that a hit is found by binary search."""
        ids = self.noise.draw()
        if not self.noise.unique:
            ids = ids.sort().values
        offset = -self.noise.log_expected_counts(ids)
        if not self.noise.unique:
            offset = offset + _copies(ids).to(offset.dtype).log()
        column = torch.searchsorted(ids, target).clamp(max=len(ids) - 1)
        slot = column.masked_fill(ids[column] != target, NO_HIT)
        return Comparison(ids, offset, -self.noise.log_inclusion(target), slot, logistic=False)


def _copies(ids: Tensor) -> Tensor:
    """How often each of sorted ids is there: all at the first of equals, 0 at the others.

    So a word weighs as much as if each copy were scored, and is masked at one place.
    """
    first = torch.searchsorted(ids, ids)
    repeats = first != torch.arange(len(ids), device=ids.device)
    return (torch.searchsorted(ids, ids, right=True) - first).masked_fill(repeats, 0)
