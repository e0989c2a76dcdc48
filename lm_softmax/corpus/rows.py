"""Rows of text in bounded batches, and what to say of text that is not UTF-8."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lm_softmax.vocab import one_line

COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst", ".lz4"})
ROWS_AT_ONCE = 1000  # of a file that is read
BINARY = COMPRESSED | {".parquet", ".arrow"}


@dataclass(frozen=True)
class Rows:
    """The rows of text of one split.

    Attributes:
        pieces: Reads them from the first on, in arrays of bounded size; not from mapped files,
            whose pages would count as memory of this process.
        num_rows: How many there are, missing ones among them; None where nobody knows.
        fingerprint: Changes with the contents; for files here, with their names, sizes, places on
            the disk and times of change.
        described: What to call it in messages.
        files: The local files that the rows may come from.
    """

    pieces: Callable[[], Iterable[pa.Array]]
    num_rows: int | None
    fingerprint: str
    described: str
    files: Callable[[], Iterable[Path]]

    def batches(self, max_bytes: int) -> Iterator[pa.Array]:
        """`large_string` arrays of whole rows, of about `max_bytes` or one longer row.

        Raises:
            ValueError: If a row is not UTF-8.
        """
        pending: list[pa.Array] = []
        size = 0
        for piece in self._pieces(max_bytes):
            pending.append(piece)
            size += pc.sum(pc.binary_length(piece)).as_py()
            if size >= max_bytes:
                yield pa.concat_arrays(pending)
                pending, size = [], 0
        if pending:
            yield pa.concat_arrays(pending)

    def _pieces(self, max_bytes: int) -> Iterator[pa.Array]:
        for chunk in self.pieces():
            rows = valid_text(chunk, self.described, self.files)
            if len(rows) == 0:
                continue
            ends = np.cumsum(pc.binary_length(rows).to_numpy())
            cuts = np.searchsorted(ends, np.arange(max_bytes, ends[-1], max_bytes)) + 1
            edges = [0, *np.unique(cuts[cuts < len(rows)]).tolist(), len(rows)]
            for begin, end in pairwise(edges):
                yield rows[begin:end]


def valid_text(piece: pa.Array, described: str, files: Callable[[], Iterable[Path]]) -> pa.Array:
    """A `large_string` array of what there is in a piece.

    Raises:
        ValueError: If it is not UTF-8; with the first of the files that is not, if one is to blame.
    """
    rows = piece.drop_null().cast(pa.large_string())
    try:
        rows.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(
            not_utf8(files()) or f"{described} is not UTF-8: {one_line(error)}"
        ) from error
    return rows


def read_column(data: datasets.Dataset, name: str, begin: int, end: int) -> Iterator[pa.Array]:
    """The rows from `begin` to `end` of a column, from the files that `datasets` made, if any."""
    files = [file["filename"] for file in data.cache_files]
    if not files:
        yield from data.data.column(name).slice(begin, end - begin).chunks
        return
    at = 0  # the first row of the next batch
    for file in files:
        with pa.OSFile(file) as stream:
            for batch in pa.ipc.open_stream(stream):
                first, last = max(begin - at, 0), min(end - at, len(batch))
                at += len(batch)
                if first < last:
                    yield batch.column(name)[first:last]
                if at >= end:
                    return


def not_utf8(files: Iterable[Path]) -> str | None:
    """One line that names the first of the files with a byte that is not UTF-8, if any has one."""
    for file in files:
        offset = _first_bad_byte(file)
        if offset is not None:
            return f"file {str(file)!r} is not UTF-8: see byte {offset}"
    return None


def _first_bad_byte(file: Path) -> int | None:
    """Offset of the first byte that is not UTF-8; None if there is none, or for binary formats."""
    if not file.is_file() or BINARY & set(file.suffixes):
        return None
    decoder: Any = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with file.open("rb") as stream:
        while True:
            chunk = stream.read(2**20)
            held = len(decoder.getstate()[0])  # the beginning of a character, from the chunk before
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return done - held + error.start
            done += len(chunk)
            if not chunk:
                return None
