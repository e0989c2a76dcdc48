"""Text that is read as it comes, in shards, without a copy on this machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa

from lm_softmax.corpus.rows import Rows, valid_text

_ROWS = 256  # of a piece: what is read again when a training resumes within it


@dataclass(frozen=True)
class Stream:
    """The rows of one split of a corpus that is streamed.

    Attributes:
        data: Of the `datasets` library.
        column: Of the text.
        fingerprint: Changes with the contents, as far as can be told without reading them.
        described: What to call it in messages.
        files: Local files that the rows may come from.
        failure: What to say of an error of the library.
    """

    data: datasets.IterableDataset
    column: str
    fingerprint: str
    described: str
    files: Callable[[], Iterator[Path]]
    failure: Callable[[Exception], str]

    def __post_init__(self) -> None:
        with self._told():
            first = next(self._tables(self.data), None)
        if first is None:
            raise ValueError(f"{self.described} is empty")
        if self.column not in first.column_names:
            raise ValueError(
                f"no {self.described}: its columns are {', '.join(first.column_names)}"
            )
        kind = first.schema.field(self.column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{self.described} holds {kind}, not text")

    @property
    def num_shards(self) -> int:
        """Parts that can be read side by side: files, or row groups of Parquet files."""
        return int(self.data.num_shards)

    def at_least(self, num_shards: int) -> "Stream":
        """In more shards, as far as there are, where these are too few.

        Raises:
            ValueError: If they are too few then.
        """
        if self.num_shards >= num_shards:
            return self
        with self._told():
            finer = replace(self, data=self.data.reshard())
        if finer.num_shards < num_shards:
            raise ValueError(
                f"{self.described} has {finer.num_shards} shards (files, row groups of Parquet"
                f" files), too few for {num_shards} processes times workers: lower num_workers or"
                " set streaming to false"
            )
        return finer

    def rows(self) -> Rows:
        """All rows, in order."""
        pieces = partial(self._pieces, self.data)
        return Rows(pieces, None, self.fingerprint, self.described, self.files)

    def texts(self, shard: int, skip: int = 0) -> Iterator[pa.Array]:
        """The rows of a shard in `large_string` arrays without nulls.

        Args:
            shard: Which one.
            skip: Number of arrays to leave out at the start.
        """
        own = self.data.shard(num_shards=self.num_shards, index=shard)
        for piece in islice(self._pieces(own), skip, None):
            yield valid_text(piece, self.described, self.files)

    def _pieces(self, data: datasets.IterableDataset) -> Iterator[pa.Array]:
        with self._told():
            for table in self._tables(data):
                yield table.column(self.column).combine_chunks()

    def _tables(self, data: datasets.IterableDataset) -> Iterator[pa.Table]:
        return data.with_format("arrow").iter(batch_size=_ROWS)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Make one line of what the library raises for files that it cannot read."""
        try:
            yield
        except Exception as error:  # it raises all kinds
            raise ValueError(self.failure(error)) from error
