"""The best words of rows of logits or log-probabilities, equal ones by lower id."""

import torch
from torch import Tensor

LARGEST_K = 1024  # beyond, the log-probabilities of all words are ranked sooner than searched
SORTED = 2**10  # up to so many values sorting all takes less time than the calls it saves
WIDE = 2**14  # up to so many values blocks are not worth their calls
BLOCK = 64  # columns of one maximum: a maximum of blocks costs far less than torch.topk of a row


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.sort(stable=True, descending=True)` of `(N, V)` cut after `k`: values and columns.

    `torch.topk` leaves open which of equal values it takes.
    """
    if k == 1:  # which gives the first place of several
        largest, place = values.max(-1, keepdim=True)
        return largest, place
    if values.numel() <= SORTED:
        best, indices = values.sort(stable=True, dim=-1, descending=True)
        return best[:, :k], indices[:, :k]
    best, indices = values.topk(k, -1)
    tied = (values >= best[:, -1:]).sum(-1) > k
    if tied.any():  # of the words equal to the k-th best the lowest ids belong in
        order = values[tied].sort(stable=True, dim=-1, descending=True)
        best[tied], indices[tied] = order.values[:, :k], order.indices[:, :k]
    return by_value_and_id(best, indices)


def block_maxima(values: Tensor) -> Tensor:
    """Largest value of each `BLOCK` columns of `(N, V)`, the last ones being fewer."""
    num_columns = values.shape[1]
    whole = num_columns - num_columns % BLOCK
    maxima = values[:, :whole].reshape(len(values), whole // BLOCK, BLOCK).amax(2)
    if whole == num_columns:
        return maxima
    return torch.cat([maxima, values[:, whole:].amax(1, keepdim=True)], 1)


def wide_topk(values: Tensor, k: int, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`stable_topk` of many columns: only the k blocks of largest maxima can hold the k best.

    Of blocks of equal maxima the first do, since their words come first.
    """
    num_columns = values.shape[1]
    if num_columns <= 4 * k * BLOCK or values.numel() <= WIDE:
        return stable_topk(values, k)
    maxima = block_maxima(values) if maxima is None else maxima
    blocks = stable_topk(maxima, k)[1].sort(1).values
    columns = blocks.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=values.device)
    columns = columns.flatten(1)
    beyond = columns >= num_columns
    found = values.gather(1, columns.masked_fill(beyond, 0)).masked_fill_(beyond, -torch.inf)
    best, places = stable_topk(found, k)
    return best, columns.gather(1, places)


def by_value_and_id(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`(N, k)` in order: logits that differ may round to log-probabilities that do not."""
    if values.shape[1] == 1:
        return values, ids
    ids, by_id = ids.sort(1)
    values, by_value = values.gather(1, by_id).sort(stable=True, dim=1, descending=True)
    return values, ids.gather(1, by_value)


def merge_topk(
    values: Tensor, ids: Tensor, more: Tensor, more_ids: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The `k` best of two lists `(N, ...)`, equal values from the first list first.

    That is by lower id, if both are sorted so and no id of the first is above one of the second.
    """
    both = torch.cat([values, more], 1)
    best, order = both.sort(stable=True, dim=-1, descending=True)
    return best[:, :k], torch.cat([ids, more_ids], 1).gather(1, order[:, :k])
