"""Corpora as files of token ids: counted and encoded once, then memory-mapped."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from numpy.typing import NDArray

from lm_softmax.corpus.rows import Rows
from lm_softmax.corpus.source import Source
from lm_softmax.corpus.token_file import TokenFile, TokenWriter
from lm_softmax.corpus.work import each_batch
from lm_softmax.vocab import Counts, SymbolCounter, Vocab, check_folding, load_tokenizer, one_line

log = logging.getLogger(__name__)
_FORMAT = 3  # part of every key: raise it when the contents of the files change


class SplitStats(NamedTuple):
    """What a split holds.

    Attributes:
        num_tokens: Tokens, `<eos>` among them.
        num_unk: Tokens that are `<unk>`.
        num_bytes: Bytes of the text in UTF-8, with a line end for each row.
        unigram_nats: Negative log-likelihood of all tokens under the unigram model of the
            vocabulary, `p(i) = (counts[i] + 1) / (counts.sum() + vocab_size)`, summed, in nats.
    """

    num_tokens: int
    num_unk: int
    num_bytes: int
    unigram_nats: float


@dataclass(frozen=True)
class Corpus:
    """The vocabulary of a source and its splits as token files, built once and kept.

    The vocabulary comes from train, in one pass; a split is encoded when it is first asked for.
    Files are kept under a hash of all that they depend on: the fingerprint of the rows (of local
    files: names, sizes, inodes and times of change, so that a file written again is another),
    tokenizer or vocabulary, limits and this format. Processes that ask at the same time wait for
    the first one (a lock in the cache folder); what is half-written is never seen, since folders
    are renamed when complete.

    Args:
        source: The text.
        tokenizer: See `load_tokenizer`.
        max_vocab_size: See `Vocab.build`.
        min_count: See `Vocab.build`.
        vocab_path: A vocabulary or checkpoint to take the vocabulary from, with its tokenizer.
            Nothing is counted then, and train need not exist.
        cache_dir: Folder of the files; the environment variable LM_SOFTMAX_CACHE or
            `~/.cache/lm_softmax` if None.
        vocab_tokens: Tokens from the beginning of train that a stream's vocabulary is counted from;
            a copy on this machine is counted as a whole.
        num_proc: Cores that count and encode, all that there are if None; what comes out is the
            same for any number.
    """

    source: Source
    tokenizer: str = "words"
    max_vocab_size: int | None = None
    min_count: int = 1
    vocab_path: str | None = None
    cache_dir: str | None = None
    vocab_tokens: int = 10**8
    num_proc: int | None = None

    def __post_init__(self) -> None:
        check_folding(self.max_vocab_size, self.min_count)

    @cached_property
    def vocab(self) -> Vocab:
        """The vocabulary.

        Raises:
            ValueError: If the corpus, the tokenizer or the vocabulary file cannot be read.
        """
        if self.vocab_path is not None:
            return Vocab.load(self.vocab_path)
        tokenizer = load_tokenizer(self.tokenizer)
        rows = self.source.rows("train")
        limits = [self.max_vocab_size, self.min_count]
        most = self.vocab_tokens if self.source.streaming else 2**63
        limits += [most] if self.source.streaming else []
        folder = self._folder("vocab", [rows.fingerprint, tokenizer.state_dict(), *limits])

        def build(target: Path) -> None:
            spilled = target / "counts"
            spilled.mkdir()
            counter = SymbolCounter(spilled)

            def count(batch: pa.Array) -> tuple[Counts, int]:
                symbols = tokenizer.symbols(batch)
                return Counts.of(symbols), len(symbols)

            size, room = tokenizer.batch_bytes, most
            for batch, counts in each_batch(rows, count, size, "counting train", self.num_proc):
                if counts.total > room:
                    counts = Counts.of(tokenizer.symbols(batch)[:room])
                counter.update(counts)
                room -= counts.total
                if room == 0:
                    break
            Vocab.build(
                tokenizer,
                counter,
                max_vocab_size=self.max_vocab_size,
                min_count=self.min_count,
            ).save(target / "vocab.pt")
            shutil.rmtree(spilled)

        _build_once(folder, build, lambda made: Vocab.load(made / "vocab.pt"))
        pa.default_memory_pool().release_unused()  # what building it took, which Arrow keeps
        return Vocab.load(folder / "vocab.pt")

    def tokens(self, split: str) -> TokenFile:
        """Token ids of a split.

        Raises:
            ValueError: If the corpus cannot be read, or lacks the split.
        """
        return TokenFile(self._encoded(split))

    def stats(self, split: str) -> SplitStats:
        """What a split holds; it is encoded if need be."""
        return SplitStats(**self.tokens(split).about["stats"])

    def _encoded(self, split: str) -> Path:
        rows = self.source.rows(split)
        vocab = self.vocab.fingerprint
        folder = self._folder("tokens", [rows.fingerprint, vocab])

        def build(target: Path) -> None:
            _encode(rows, self.vocab, target / "tokens.bin", f"encoding {split}", self.num_proc)

        def check(made: Path) -> None:
            if (found := TokenFile(made / "tokens.bin").about["vocab"]) != vocab:
                raise ValueError(f"{made} holds ids of the vocabulary {found}, not of {vocab}")

        _build_once(folder, build, check)
        return folder / "tokens.bin"

    def _folder(self, kind: str, depends_on: list[Any]) -> Path:
        key = json.dumps([_FORMAT, *depends_on]).encode()
        cache = self.cache_dir or os.environ.get("LM_SOFTMAX_CACHE") or "~/.cache/lm_softmax"
        digest = hashlib.blake2b(key, digest_size=16).hexdigest()
        return Path(cache).expanduser() / f"{kind}-{digest}"


def _encode(rows: Rows, vocab: Vocab, file: Path, label: str, num_proc: int | None) -> None:
    """Write the ids of all rows, and count them on the way."""
    seen = np.zeros(len(vocab), np.int64)
    num_bytes = 0
    vocab.encode("")  # its table is there before threads ask for it
    with TokenWriter(file, len(vocab)) as writer:

        def encode(batch: pa.Array) -> tuple[NDArray[Any], int]:
            ids = vocab.encode_rows(batch).astype(writer.dtype)
            return ids, len(ids)

        size = vocab.tokenizer.batch_bytes
        for batch, ids in each_batch(rows, encode, size, label, num_proc):
            writer.append(ids)
            np.add.at(seen, ids, 1)
            open_ended = pc.invert(pc.ends_with(batch, "\n"))
            num_bytes += pc.sum(pc.binary_length(batch)).as_py() + pc.sum(open_ended).as_py()
        counts = vocab.counts.numpy()
        nats = counts + 1.0  # in place from here on: a vocabulary may have millions
        np.log(nats, out=nats)
        np.subtract(np.log(counts.sum() + len(counts)), nats, out=nats)
        nats *= seen
        stats = SplitStats(
            num_tokens=int(seen.sum()),
            num_unk=0 if vocab.unk_id is None else int(seen[vocab.unk_id]),
            num_bytes=num_bytes,
            unigram_nats=float(nats.sum()),
        )
        writer.about = {"vocab": vocab.fingerprint, "stats": stats._asdict()}


def _build_once(
    folder: Path, build: Callable[[Path], None], check: Callable[[Path], object]
) -> None:
    """Make a folder that exists either complete or not at all, in one of all processes.

    Args:
        folder: What to make.
        build: Makes it in another place.
        check: Raises ValueError or OSError for one that is damaged or foreign: it is made again.

    Raises:
        ValueError: If the disk refuses.
    """
    if folder.exists() and _fault(folder, check) is None:
        return
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                if (fault := _fault(folder, check)) is None:
                    return
                log.warning(f"{fault}; making it again")
                shutil.rmtree(folder)
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            try:
                build(partial)
                partial.rename(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise ValueError(
            f"cannot write to the cache folder {str(folder.parent)!r}: {one_line(error)}; name"
            " another by cache_dir or LM_SOFTMAX_CACHE"
        ) from error


def _fault(folder: Path, check: Callable[[Path], object]) -> str | None:
    try:
        check(folder)
    except (OSError, ValueError) as error:
        return one_line(error)
    return None
