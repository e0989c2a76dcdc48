"""Where the clusters of an adaptive softmax begin, and how wide each is."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lm_softmax.heads.cost_model import (
    MAX_TAILS,
    CostModel,
    Device,
    cost_model_of,
    optimal_cutoffs,
)

DIV_VALUE, AUTO_DIV_VALUE = 4.0, 2.0  # of given cutoffs, as in torch, and of "auto"


def zipf_counts(vocab_size: int) -> Tensor:
    """Counts of `vocab_size` ranked words under Zipf's law with exponent 1, float64."""
    return vocab_size / torch.arange(1, vocab_size + 1, dtype=torch.float64, device="cpu")


def resolve_clusters(
    cutoffs: Literal["auto"] | Sequence[int],
    hidden_size: int,
    vocab_size: int,
    counts: Tensor | None = None,
    *,
    div_value: float | None = None,
    min_tail_size: int = 16,
    tail_sizes: Sequence[int] | None = None,
    cost_model: Device | CostModel = "cpu",
) -> tuple[list[int], list[int]]:
    """The ids at which tail clusters begin, strictly increasing, and the width of each tail.

    `"auto"` is `optimal_cutoffs` with 0 to `MAX_TAILS` tails, or as many as `tail_sizes` has.
    Counts of 0 count as 1; without `counts` Zipf's law with exponent 1 is assumed.

    Up to four tails whose widths fall by 2 span the widths of two that fall by 4, in finer steps,
    and a first tail of half the width makes up for the shorter short-list that is the fastest.

    Args:
        cutoffs: `"auto"`, or the ids themselves; a last id equal to `vocab_size` is dropped.
        hidden_size: Width of the short-list; of an embedding, the width of its frequent words.
        vocab_size: Number of words.
        counts: Training-set frequency of each word by rank, `(vocab_size,)`.
        div_value: Tail i, from 1, is `hidden_size // div_value**i` wide; 2 for "auto" and 4 for
            given cutoffs unless it is said.
        min_tail_size: No tail is narrower.
        tail_sizes: The widths themselves, instead of the two options before.
        cost_model: The device that the shortest step is predicted for, or its constants.

    Raises:
        ValueError: If the ids are not strictly increasing inside `(0, vocab_size)`, or widths are
            impossible.
    """
    if div_value is None:
        div_value = AUTO_DIV_VALUE if cutoffs == "auto" else DIV_VALUE
    model = cost_model if isinstance(cost_model, CostModel) else cost_model_of(cost_model)
    if isinstance(cutoffs, str) and cutoffs == "auto":
        if tail_sizes is None:
            resolve_tail_sizes(hidden_size, 1, div_value, min_tail_size)  # one at least is possible
            widths = [
                _tail_sizes(hidden_size, num_tails, div_value, min_tail_size)
                for num_tails in range(MAX_TAILS + 1)
            ]
            widths = [sizes for sizes in widths if all(size >= 1 for size in sizes)]
        else:
            widths = [_checked_tail_sizes(tail_sizes, len(tail_sizes))]
        ranked = zipf_counts(vocab_size) if counts is None else counts
        ids = optimal_cutoffs(model, hidden_size, ranked, widths).cutoffs
    else:
        ids = resolve_cutoffs(cutoffs, vocab_size)
    if tail_sizes is None:
        return ids, resolve_tail_sizes(hidden_size, len(ids), div_value, min_tail_size)
    return ids, _checked_tail_sizes(tail_sizes, len(ids))


def resolve_tail_sizes(
    hidden_size: int, num_tails: int, div_value: float, min_tail_size: int
) -> list[int]:
    """Width of each tail: `max(min_tail_size, int(hidden_size // div_value**i))`, i from 1.

    Raises:
        ValueError: If `div_value` is below 1 or a tail would have no width.
    """
    _check_div_value(div_value)
    sizes = _tail_sizes(hidden_size, num_tails, div_value, min_tail_size)
    if any(size < 1 for size in sizes):
        raise ValueError(
            f"tail widths {sizes} of hidden_size={hidden_size} and div_value={div_value}"
            f" must be at least 1: lower div_value or raise min_tail_size={min_tail_size}"
        )
    return sizes


def _tail_sizes(
    hidden_size: int, num_tails: int, div_value: float, min_tail_size: int
) -> list[int]:
    return [max(min_tail_size, int(hidden_size // div_value**i)) for i in range(1, num_tails + 1)]


def _check_div_value(div_value: float) -> None:
    if not div_value >= 1:
        raise ValueError(f"div_value must be at least 1, got {div_value}")


def resolve_cutoffs(cutoffs: Sequence[int] | str, vocab_size: int) -> list[int]:
    """Cutoffs that are given, without a last one that is the size of the vocabulary.

    Raises:
        ValueError: If they are not whole numbers, strictly increasing inside `(0, vocab_size)`.
    """
    if isinstance(cutoffs, str) or not isinstance(cutoffs, Sequence):
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


def _checked_tail_sizes(tail_sizes: Sequence[int], num_tails: int) -> list[int]:
    """Widths that were given."""
    if len(tail_sizes) != num_tails or any(
        not isinstance(size, int) or size < 1 for size in tail_sizes
    ):
        raise ValueError(
            f"tail_sizes of {num_tails} tails must be {num_tails} widths of at least 1,"
            f" got {list(tail_sizes)}"
        )
    return list(tail_sizes)
