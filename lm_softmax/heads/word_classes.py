"""Classes of words as ranges of ids: where they begin, and a softmax over classes, then words."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lm_softmax.heads.base import is_size
from lm_softmax.heads.clustered import dense_log_probs, log_frequencies, project
from lm_softmax.heads.cutoffs import resolve_cutoffs, zipf_counts
from lm_softmax.kernels import Clusters, Tail


class WordClasses(NamedTuple):
    """The parameters: `p(w) = p(class) * p(w | class)`, both a softmax over `hidden`."""

    weight: Tensor  # (V, width)
    bias: Tensor | None  # (V,)
    class_weight: Tensor  # (C, width)
    class_bias: Tensor | None  # (C,)
    cutoffs: Sequence[int]  # ids at which classes but the first begin

    def clusters(self) -> Clusters:
        """As the cluster kernel takes them: no short-list, tails of full width."""
        sizes = class_sizes(self.cutoffs, self.weight.shape[0])
        biases = [None] * len(sizes) if self.bias is None else torch.split(self.bias, sizes)
        parts = zip(torch.split(self.weight, sizes), biases, strict=True)
        tails = [Tail(None, weight, bias) for weight, bias in parts]
        return Clusters(self.weight[:0], self.class_weight, self.class_bias, tails)

    def log_probs(self, rows: Tensor) -> Tensor:
        """Log-probabilities of all words, `(N, V)`."""
        masses = dense_log_probs(rows, self.class_weight, self.class_bias, None)
        logits = project(rows, self.weight).to(masses.dtype)
        if self.bias is not None:
            logits = logits + self.bias
        parts = torch.split(logits, class_sizes(self.cutoffs, self.weight.shape[0]), 1)
        each = zip(torch.split(masses, 1, 1), parts, strict=True)
        return torch.cat([mass + torch.log_softmax(part, 1) for mass, part in each], 1)


def class_sizes(cutoffs: Sequence[int], vocab_size: int) -> list[int]:
    """Number of words of each class."""
    return [right - left for left, right in pairwise([0, *cutoffs, vocab_size])]


def initial_biases(counts: Tensor, cutoffs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Biases of words and of classes that give the unigram distribution where `hidden` is 0."""
    parts = torch.split(log_frequencies(counts), class_sizes(cutoffs, counts.shape[0]))
    masses = [part.logsumexp(0, keepdim=True) for part in parts]
    shares = [part - mass for part, mass in zip(parts, masses, strict=True)]
    return torch.cat(shares), torch.cat(masses)


def resolve_classes(
    vocab_size: int,
    counts: Tensor | None,
    num_classes: int | None,
    cutoffs: Literal["auto"] | Sequence[int],
) -> list[int]:
    """Ids at which classes but the first begin.

    Raises:
        ValueError: If `num_classes` or `cutoffs` is out of range, or they do not agree.
    """
    if num_classes is not None and not (is_size(num_classes) and num_classes <= vocab_size):
        raise ValueError(f"num_classes must be in [1, vocab_size={vocab_size}], got {num_classes}")
    if cutoffs != "auto":
        ids = resolve_cutoffs(cutoffs, vocab_size)
        if num_classes is not None and len(ids) >= num_classes:
            raise ValueError(
                f"cutoffs make {len(ids) + 1} classes, but num_classes={num_classes} is the most"
            )
        return ids
    if num_classes is None:
        num_classes = max(1, round(vocab_size**0.5))
    ranked = zipf_counts(vocab_size) if counts is None else counts
    return class_starts(vocab_size, ranked, num_classes)


def class_starts(vocab_size: int, counts: Tensor, num_classes: int) -> list[int]:
    """Ids at which classes begin, without the first: equal shares of the sum of sqrt(count).

    Square roots of counts, not counts, lest the first classes hold one word each and the last a
    tenth of the vocabulary. A word with more than a share is a class: there may be fewer classes.
    """
    covered = counts.to("cpu", torch.float64).clamp(min=1).sqrt().cumsum(0)
    shares = torch.arange(1, num_classes, device="cpu").double() * covered[-1] / num_classes
    shares *= 1 - 1e-9  # a border that is reached up to rounding is reached
    ids = torch.unique(torch.searchsorted(covered, shares) + 1).tolist()
    return [start for start in ids if start < vocab_size]
