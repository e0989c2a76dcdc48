"""Sampled softmax: a full softmax trained on the target and a few negatives."""

from collections.abc import Sequence

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

    with replacement, where `P(y)` is the probability that `y` is drawn at all. Negatives of
    `unique` are one of each stratum (see `Noise`), `E` is the probability that a word is drawn, and
    the target takes the place of the one of its own stratum:

        u = [s[n] - log(E(n)) for n in negatives if stratum(n) != stratum(y)]
        logsumexp([s[y] - log(E(y)), *u]) - (s[y] - log(E(y)))

    Of all pairs of target and negatives that have the same words, one of each stratum, the target
    is then `w` in proportion to `p(w) / E(w)`: the optimum of the expected loss is exactly the
    distribution of the data, for any number of samples. (A single negative has one stratum, and
    takes part unless it is the target: with the same optimum.) With replacement it is so
    approximately, and better with more samples, as negatives that are the target are left out. As
    their number grows the gradient approaches that of the full softmax, and unique ones of
    `num_samples=vocab_size` are the full softmax. The number is not a likelihood: compare
    `log_prob`, which is exact.

    Source: negatives weighted by the inverse of their probability: Bengio and Senecal 2008,
    "Adaptive importance sampling to accelerate training of a neural probabilistic language model",
    section III; Jean et al. 2015, "On using very large target vocabulary for neural machine
    translation", sections 3.1 and 3.2. That the target is weighted so too: TensorFlow's "Candidate
    Sampling Algorithms Reference", where candidates are the target and all draws, which differ
    because they are redrawn; here one draw of each stratum, so that `E` is exact, and the target in
    place of one of them.

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
            `DistributedDataParallel` by itself does not reduce sparse gradients of a head's own
            parameters; `LanguageModel` arranges it.
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
        noise: NoiseKind | Tensor | Sequence[float] = "unigram",
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
        ids, noise = self.noise.draw(), self.noise
        of_target = -noise.log_inclusion(target)
        if noise.unique and self.num_samples > 1:
            offset, slot = -noise.log_expected_counts(ids), noise.stratum(target)
            return Comparison(ids, offset, of_target, slot, logistic=False)
        ids = ids.sort().values  # so that a hit is found by binary search
        expected = noise.log_expected_counts(ids)
        offset = _copies(ids).to(expected.dtype).log() - expected
        column = torch.searchsorted(ids, target).clamp(max=len(ids) - 1)
        slot = column.masked_fill(ids[column] != target, NO_HIT)
        return Comparison(ids, offset, of_target, slot, logistic=False)


def _copies(ids: Tensor) -> Tensor:
    """How often each of sorted ids is there: all at the first of equals, 0 at the others.

    So a word weighs as much as if each copy were scored, and is masked at one place.
    """
    first = torch.searchsorted(ids, ids)
    repeats = first != torch.arange(len(ids), device=ids.device)
    return (torch.searchsorted(ids, ids, right=True) - first).masked_fill(repeats, 0)
