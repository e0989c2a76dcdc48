"""Rows of batches from the text of shards, read in order and gone on with from any position."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_softmax.corpus import Stream
from lm_softmax.data.batching import IGNORED
from lm_softmax.vocab import Vocab

RUN_BLOCKS = 32  # blocks of text that a row takes from its worker, one after the other


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
