"""Words drawn from softmaxes by the inverse of running sums, a block of logits at a time.

Weights are `exp((logit - best) / temperature)`, in the dtype of the logits, at least float32; they
are summed in parts of `PART` words, and the parts in float64. A draw is a float64 uniform number
scaled to the running sum: a multiple of 2**-53, so that probabilities are kept to about 1e-16
beside the rounding of the logits.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels.dense import Matrix, dense_logits

PART = 64  # words whose weights are summed first, and searched last
BLOCK_BYTES = 2**22  # of logits that are made at once: they stay in the cache
MIN_BLOCK_WORDS = 2**12
MAX_ROWS = 2**10  # whose logits are made at once
MAX_DRAWS = 2**12  # that copy the running sums of their rows at once
FEW_WEIGHTS = 2**17  # which may be copied for each draw, and be summed in float64 at once
COLDEST = 1e-30  # a temperature below it draws as this one does, and quotients do not overflow
HOTTEST = 1e30  # above it as this one, for no probability of 0 to become a quotient of infinities


class Draws(NamedTuple):
    """What is drawn of each row: words in proportion to `p ** (1 / temperature)`."""

    num_samples: int
    temperature: float  # above 0
    top_p: float | None  # below 1: of the fewest most probable words that hold this share
    generator: torch.Generator | None  # of the rows' device

    def rows(self, like: Tensor) -> Tensor:
        """The row of each draw from `(N, ...)`, `(N * num_samples,)`."""
        if like.shape[0] == 1:
            return like.new_zeros(self.num_samples, dtype=torch.int64)
        each = torch.arange(like.shape[0], device=like.device)
        return each if self.num_samples == 1 else each.repeat_interleave(self.num_samples)

    def view(self, drawn: Tensor) -> Tensor:
        """`(N, num_samples)`."""
        return drawn.view(-1, self.num_samples)


class Words(NamedTuple):
    """The softmax of some rows over words whose logits are made block by block."""

    num_rows: int
    num_words: int
    logits: Callable[[slice], Tensor]  # of some words, (num_rows, n); may be overwritten

    def blocks(self) -> Iterator[slice]:
        """Words whose logits to make at once, in order."""
        size = BLOCK_BYTES // (4 * max(self.num_rows, 1)) // PART * PART
        size = max(size, MIN_BLOCK_WORDS)
        for start in range(0, self.num_words, size):
            yield slice(start, min(start + size, self.num_words))


def matrix_words(inputs: Tensor, matrix: Matrix, softcap: float | None) -> Words:
    """The softmax of `inputs`, which are in the dtype of the products, over a matrix's rows."""

    def logits(part: slice) -> Tensor:
        whole = part.stop - part.start == matrix.num_rows
        return dense_logits(inputs, matrix if whole else _cut(matrix, part), softcap)

    return Words(inputs.shape[0], matrix.num_rows, logits)


def _cut(matrix: Matrix, part: slice) -> Matrix:
    """Some rows of a matrix."""
    blocks, start = [], 0
    for block in matrix.blocks:
        begin = min(max(part.start - start, 0), block.shape[0])
        end = min(max(part.stop - start, 0), block.shape[0])
        blocks.append(block[begin:end])
        start += block.shape[0]
    return Matrix(blocks, None if matrix.bias is None else matrix.bias[part])


def draw_words(
    words: Words, row: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """Ids drawn in proportion to `exp(logits[row] / temperature)`, one for each entry of `row`.

    Logits are made once. A block of words takes a draw over from those before it with the
    probability that it has among them (Chao 1982, "A general purpose unequal probability sampling
    plan", for one element), so that no sum over all words is needed first.

    Args:
        words: Rows and words.
        row: `(D,)` int64, the row of each draw.
        temperature: Above 0.
        generator: Of the device of `row`.

    Raises:
        ValueError: If the logits of a row give no distribution but nan.
    """
    blocks = list(words.blocks())
    if len(blocks) == 1:
        table = words.logits(blocks[0])
        return draw(softmax_weights(table, temperature, out=table), row, generator)
    drawn = torch.zeros_like(row)
    peak: Tensor | None = None
    total = torch.zeros((), dtype=sum_dtype(row), device=row.device)
    for block in blocks:
        weights = words.logits(block)
        best = weights.amax(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).min)
        old, peak = peak, best if peak is None else torch.maximum(peak, best)
        if old is not None:
            shift = (old - peak).squeeze(1).to(total.dtype)
            total = total * _tempered(shift, temperature)
        sums = part_sums(_tempered(weights.sub_(peak), temperature))
        seen, total = total.expand(words.num_rows), total + sums.sum(1)
        position = uniform(row, generator) * total[row]
        taken = ((position < sums.sum(1)[row]) | (seen[row] == 0)).nonzero().squeeze(1)
        found = _search(weights, sums, row[taken], position[taken])
        drawn[taken] = found + block.start
    check_total(total)
    return drawn


def draw_from_logits(
    inputs: Tensor, num_words: int, logits: Callable[[Tensor, slice], Tensor], draws: Draws
) -> Tensor:
    """Ids `(N, num_samples)`, drawn from the softmax of `logits(inputs, words)`; see `draw_words`.

    Args:
        inputs: `(N, width)`.
        num_words: Number of words.
        logits: Makes those of some inputs and some words, in at least float32.
        draws: What to draw; not `top_p`.
    """
    drawn = []
    for part in torch.split(inputs, MAX_ROWS):
        words = Words(part.shape[0], num_words, partial(logits, part))
        found = draw_words(words, draws.rows(part), draws.temperature, draws.generator)
        drawn.append(draws.view(found))
    return torch.cat(drawn)


def draw(weights: Tensor, row: Tensor, generator: torch.Generator | None) -> Tensor:
    """Columns drawn in proportion to `weights[row]`, one for each entry of `row`.

    Args:
        weights: `(N, n)`, at least 0 and not all 0.
        row: `(D,)` int64.
        generator: Of the device of `row`.

    Raises:
        ValueError: If a row of weights has nan.
    """
    if row.shape[0] * weights.shape[1] <= FEW_WEIGHTS:
        of_draws = weights if row.shape[0] == 1 == weights.shape[0] else weights[row]
        running = of_draws.cumsum(1, dtype=sum_dtype(weights))
        total = running[:, -1:]
        check_total(total)
        position = uniform(total, generator).mul_(total)  # below the total, rounded or not
        return torch.searchsorted(running, position, right=True).squeeze(1)
    sums = part_sums(weights)
    total = sums.sum(1)
    check_total(total)
    return _search(weights, sums, row, uniform(row, generator) * total[row])


def log_power_sum(words: Words, temperature: float) -> Tensor:
    """`log(sum(p ** (1 / temperature)))` of the softmax of each row, `(num_rows,)` in float64."""
    peak: Tensor | None = None
    one: Tensor | None = None
    power: Tensor | None = None
    for block in words.blocks():
        logits = words.logits(block)
        best = logits.amax(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        old, peak = peak, best if peak is None else torch.maximum(peak, best)
        logits.sub_(peak)
        of_one = part_sums(logits.exp()).sum(1)
        of_power = part_sums(_tempered(logits, temperature)).sum(1)
        if old is not None and one is not None and power is not None:
            shift = (old - peak).squeeze(1).to(one.dtype)
            of_one += one * shift.exp()
            of_power += power * _tempered(shift, temperature)
        one, power = of_one, of_power
    assert one is not None
    assert power is not None
    return power.log() - one.log() / max(temperature, COLDEST)  # both are relative to the peak


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """`exp(logits / temperature)`, in place."""
    if temperature != 1:
        logits.div_(min(max(temperature, COLDEST), HOTTEST))
    return logits.exp_()


def softmax_weights(
    log_weights: Tensor, temperature: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Weights in proportion to `exp(log_weights / temperature)` of each row, at most 1."""
    if temperature == 1:
        return torch.softmax(log_weights, 1, out=out)
    peak = log_weights.amax(1, keepdim=True).clamp(min=torch.finfo(log_weights.dtype).min)
    return _tempered(torch.sub(log_weights, peak, out=out), temperature)


def part_sums(weights: Tensor) -> Tensor:
    """Sums of `PART` columns each, `(N, ceil(n / PART))`, in float64."""
    num_parts, rest = divmod(weights.shape[1], PART)
    whole = weights[:, : num_parts * PART].view(weights.shape[0], num_parts, PART).sum(2)
    if rest:
        whole = torch.cat([whole, weights[:, -rest:].sum(1, keepdim=True)], 1)
    return whole.to(sum_dtype(weights))


def sum_dtype(like: Tensor) -> torch.dtype:
    """float64, but on Apple's mps, which has none."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers from `[0, 1)`, one for each entry of `like`."""
    dtype = sum_dtype(like)
    return torch.rand(like.shape, generator=generator, dtype=dtype, device=like.device)


def check_total(total: Tensor) -> None:
    """ValueError if the sum of some row's weights is nan, or nothing."""
    least = total if total.numel() < 2 else total.amin()
    if total.numel() and not least.item() > 0:  # nan is not
        raise ValueError("hidden gives some position no distribution to draw from, but nan")


def _search(weights: Tensor, sums: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Columns in which the running sum of `weights[row]` passes each position."""
    if row.shape[0] <= MAX_DRAWS:
        return _search_some(weights, sums, row, position.unsqueeze(1))[0].squeeze(1)
    pairs = zip(torch.split(row, MAX_DRAWS), torch.split(position, MAX_DRAWS), strict=True)
    return torch.cat([_search(weights, sums, *pair) for pair in pairs])


def _search_some(
    weights: Tensor, sums: Tensor, row: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Columns `(D, 1)`, and how far each position `(D, 1)` is in them.

    Where the sums of the parts are too many to copy for each draw, they have parts themselves.
    """
    if row.shape[0] * sums.shape[1] > FEW_WEIGHTS and sums.shape[1] > PART:
        part, left = _search_some(sums, part_sums(sums), row, position)
    else:
        part, left = _first_above(sums[row], position)
    column = part * PART + torch.arange(PART, device=row.device)
    beyond = column >= weights.shape[1]
    inside = weights[row.unsqueeze(1), column.masked_fill(beyond, 0)].to(sums.dtype)
    inside.masked_fill_(beyond, 0)
    share = left / sums[row.unsqueeze(1), part]  # summed in another order it may differ a little
    found, left = _first_above(inside, share.clamp_(min=0) * inside.sum(1, keepdim=True))
    return part * PART + found, left


def _first_above(weights: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """First column whose running sum is above the position, and how far the position is in it."""
    sums = weights.cumsum(1)
    found = torch.searchsorted(sums, position, right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())  # rounding may lead past it
    found = torch.minimum(found, last).clamp(max=weights.shape[1] - 1)  # past it with nan
    return found, position - sums.gather(1, found) + weights.gather(1, found)
