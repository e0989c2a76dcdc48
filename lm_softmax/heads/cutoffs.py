"""Where the clusters of an adaptive softmax begin, and how wide each is."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

# Shares of the running text that the short-list and the following clusters cover under the rule
# for "auto". Grave et al. 2017 (section 4.2) find few clusters, each several times as large as
# the one before and far rarer, to be near the optimum of their cost model.
COVERAGE = (0.8, 0.95)
MIN_VOCAB_SIZE = 2000  # below this a full softmax is cheaper than any split


def zipf_counts(vocab_size: int) -> Tensor:
    """Counts of `vocab_size` ranked words under Zipf's law with exponent 1, float64."""
    return vocab_size / torch.arange(1, vocab_size + 1, dtype=torch.float64, device="cpu")


def resolve_cutoffs(
    cutoffs: Literal["auto"] | Sequence[int], vocab_size: int, counts: Tensor | None = None
) -> list[int]:
    """The ids at which tail clusters begin, strictly increasing inside `(0, vocab_size)`.

    `"auto"` follows a simple rule: the short-list holds the most frequent words that cover 80 % of
    the running text, the first tail those up to 95 %, the last tail the rest; no clusters below
    2000 words. Counts of 0 count as 1; without `counts` Zipf's law with exponent 1 is assumed.

    Args:
        cutoffs: `"auto"`, or the ids themselves; a last id equal to `vocab_size` is dropped.
        vocab_size: Number of words.
        counts: Training-set frequency of each word by rank, `(vocab_size,)`.

    Raises:
        ValueError: If the ids are not strictly increasing inside `(0, vocab_size)`.
    """
    if isinstance(cutoffs, str):
        if cutoffs != "auto":
            raise ValueError(f'cutoffs must be "auto" or a list of ids, got {cutoffs!r}')
        return _coverage_cutoffs(vocab_size, counts)
    if not isinstance(cutoffs, Sequence):
        raise ValueError(f'cutoffs must be "auto" or a list of ids, got {cutoffs!r}')
    ids = [int(cutoff) for cutoff in cutoffs]
    if any(cutoff != given for cutoff, given in zip(ids, cutoffs, strict=True)):
        raise ValueError(f"cutoffs must be whole numbers, got {list(cutoffs)}")
    if ids and ids[-1] == vocab_size:
        ids.pop()
    borders = [0, *ids, vocab_size]
    if any(left >= right for left, right in pairwise(borders)):
        raise ValueError(
            f"cutoffs must be strictly increasing inside (0, {vocab_size}), got {list(cutoffs)}"
        )
    return ids


def _coverage_cutoffs(vocab_size: int, counts: Tensor | None) -> list[int]:
    if vocab_size < MIN_VOCAB_SIZE:
        return []
    ranked = zipf_counts(vocab_size) if counts is None else counts.to("cpu", torch.float64)
    covered = ranked.clamp(min=1).cumsum(0)
    shares = covered.new_tensor(COVERAGE) * covered[-1]
    ids = (torch.searchsorted(covered, shares) + 1).tolist()
    return sorted({cutoff for cutoff in ids if cutoff < vocab_size})


def resolve_tail_sizes(
    hidden_size: int, num_tails: int, div_value: float, min_tail_size: int
) -> list[int]:
    """Width of each tail: `max(min_tail_size, int(hidden_size // div_value**i))`, i from 1.

    Raises:
        ValueError: If `div_value` is below 1 or a tail would have no width.
    """
    if not div_value >= 1:
        raise ValueError(f"div_value must be at least 1, got {div_value}")
    sizes = [max(min_tail_size, int(hidden_size // div_value**i)) for i in range(1, num_tails + 1)]
    if any(size < 1 for size in sizes):
        raise ValueError(
            f"tail widths {sizes} of hidden_size={hidden_size} and div_value={div_value}"
            f" must be at least 1: lower div_value or raise min_tail_size={min_tail_size}"
        )
    return sizes
