"""The best words of one softmax over many words, a chunk of its logits at a time."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels.dense import Matrix, accumulation_dtype, dense_logits
from lm_softmax.kernels.ranking import BLOCK, block_maxima, by_value_and_id, merge_topk, wide_topk

SEARCH_BYTES = 2**22  # of logits that are looked through at once: they stay in the cache
SEARCH_ROWS = 256  # of hidden vectors at most that share a chunk of words


class Normaliser(NamedTuple):
    """A log-sum-exp in two parts, whose sum would round what a confident word is short of 0."""

    top: Tensor  # (N,): the largest logit
    log_sum: Tensor  # (N,): of the exponentials of what logits are above it

    def subtracted_from(self, logits: Tensor) -> Tensor:
        """Log-probabilities of logits `(N, words)`."""
        return (logits - self.top.unsqueeze(1)) - self.log_sum.unsqueeze(1)

    def __add__(self, other: tuple[object, ...]) -> "Normaliser":
        """Of the words of both."""
        assert isinstance(other, Normaliser)
        top = torch.maximum(self.top, other.top)
        shift = top.where(top != -torch.inf, 0)
        return Normaliser(
            top,
            torch.logaddexp(self.log_sum + (self.top - shift), other.log_sum + (other.top - shift)),
        )


class Best(NamedTuple):
    """The best words of a softmax by their logits, and its normaliser."""

    logits: Tensor  # (N, k)
    ids: Tensor  # (N, k)
    lse: Normaliser  # of all words

    def top(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and ids."""
        return by_value_and_id(self.lse.subtracted_from(self.logits), self.ids)


def dense_topk(
    rows: Tensor, matrix: Matrix, k: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The `k` highest log-probabilities of one softmax, equal ones by lower id, and their words.

    Equals `F.log_softmax(F.linear(rows, weight, bias), -1).topk(k)`, with softcap if there is one.
    The dtype of the products is that of `rows`; never are there more than `SEARCH_BYTES` of logits.
    """
    dtype, (weight,) = accumulation_dtype(rows.dtype), matrix.blocks

    def chunks(part: Tensor) -> Iterator[Tensor]:
        size = chunk_words(part.shape[0], dtype)
        for start in range(0, weight.shape[0], size):
            bias = None if matrix.bias is None else matrix.bias[start : start + size]
            yield dense_logits(part, Matrix([weight[start : start + size]], bias), softcap)

    found = [best_of_chunks(chunks(part), part, k) for part in torch.split(rows, SEARCH_ROWS)]
    values, ids = zip(*map(Best.top, found), strict=True)
    return torch.cat(values), torch.cat(ids)


def chunk_words(num_rows: int, dtype: torch.dtype) -> int:
    """Words per chunk."""
    size = SEARCH_BYTES // (dtype.itemsize * max(num_rows, 1))
    return max(size // BLOCK * BLOCK, 16 * BLOCK)


def best_of_chunks(chunks: Iterable[Tensor], rows: Tensor, k: int) -> Best:
    """The best of logits `(N, words)` that come chunk by chunk; they are overwritten.

    Only rows whose largest logit of a chunk is above their k-th best so far look further.
    """
    dtype = accumulation_dtype(rows.dtype)
    values = rows.new_empty(len(rows), 0, dtype=dtype)
    ids = rows.new_empty(len(rows), 0, dtype=torch.int64)
    lse, start = None, 0
    for logits in chunks:
        maxima = block_maxima(logits) if start or logits.shape[1] > 4 * k * BLOCK else None
        size = min(k, logits.shape[1])
        if values.shape[1] < k:
            more, places = wide_topk(logits, size, maxima)
            top = more[:, 0]
            values, ids = merge_topk(values, ids, more, places + start, k)
        else:
            assert maxima is not None
            top = maxima.amax(1)
            hit = (~(top <= values[:, -1])).nonzero().squeeze(1)  # nan is above
            if len(hit):
                more, places = wide_topk(logits[hit], size, maxima[hit])
                found = merge_topk(values[hit], ids[hit], more, places + start, k)
                values[hit], ids[hit] = found
        of_chunk = normaliser(logits, top)
        lse = of_chunk if lse is None else lse + of_chunk
        start += logits.shape[1]
    if lse is None:  # no words at all
        none = rows.new_full((rows.shape[0],), -torch.inf, dtype=dtype)
        lse = Normaliser(none, none)
    return Best(values, ids, lse)


def normaliser(logits: Tensor, top: Tensor) -> Normaliser:
    """`logits.logsumexp(1)`, given the largest ones; the logits become probabilities.

    The probability of the largest is the inverse of a sum of at least 1. The fused softmax takes
    half the time of `torch.logsumexp`.
    """
    torch.softmax(logits, 1, out=logits)
    log_sum = -logits.amax(1).log()
    return Normaliser(top, log_sum.masked_fill(top == -torch.inf, 0))
