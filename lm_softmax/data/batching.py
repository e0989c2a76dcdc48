"""Batches of a token file: contiguous streams, or shuffled blocks; each token a target once."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lm_softmax.corpus import TokenFile

IGNORED = -100


class TokenBatch(NamedTuple):
    """What a training step gets.

    Attributes:
        tokens: Inputs, int64, shape `(batch, time)`.
        target: The token after each input, -100 where there is none to predict; same shape.
        carry: Row i continues row i of the batch before, so the encoder's state holds.
    """

    tokens: Tensor
    target: Tensor
    carry: bool


class TokenBatches(Dataset[TokenBatch], ABC):
    """The batches of one rank, by number; the same number of them on all ranks.

    Batch k of epoch e is item `e * len(self) + k`, so that the order of an epoch needs no state
    that worker processes would have to be told.

    Args:
        tokens: The split.
        eos_id: The input before the first token of a text.
        batch_size: Rows of a batch over all ranks.
        block_size: Tokens of a row.
        rank: Which share of the rows to give.
        world_size: Number of ranks; divides `batch_size`.
    """

    def __init__(
        self,
        tokens: TokenFile,
        eos_id: int,
        *,
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.tokens, self.eos_id, self.block_size = tokens, eos_id, block_size
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        rows = batch_size // world_size
        self._mine = slice(rank * rows, (rank + 1) * rows)

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which tokens a batch holds, over all ranks; the number of them does not."""
        return {
            "batching": type(self).__name__,
            "num_tokens": len(self.tokens),
            "batch_size": self.batch_size,
            "block_size": self.block_size,
        }

    def _gather(
        self, begin: NDArray[np.int64], end: NDArray[np.int64], opens: NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor]:
        """Rows of tokens as inputs and targets.

        Args:
            begin: Place of the first target of each row.
            end: Where the targets of each row end at the latest.
            opens: Whether `<eos>` is the first input, instead of the token before.
        """
        place = begin[:, None] + np.arange(-1, self.block_size)
        ids = self.tokens[place.clip(0, len(self.tokens) - 1)].astype(np.int64)
        ids[opens, 0] = self.eos_id
        there = place < end[:, None]
        target = np.where(there, ids, IGNORED)[:, 1:]
        inputs = np.where(there, ids, self.eos_id)[:, :-1]
        return torch.from_numpy(inputs), torch.from_numpy(target)


class StreamBatches(TokenBatches):
    """`batch_size` contiguous streams side by side; batch k continues batch k-1.

    The split is cut into streams whose lengths differ by one token at most. A stream begins with
    `<eos>` as context alone, and every token is a target once. Streams that end early are ignored
    targets from there on; nothing is repeated. A rank has a contiguous share of the streams.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        borders = len(self.tokens) * np.arange(self.batch_size + 1) // self.batch_size
        self._longest = int(np.diff(borders).max())
        self._begin, self._end = borders[:-1][self._mine], borders[1:][self._mine]

    def __len__(self) -> int:
        return -(-self._longest // self.block_size)

    def __getitem__(self, item: int) -> TokenBatch:
        step = item % len(self)
        begin = self._begin + step * self.block_size
        opens = np.full(len(begin), step == 0)
        return TokenBatch(*self._gather(begin, self._end, opens), carry=step > 0)


class BlockBatches(TokenBatches):
    """Blocks of `block_size` tokens, in another order each epoch, dealt to the ranks.

    The order depends on seed and epoch alone. A block begins with the true token before it (`<eos>`
    at the start of the split). Where blocks run out, rows are ignored targets throughout.

    Args:
        *args: Those of `TokenBatches`.
        seed: Of the order.
        **options: Those of `TokenBatches`.
    """

    def __init__(self, *args: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seed = seed
        self._num_blocks = -(-len(self.tokens) // self.block_size)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # of an epoch

    def __len__(self) -> int:
        return -(-self._num_blocks // self.batch_size)

    @property
    def identity(self) -> dict[str, Any]:
        """See `TokenBatches.identity`; the seed is that of the order."""
        return super().identity | {"seed": self.seed}

    def __getitem__(self, item: int) -> TokenBatch:
        epoch, step = divmod(item, len(self))
        if self._order[0] != epoch:
            self._order = (
                epoch,
                np.random.default_rng([self.seed, epoch]).permutation(self._num_blocks),
            )
        blocks = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]
        missing = np.full(self.batch_size - len(blocks), self._num_blocks + 1)  # past the end
        begin = np.concatenate([blocks, missing])[self._mine] * self.block_size
        end = np.minimum(begin + self.block_size, len(self.tokens))
        return TokenBatch(*self._gather(begin, end, begin == 0), carry=False)


class EpochSampler(DistributedSampler[int]):
    """The items of `TokenBatches` that make up an epoch, in order.

    A `DistributedSampler` by type only: the batches are those of one rank already, which Lightning
    is told by this type. It calls `set_epoch` at the start of each epoch.

    Args:
        batches: What to sample from.
    """

    def __init__(self, batches: TokenBatches) -> None:
        super().__init__(batches, num_replicas=batches.world_size, rank=batches.rank)
        self.length = len(batches)
        self.start = 0  # first batch of the epoch to give

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.length
        return iter(range(first + self.start, first + self.length))


class ResumableLoader(DataLoader[TokenBatch]):
    """A `DataLoader` over an `EpochSampler` that goes on in the midst of an epoch.

    Lightning saves `state_dict` in checkpoints and hands it to `load_state_dict` before the first
    batch of a resumed training.
    """

    _given = _resume_at = 0

    def __iter__(self) -> Iterator[TokenBatch]:  # type: ignore[override]
        # a generator: batches are not made before Lightning has set the epoch
        self._given, self._resume_at = self._resume_at, 0
        if isinstance(self.sampler, EpochSampler):  # Lightning has another one for overfitting
            self.sampler.start = self._given
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Number of batches of this epoch that were given, of how many, and cut from what."""
        return {"given": self._given, "length": len(self), "batches": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave out the batches that were given before.

        Raises:
            ValueError: In the midst of an epoch of other batches, where tokens would be left out or
                come twice.
        """
        there, here = state["batches"], self._identity
        if state["given"] % (state["length"] or 1) == 0:
            return
        if there != here:
            names = [name for name in here | there if here.get(name) != there.get(name)]
            differences = (f"{n} was {there.get(n)}, is {here.get(n)}" for n in names)
            raise ValueError(
                f"the checkpoint is in the midst of an epoch of other batches, so that text would"
                f" be left out or repeated: {', '.join(differences)}"
            )
        self._resume_at = state["given"]

    @property
    def _identity(self) -> dict[str, Any]:
        return self.dataset.identity if isinstance(self.dataset, TokenBatches) else {}
