"""Batches of a stream: contiguous streams of text from shards that ranks and workers share."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lm_softmax.corpus import Stream
from lm_softmax.data.batching import IGNORED, TokenBatch
from lm_softmax.vocab import Vocab

RUN_BLOCKS = 32  # blocks of text that a row takes from its worker, one after the other
SAVED_EVERY = 32  # batches: a training that resumes makes fewer than that once more


class Part(NamedTuple):
    """The rows of a batch that one worker makes.

    Attributes:
        tokens: See `TokenBatch`.
        target: See `TokenBatch`.
        ahead: Batches from this one on that surely have a target in these rows.
        state: Where the worker was before it made this part; None for most parts.
        failure: What went wrong, on one line; the rest means nothing then.
    """

    tokens: Tensor
    target: Tensor
    ahead: int
    state: dict[str, Any] | None
    failure: str = ""


class Reader:
    """The text of some shards as one long row of ids, that can go on from a position.

    Args:
        stream: All shards.
        shards: Which of them.
        vocab: Encodes the text.
    """

    _shard: int
    _piece: int
    _taken: int
    _before: int
    _ids: NDArray[np.int32]

    def __init__(self, stream: Stream, shards: range, vocab: Vocab) -> None:
        self._stream, self._shards, self._vocab = stream, shards, vocab
        self.load_state_dict({"shard": 0, "piece": 0, "taken": 0, "before": vocab.eos_id})

    def take(self, number: int) -> NDArray[np.int32]:
        """The next ids and the one before them, `number + 1` in all; fewer at the end, or one."""
        parts, missing = [np.array([self._before], np.int32)], number
        while missing > 0:
            if self._taken == len(self._ids) and not self._read():
                break
            own = self._ids[self._taken : self._taken + missing]
            parts.append(own)
            self._taken += len(own)
            missing -= len(own)
        ids = np.concatenate(parts)
        self._before = int(ids[-1])
        return ids

    def state_dict(self) -> dict[str, int]:
        """Position: shard, piece of the shard, ids of the piece that were taken, last id."""
        return {
            "shard": self._shard,
            "piece": self._piece,
            "taken": self._taken,
            "before": self._before,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position."""
        self._shard, self._before, self._ids = state["shard"], state["before"], _NO_IDS
        self._taken = 0
        # the piece that was being taken is read again
        self._piece = max(0, state["piece"] - 1)
        self._pieces = self._open(self._piece)
        if state["piece"] and self._read():
            self._taken = state["taken"]

    def _open(self, skip: int) -> Iterator[Any]:
        if self._shard >= len(self._shards):
            return iter(())
        return self._stream.texts(self._shards[self._shard], skip)

    def _read(self) -> bool:
        """Encode the next piece with an id in it; False if there is none."""
        while self._shard < len(self._shards):
            for rows in self._pieces:
                self._piece += 1
                self._ids, self._taken = self._vocab.encode_rows(rows).astype(np.int32), 0
                if len(self._ids):
                    return True
            self._shard += 1
            self._piece, self._ids, self._taken = 0, _NO_IDS, 0
            self._pieces = self._open(0)
        return False


_NO_IDS = np.zeros(0, np.int32)


class RowMaker:
    """Some rows of each batch: contiguous streams, made of runs of `RUN_BLOCKS` blocks of a text.

    A row begins with `<eos>` as context alone; a run begins with the true id before it as context.
    Rows that run out of text are ignored targets from there on.

    Args:
        reader: The text.
        num_rows: Rows.
        block_size: Tokens of a row in a batch.
    """

    def __init__(self, reader: Reader, num_rows: int, block_size: int) -> None:
        self._reader, self._block_size = reader, block_size
        # of each row, inputs and targets to come
        self._rows = [np.zeros((2, 0), np.int32) for _ in range(num_rows)]

    def part(self, pad_id: int) -> tuple[Tensor, Tensor, int]:
        """Inputs, targets, and the number of batches from this one on that surely have a target."""
        tokens = np.full((len(self._rows), self._block_size), pad_id, np.int64)
        target = np.full_like(tokens, IGNORED)
        for row in range(len(self._rows)):
            self._fill(row)
        ahead = -(-max(own.shape[1] for own in self._rows) // self._block_size)
        for row, own in enumerate(self._rows):
            now, self._rows[row] = np.split(own, [self._block_size], axis=1)
            tokens[row, : now.shape[1]], target[row, : now.shape[1]] = now
        return torch.from_numpy(tokens), torch.from_numpy(target), ahead

    def state_dict(self) -> dict[str, Any]:
        """Position of the reader, and what the rows hold."""
        return {
            "reader": self._reader.state_dict(),
            "lengths": [own.shape[1] for own in self._rows],
            "rows": torch.from_numpy(np.concatenate(self._rows, axis=1)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._reader.load_state_dict(state["reader"])
        borders = np.cumsum(state["lengths"])[:-1]
        self._rows = np.split(state["rows"].numpy(), borders, axis=1)

    def _fill(self, row: int) -> None:
        parts, length = [self._rows[row]], self._rows[row].shape[1]
        while length < self._block_size:
            run = self._reader.take(RUN_BLOCKS * self._block_size)
            if len(run) == 1:
                break
            parts.append(np.stack([run[:-1], run[1:]]))
            length += len(run) - 1
        self._rows[row] = np.concatenate(parts, axis=1)


@dataclass
class StreamParts(IterableDataset[Part]):
    """Parts of the batches of one rank without end, from each worker those of its rows.

    Shards go to ranks and workers in contiguous runs of about equal number.

    Attributes:
        stream: The text.
        vocab: Encodes it.
        batch_size: Rows of a batch over all ranks.
        block_size: Tokens of a row.
        rank: Of this process.
        world_size: Number of ranks; divides `batch_size`.
        num_workers: Workers of a rank, at least 1; divides the rows of a rank.
        states: Where each worker goes on; at the beginning if None.
        num_left_out: Batches that they leave out there.
    """

    stream: Stream
    vocab: Vocab
    batch_size: int
    block_size: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 1
    states: list[dict[str, Any] | None] | None = field(init=False, default=None)
    num_left_out: int = field(init=False, default=0)

    def __iter__(self) -> Iterator[Part]:
        worker = get_worker_info()
        try:
            yield from self._parts(0 if worker is None else worker.id)
        except ValueError as error:
            if worker is None:
                raise
            nothing = torch.zeros(0)
            while True:  # a worker's own exception would come with its traceback as its message
                yield Part(nothing, nothing, 0, None, str(error))

    def _parts(self, worker: int) -> Iterator[Part]:
        number, everyone = self.rank * self.num_workers + worker, self.world_size * self.num_workers
        borders = [self.stream.num_shards * n // everyone for n in (number, number + 1)]
        reader = Reader(self.stream, range(*borders), self.vocab)
        rows = RowMaker(reader, self.batch_size // everyone, self.block_size)
        if self.states is not None and (state := self.states[worker]) is not None:
            rows.load_state_dict(state)
        for _ in range(self.num_left_out):
            rows.part(self.vocab.eos_id)
        for count in range(2**63):
            state = rows.state_dict() if count % SAVED_EVERY == 0 else None
            yield Part(*rows.part(self.vocab.eos_id), state)


class StreamLoader(DataLoader[Part]):
    """The batches of one rank, made of the parts of its workers; ends when all ranks have no text.

    Lightning saves `state_dict` in checkpoints and hands it to `load_state_dict` before the first
    batch of a resumed training.

    Args:
        parts: Of this rank.
        agree: The largest of a number over all ranks; called by all of them after the same batches.
        gather: The list of an object of each rank; likewise.
        **options: Those of a `DataLoader`.
    """

    def __init__(
        self,
        parts: StreamParts,
        agree: Callable[[int], int] = lambda number: number,
        gather: Callable[[Any], list[Any]] = lambda state: [state],
        **options: Any,
    ) -> None:
        super().__init__(parts, batch_size=None, **options)
        self._agree, self._gather = agree, gather
        self._resume_at: dict[str, Any] | None = None
        self._start(None)

    def __iter__(self) -> Iterator[TokenBatch]:  # type: ignore[override]
        parts: Any = self.dataset
        resumed, self._resume_at = self._resume_at, None
        self._start(resumed)
        parts.states = resumed and resumed["workers"]
        parts.num_left_out = resumed["given"] - resumed["at"] if resumed else 0
        iterator, surely = super().__iter__(), 0
        while True:
            batch = list(islice(iterator, parts.num_workers))
            for part in batch:
                if part.failure:
                    raise ValueError(part.failure)
            if surely == 0:
                surely = self._agree(max(part.ahead for part in batch))
            if surely == 0:
                self._ended = True
                return
            surely -= 1
            if batch[0].state is not None:
                self._saved.append((self._given, [part.state for part in batch]))
            self._given += 1
            tokens, target = (torch.cat(own) for own in zip(*(p[:2] for p in batch), strict=True))
            yield TokenBatch(tokens, target, carry=self._given > 1)

    def note_use(self) -> None:
        """Take note that a step has begun with the next batch: Lightning fetches one before."""
        self._used += 1

    def state_dict(self) -> dict[str, Any]:
        """Number of batches of this epoch that were used, and where the workers of all ranks were.

        All ranks call it, or none.
        """
        parts: Any = self.dataset
        # before the last batch, which an interrupted step may give back
        at, workers = [own for own in self._saved if own[0] < max(1, self._used)][-1]
        return {
            "given": self._used,
            "ends_at": self._given if self._ended else None,
            "at": at,
            "num_workers": parts.num_workers,
            "num_shards": parts.stream.num_shards,
            "ranks": self._gather(workers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave out the batches that were used before.

        Raises:
            ValueError: If other ranks, workers or shards made them.
        """
        parts: Any = self.dataset
        saved = (len(state["ranks"]), state["num_workers"], state["num_shards"])
        own = (parts.world_size, parts.num_workers, parts.stream.num_shards)
        if saved != own:
            raise ValueError(
                "a stream goes on with the processes, workers and shards that it was left with:"
                f" {saved[0]} x {saved[1]} with {saved[2]} shards, not {own[0]} x {own[1]} with"
                f" {own[2]}"
            )
        if state["given"] != state["ends_at"]:
            self._resume_at = {**state, "workers": state["ranks"][parts.rank]}

    def _start(self, resumed: dict[str, Any] | None) -> None:
        parts: Any = self.dataset
        self._given = self._used = resumed["given"] if resumed else 0
        self._ended = False
        # the batch that the workers' states came with, and those states
        first = (resumed["at"], resumed["workers"]) if resumed else (0, [None] * parts.num_workers)
        self._saved: deque[tuple[int, list[Any]]] = deque([first], maxlen=2)
