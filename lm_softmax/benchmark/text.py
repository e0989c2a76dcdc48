"""From rows of text to token ids: this package, and the `tokenizers` library, on the same rows."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import WordLevelTrainer

from lm_softmax.benchmark.memory import MIB, read_status
from lm_softmax.benchmark.processes import in_new_process
from lm_softmax.corpus import Corpus, Source

UNK, EOS = "<unk>", "<eos>"
_ROWS = 1000  # that the library is handed at a time


class Seconds(NamedTuple):
    """Of one pass over the rows for the vocabulary, and one for the ids."""

    counting: float
    encoding: float

    @property
    def both(self) -> float:
        """Their sum."""
        return self.counting + self.encoding


class Pipeline(ABC):
    """Makes a vocabulary of white-space tokens and encodes the text with it."""

    what: str

    @abstractmethod
    def run(self) -> Seconds:
        """All of it once more, from the rows."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """How often each token occurs, without `<eos>` and `<unk>`; after `run`."""


class Ours(Pipeline):
    """`Corpus`, from the files of `datasets` to a token file.

    Args:
        source: The text.
        num_proc: Cores; all if None.
        folder: For the files, made anew in each run.
    """

    what = "lm_softmax.corpus.Corpus, from the files of datasets to a token file"

    def __init__(self, source: Source, num_proc: int | None, folder: Path) -> None:
        self._source, self._num_proc, self._folder = source, num_proc, folder

    def run(self) -> Seconds:
        """See `Pipeline.run`."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._corpus = Corpus(
            self._source, "whitespace", cache_dir=str(self._folder), num_proc=self._num_proc
        )
        self._source.rows("train")  # loaded before the clock starts
        start = perf_counter()
        assert self._corpus.vocab
        counted = perf_counter()
        self._corpus.tokens("train")
        return Seconds(counted - start, perf_counter() - counted)

    def counts(self) -> dict[str, int]:
        """See `Pipeline.counts`."""
        vocab = self._corpus.vocab
        known = dict(zip(vocab.tokens, vocab.counts.tolist(), strict=True))
        return {token: count for token, count in known.items() if token not in (EOS, UNK)}


class Peer(Pipeline):
    """`tokenizers`: a WordLevel model, trained and used as its documentation says.

    Its rows are strings of Python before the clock starts, and its ids are not written.

    Args:
        rows: The text.
    """

    what = "tokenizers: WhitespaceSplit, WordLevelTrainer, encode_batch_fast, from rows in memory"

    def __init__(self, rows: list[str]) -> None:
        self._rows = rows

    def run(self) -> Seconds:
        """See `Pipeline.run`."""
        start = perf_counter()
        self._tokenizer = tokenizers.Tokenizer(WordLevel(unk_token=UNK))
        self._tokenizer.pre_tokenizer = WhitespaceSplit()
        trainer = WordLevelTrainer(
            vocab_size=2**31, min_frequency=0, special_tokens=[UNK], show_progress=False
        )
        self._tokenizer.train_from_iterator(self._pieces(), trainer)
        counted = perf_counter()
        for piece in self._pieces():
            self._tokenizer.encode_batch_fast(piece, add_special_tokens=False)
        return Seconds(counted - start, perf_counter() - counted)

    def counts(self) -> dict[str, int]:
        """See `Pipeline.counts`; by encoding, since the trainer tells none."""
        seen = np.zeros(self._tokenizer.get_vocab_size(), np.int64)
        for piece in self._pieces():
            for row in self._tokenizer.encode_batch_fast(piece, add_special_tokens=False):
                np.add.at(seen, np.array(row.ids, np.int64), 1)
        names = self._tokenizer.get_vocab()
        return {token: int(seen[i]) for token, i in names.items() if token not in (EOS, UNK)}

    def _pieces(self) -> Iterator[list[str]]:
        for begin in range(0, len(self._rows), _ROWS):
            yield self._rows[begin : begin + _ROWS]


def read_rows(source: Source) -> list[str]:
    """All rows of train as strings of Python."""
    batches = source.rows("train").batches(2**24)
    return [row for batch in batches for row in batch.to_pylist()]


def peak_memory(source: Source, num_proc: int | None, folder: Path) -> float:
    """High-water mark of the resident memory of a new process that does the same as `Ours`, in MiB.

    Libraries and the loading of the rows are in it.

    Raises:
        RuntimeError: If the system tells no high-water mark, or the process was killed.
    """
    try:
        return in_new_process(_peak_here, replace(source), num_proc, folder)
    except OSError as error:
        raise RuntimeError(f"no high-water mark of memory: {error}") from None


def _peak_here(source: Source, num_proc: int | None, folder: Path) -> float:
    """What the new process does."""
    Ours(source, num_proc, folder).run()
    return read_status("VmHWM") / MIB


def difference(ours: dict[str, int], peers: dict[str, int]) -> str:
    """In what two counts differ, on one line; empty if they do not."""
    if ours == peers:
        return ""
    tokens = sorted(t for t in {*ours, *peers} if ours.get(t) != peers.get(t))
    shown = ", ".join(f"{t!r} {ours.get(t, 0)} and {peers.get(t, 0)}" for t in tokens[:3])
    return f"{len(tokens)} of {len({*ours, *peers})} tokens are counted differently: {shown}"
