"""Noise-contrastive estimation and negative sampling."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lm_softmax.heads.negatives import Comparison, NegativesHead
from lm_softmax.heads.noise import NoiseKind, is_real
from lm_softmax.kernels.negatives import NO_HIT


class NCE(NegativesHead):
    """Full softmax trained to tell the target from noise, word by word.

    With logits `s = F.linear(hidden, weight, bias)`, negatives `n_1 ... n_S` drawn from a noise
    distribution, `E(w)` the expected number of draws of `w` (`S * q(w)` with replacement), and the
    log-partition `c`, `loss` of a target `y` is

        -logsigmoid(u(y)) - sum(logsigmoid(-u(n)) for n in negatives),  u(w) = s_w - c - log(E(w))

    Its optimum is `s_w - c = log(p(w))`: the distribution of the data, normalised by itself. With
    `objective="negative_sampling"` it is `u(w) = s_w`, and the optimum is
    `s_w = log(p(w) / E(w))`, which is good for word vectors and no language model. `log_prob`
    normalises over all words either way.

    Source: Gutmann and Hyvarinen 2010, "Noise-contrastive estimation", section 2; Mnih and Teh
    2012, "A fast and simple algorithm for training neural probabilistic language models",
    section 3; negative sampling: Mikolov et al. 2013, "Distributed representations of words and
    phrases and their compositionality", section 2.2.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies: the bias starts where `hidden` that says nothing gives
            their probabilities, and "unigram" noise follows them.
        num_samples: Number of negatives, shared by the batch; None is 1024, or half of a vocabulary
            below 2048.
        noise: "unigram", "log_uniform", "uniform", or masses of all words; see `Noise`.
        noise_power: The noise is raised to it.
        unique: Whether all negatives of a step differ.
        objective: "nce", or "negative_sampling" without log-partition and correction.
        log_partition: The constant `c`, or "learned" for one scalar parameter; for "nce" only. None
            is 0 with a bias, else the logarithm of the number of words, where "learned" starts too.
            It has the head's dtype: in bfloat16 small steps of a learned one are lost.
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
        objective: Literal["nce", "negative_sampling"] = "nce",
        log_partition: float | Literal["learned"] | None = None,
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
        if objective not in ("nce", "negative_sampling"):
            raise ValueError(f'objective must be "nce" or "negative_sampling", got {objective!r}')
        self.corrected = objective == "nce"
        if log_partition is not None and not self.corrected:
            raise ValueError(
                f'objective="negative_sampling" has no log_partition, got {log_partition!r}'
            )
        start = 0.0 if bias else math.log(vocab_size)
        self.log_partition: nn.Parameter | float
        if log_partition == "learned":
            self.log_partition = nn.Parameter(torch.full((1,), start))
        elif log_partition is None:
            self.log_partition = start
        elif is_real(log_partition) and math.isfinite(log_partition):
            self.log_partition = float(log_partition)
        else:
            raise ValueError(f'log_partition must be a number or "learned", got {log_partition!r}')
        self._start_bias(counts)

    @torch.no_grad()
    def _start_bias(self, counts: Tensor | None) -> None:
        """At the optimum for words that do not depend on `hidden`."""
        if self.bias is None:
            return
        if counts is None:
            self.bias.sub_(math.log(self.vocab_size))
        if self.corrected:
            self.bias.add_(self.log_partition)
        else:
            ids = torch.arange(self.vocab_size)
            self.bias.sub_(self.noise.log_expected_counts(ids))

    def _compare(self, target: Tensor) -> Comparison:
        ids = self.noise.draw()
        slot = torch.full_like(target, NO_HIT)  # noise may be the target
        if not self.corrected:
            none = self.weight.new_zeros(())
            return Comparison(ids, none.expand(ids.shape), none, slot, logistic=True)
        expected = self.noise.log_expected_counts(torch.cat([ids, target]))
        offset, of_target = (-self.log_partition - expected).tensor_split([len(ids)])
        return Comparison(ids, offset, of_target, slot, logistic=True)
