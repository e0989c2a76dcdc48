"""Where text comes from: rows of a corpus, all of them through the `datasets` library."""

import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.arrow_writer import SchemaInferenceError
from pandas.errors import EmptyDataError  # type: ignore[import-untyped]

from lm_softmax.corpus.formats import builder_of, is_text, name_of, options_for_text, plain_text
from lm_softmax.corpus.rows import Rows, not_utf8, read_column
from lm_softmax.corpus.stdlib import NAME as STDLIB
from lm_softmax.corpus.stdlib import read_stdlib
from lm_softmax.corpus.stream import Stream
from lm_softmax.vocab import hub_reachable, is_hub_id, one_line


@dataclass(frozen=True)
class Source:
    """A corpus by name: splits of rows of text.

    Args:
        path: "python-stdlib" (the sources of Python's standard library), a local folder in the
            layout of a hub dataset or of files with text, or the id of a dataset on the Hugging
            Face Hub. Where the environment variable LM_SOFTMAX_DATA names a folder that has
            `path`, or its last component, that is taken before the hub is asked.
        name: Configuration of the dataset, such as "wikitext-2-v1".
        data_files: Files of each split instead of a dataset; names, lists or glob patterns. The
            suffix tells the format: .json, .jsonl, .csv, .parquet, and all else is text with a
            row a line. With a `path`, they are files of that dataset. In .json and .csv files here,
            numbers and dates in the column are text, and so is each cell of a .csv, "NA" too.
        text_column: Column that holds the text.
        validation_fraction: Share of the rows of train, its last ones, that become validation in
            a corpus that has no such split; 0 for none.
        streaming: Read the corpus as it comes, and keep no copy of it.
    """

    path: str = STDLIB
    name: str | None = None
    data_files: Mapping[str, str | Sequence[str]] | None = None
    text_column: str = "text"
    validation_fraction: float = 0.0
    streaming: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f"path='' names no corpus: give {STDLIB!r}, a folder or a hub id")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} is not in [0, 1)")
        if self.name is not None and self.path == STDLIB:
            raise ValueError(f"name={self.name!r} needs the path of a dataset that has such a part")
        if self.streaming and self.validation_fraction:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}, but nobody knows the number of"
                " rows of a stream: leave it at 0 and name a file for validation in data_files"
            )
        if self.streaming and self.path == STDLIB and self.data_files is None:
            raise ValueError(f"streaming=true, but {STDLIB!r} is on this machine: set it to false")

    def rows(self, split: str) -> Rows:
        """The rows of a split.

        Raises:
            ValueError: If the corpus cannot be read, or lacks the split or the column.
        """
        if self.streaming:
            return self.stream(split).rows()
        self._check_split(split, self._splits)
        data, begin, end = self._splits[split]
        what = self._column_of(split)
        if self.text_column not in data.column_names:
            raise ValueError(f"no {what}: its columns are {', '.join(data.column_names)}")
        feature = data.features[self.text_column]
        if not (is_text(feature) or isinstance(feature, datasets.Json)):
            raise ValueError(f"{what} holds {name_of(feature)}, not text")
        column = data.data.column(self.text_column).slice(begin, end - begin)
        if len(column) == column.null_count:
            raise ValueError(f"{what} is empty")

        def pieces() -> Iterator[pa.Array]:
            for piece in read_column(data, self.text_column, begin, end):
                yield plain_text(piece, what) if isinstance(feature, datasets.Json) else piece

        fingerprint = f"{data._fingerprint} {begin} {end} {self.text_column}"
        return Rows(pieces, end - begin, fingerprint, what, self._local_files)

    def stream(self, split: str) -> Stream:
        """The rows of a split as a stream of shards.

        Raises:
            ValueError: If the corpus cannot be read, or lacks the split or the column.
        """
        splits, fingerprint = self._streams
        self._check_split(split, splits)
        return Stream(
            splits[split],
            self.text_column,
            f"{fingerprint} {split} {self.text_column}",
            self._column_of(split),
            self._local_files,
            self._failure,
        )

    def _check_split(self, split: str, splits: Iterable[str]) -> None:
        if split not in splits:
            held_out = split == "validation" and not self.streaming
            hint = ", or set validation_fraction" if held_out else ""
            raise ValueError(
                f"{self._described} has no split {split!r}, only {', '.join(splits)}:"
                f" name files for it in data_files{hint}"
            )

    def _column_of(self, split: str) -> str:
        return f"column {self.text_column!r} of split {split!r} of {self._described}"

    @property
    def _described(self) -> str:
        if self.data_files is not None and self.path == STDLIB:
            return "data_files"
        return f"corpus {self.path!r}" + (f" ({self.name})" if self.name else "")

    @cached_property
    def _splits(self) -> dict[str, tuple[datasets.Dataset, int, int]]:
        """The dataset of each split, and its first and last rows there."""
        if self.path == STDLIB and self.data_files is None:
            loaded = {split: _in_memory(rows) for split, rows in read_stdlib().items()}
        else:
            loaded = dict(self._load())
        splits = {split: (data, 0, len(data)) for split, data in loaded.items()}
        if not self.validation_fraction:
            return splits
        if "validation" in splits or "train" not in splits:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}, but {self._described} has the"
                f" splits {', '.join(splits)}: leave it at 0"
            )
        train = loaded["train"]
        held_out = max(1, round(len(train) * self.validation_fraction))
        if held_out >= len(train):
            raise ValueError(
                f"validation_fraction={self.validation_fraction} leaves nothing of the"
                f" {len(train)} rows of train of {self._described}"
            )
        border = len(train) - held_out
        splits["train"] = train, 0, border
        splits["validation"] = train, border, len(train)
        return splits

    def _load(self) -> Mapping[str, datasets.Dataset]:
        with self._ready() as (path, given, here):
            if not here:
                return datasets.load_dataset(path, **given)
            splits = datasets.load_dataset(path, **given)
            data = next(iter(splits.values()))
            feature = data.features.get(self.text_column)
            if data.info.builder_name != "json" or feature is None or is_text(feature):
                return splits
            # the parser makes numbers and dates of strings, save where all is to stay JSON
            features = data.features | {self.text_column: datasets.Json()}
            return datasets.load_dataset(path, **given, features=datasets.Features(features))

    @cached_property
    def _streams(self) -> tuple[dict[str, datasets.IterableDataset], str]:
        """The stream of each split, and what changes with their contents."""
        with self._ready() as (path, given, here):
            config = datasets.load_dataset_builder(path, **given).config
            # addresses of files on the hub contain their revision
            named = (config.data_files or {}).items()
            files = {str(split): [*map(str, names)] for split, names in named}
            contents = json.dumps([files, given.get("description") if here else None])
            streams = datasets.load_dataset(path, **given, streaming=True)
            return {str(split): data for split, data in streams.items()}, contents

    @contextmanager
    def _ready(self) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """What to give `load_dataset`, whether the files are here, and its errors as one line."""
        path, offline = self._located()
        given: dict[str, Any] = {"name": self.name, "data_files": self._files or None}
        here = self.path == STDLIB or self._folder() is not None
        if here:
            self._check_files()
        try:
            with _quietly(offline):
                if here:
                    given |= options_for_text(datasets.load_dataset_builder(path, **given).config)
                    # the library's own cache goes by names and times of modification alone
                    given["description"] = _stamp(self._local_files())
                yield path, given, here
        except Exception as error:  # datasets raises all kinds
            raise ValueError(self._failure(error, offline)) from error

    @property
    def _files(self) -> dict[str, list[str]]:
        given = (self.data_files or {}).items()
        return {
            split: [os.path.expanduser(n) for n in ([names] if isinstance(names, str) else names)]
            for split, names in given
        }

    def _folder(self) -> Path | None:
        """The local folder that `path` stands for, if there is one."""
        shared = os.environ.get("LM_SOFTMAX_DATA")
        candidates = [Path(self.path).expanduser()]
        if shared:
            candidates += [Path(shared, self.path), Path(shared, Path(self.path).name)]
        return next((folder for folder in candidates if folder.is_dir()), None)

    def _located(self) -> tuple[str, bool]:
        """What `load_dataset` should be given as path, and whether to keep off the network."""
        if self.path == STDLIB:
            return builder_of(self._files), False
        folder = self._folder()
        if folder is not None:
            return str(folder.resolve()), False  # "." has no name to give the dataset
        if Path(self.path).expanduser().is_file():
            raise ValueError(f"{self.path!r} is a file: give data_files={{'train': {self.path!r}}}")
        if not is_hub_id(self.path):
            raise ValueError(f"no corpus {self.path!r}: there is no such folder")
        return self.path, not hub_reachable(self.path, "dataset")

    def _local_files(self) -> Iterator[Path]:
        """The files here that the corpus may consist of, for messages."""
        for pattern in [*chain.from_iterable(self._files.values())] or ["**/*"]:
            yield from self._matching(pattern)

    def _matching(self, pattern: str) -> list[Path]:
        folder = Path() if self.path == STDLIB else self._folder()
        if folder is None:
            return []
        return [Path(name) for name in sorted(glob.glob(str(folder / pattern), recursive=True))]

    def _check_files(self) -> None:
        for pattern in chain.from_iterable(self._files.values()):
            if "://" not in pattern and not self._matching(pattern):
                raise ValueError(f"no file matches {pattern!r} of data_files")

    def _failure(self, error: Exception, offline: bool = False) -> str:
        """What went wrong in `load_dataset`, on one line."""
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UnicodeDecodeError) and (message := not_utf8(self._local_files())):
            return message
        no_row = isinstance(cause, SchemaInferenceError | EmptyDataError | StopIteration)
        if no_row or "corresponds to no data" in str(cause):
            empty = [str(f) for f in self._local_files() if f.is_file() and not f.stat().st_size]
            return f"{self._described} is empty: no row in {', '.join(empty) or 'its files'}"
        if offline and isinstance(error, OSError):
            shared = os.environ.get("LM_SOFTMAX_DATA", "")
            return (
                f"no corpus {self.path!r}: no folder here or in LM_SOFTMAX_DATA={shared!r}, not in"
                " the cache of datasets, and the Hugging Face Hub could not be reached"
            )
        return f"cannot read {self._described}: {one_line(cause)}"


def _stamp(files: Iterable[Path]) -> str:
    """Changes whenever a file is written, whatever its time of modification is set to."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file} {stat.st_size} {stat.st_ino} {stat.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def _in_memory(rows: list[str]) -> datasets.Dataset:
    table = pa.table({"text": pa.array(rows, pa.large_string())})
    digest = hashlib.blake2b("\0".join(rows).encode(), digest_size=8).hexdigest()
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=digest)


@contextmanager
def _quietly(offline: bool) -> Iterator[None]:
    """Leave failures to the exception, and progress bars to terminals.

    Offline, `datasets` takes what is in its cache at once; otherwise it would try for half a
    minute to reach the hub.
    """
    verbosity, was_offline = datasets.logging.get_verbosity(), datasets.config.HF_HUB_OFFLINE
    bars = datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_HUB_OFFLINE = was_offline or offline
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        datasets.config.HF_HUB_OFFLINE = was_offline
        if bars:
            datasets.enable_progress_bars()
