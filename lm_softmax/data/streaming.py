"""Batches of a stream: of shards that ranks and workers share, each making its rows."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lm_softmax.corpus import Stream
from lm_softmax.data.batching import TokenBatch
from lm_softmax.data.stream_rows import Reader, RowMaker
from lm_softmax.vocab import Vocab

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
