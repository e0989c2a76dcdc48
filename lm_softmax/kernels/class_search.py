"""The most probable words of a two-level softmax, most probable classes first.

The log-probability of a class bounds those of its words. Each row opens its classes in falling
order, a few more each time, until the next one is below its k-th best word. The words of all open
pairs of row and class are one flat list.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels.draws import sum_dtype
from lm_softmax.kernels.paths import row_products
from lm_softmax.kernels.tree_search import best_of_rows

MOST = 8  # a row that would open more than this part of all words is ranked as a whole sooner
FIRST = 2  # classes that every row opens at least


class Classes(NamedTuple):
    """Class c has the words from `starts[c]` to `starts[c + 1]`."""

    weight: Tensor  # (V, width)
    bias: Tensor | None  # (V,)
    starts: Tensor  # (C + 1,)


def class_topk(
    rows: Tensor, classes: Classes, masses: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `k` words of highest log-probability of each row, equal ones by lower id.

    Args:
        rows: `(N, width)`.
        classes: The words, in the dtype of `rows`, which must be that of the products.
        masses: `(N, C)`, log-probability of each class.
        k: Number of words.

    Returns:
        Log-probabilities `(N, k)` and ids `(N, k)`; which rows `(N,)` were given up, since they
        would open too many words or met nan; how many classes each row opened `(N,)`.
    """
    num, num_classes = masses.shape
    sizes = classes.starts.diff()
    falling = masses.sort(1, descending=True)
    values = masses.new_full((num, k), -torch.inf)
    ids = torch.zeros(num, k, dtype=torch.int64, device=rows.device)
    failed = ~masses.isfinite().all(1)
    opened, words = torch.zeros_like(ids[:, 0]), torch.zeros_like(ids[:, 0])
    place, step = 0, FIRST
    while place < num_classes:
        part = slice(place, place + step)
        opens = (falling.values[:, part] >= values[:, -1:]) & ~failed.unsqueeze(1)
        words += (sizes[falling.indices[:, part]] * opens).sum(1)
        failed |= words * MOST > classes.weight.shape[0]
        opens &= ~failed.unsqueeze(1)
        row, column = opens.nonzero().unbind(1)
        if not row.shape[0]:
            break
        opened += opens.sum(1)
        of_row, mass = falling.indices[row, place + column], falling.values[row, place + column]
        found_row, found_id, found = _open(rows, classes, row, of_row, mass)
        failed[found_row[found.isnan()]] = True
        better = found >= values[found_row, -1]
        every = torch.arange(num, device=rows.device).repeat_interleave(k)
        values, ids = best_of_rows(
            torch.cat([every, found_row[better]]),
            torch.cat([ids.flatten(), found_id[better]]),
            torch.cat([values.flatten(), found[better]]),
            num,
            k,
        )
        place, step = place + step, 2 * step
    failed |= values[:, -1] == -torch.inf  # there may be words among these that were not seen
    return values, ids, failed, opened


def _open(
    rows: Tensor, classes: Classes, row: Tensor, of_row: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, id and log-probability of all words of pairs of row and class; `row` must not fall."""
    first, counts = classes.starts[of_row], classes.starts.diff()[of_row]
    ends = counts.cumsum(0)
    pair = torch.repeat_interleave(torch.arange(len(row), device=row.device), counts)
    word = torch.arange(len(pair), device=row.device) + (first - (ends - counts))[pair]
    logit = row_products(rows, classes.weight, row[pair], word)
    if classes.bias is not None:
        logit = logit + classes.bias[word]
    top = mass.new_full(row.shape, -torch.inf).scatter_reduce(0, pair, logit, "amax")
    logit = logit - top[pair]
    # added one by one: in float32 a class of 20,000 words would be 1e-4 off
    total = torch.zeros_like(mass, dtype=sum_dtype(mass)).index_add_(
        0, pair, logit.exp().to(sum_dtype(mass))
    )
    log_sum = total.log().to(mass.dtype)
    return row[pair], word, mass[pair] + (logit - log_sum[pair])
