"""Formats of files, and what keeps their readers from taking text for something else."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pandas  # type: ignore[import-untyped]
import pyarrow as pa
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from datasets.packaged_modules.text.text import TextConfig

from lm_softmax.corpus.rows import COMPRESSED, ROWS_AT_ONCE
from lm_softmax.vocab import one_line

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def builder_of(files: Mapping[str, Sequence[str]]) -> str:
    """The packaged builder of `datasets` for the files' suffixes."""
    found = {}
    for name in chain.from_iterable(files.values()):
        suffixes = [s for s in Path(name).suffixes if s not in COMPRESSED]
        found[_BUILDERS.get(suffixes[-1].lower() if suffixes else "", "text")] = name
    if len(found) != 1:
        raise ValueError(
            "data_files names no file"
            if not found
            else f"data_files mixes formats: {', '.join(f'{n!r} is {b}' for b, n in found.items())}"
        )
    return next(iter(found))


def options_for_text(config: datasets.BuilderConfig) -> dict[str, Any]:
    """Options that keep a builder from taking text for something else."""
    if isinstance(config, TextConfig) and config.encoding == "utf-8":
        return {"encoding": "utf-8-sig"}  # a byte order mark is no text
    if isinstance(config, ParquetConfig) and config.batch_size is None:
        return {"batch_size": ROWS_AT_ONCE}  # else a whole row group is in memory, of any size
    if isinstance(config, CsvConfig) and config.features is None and config.data_files:
        first = next(iter(config.data_files.values()))[0]
        header = config.pd_read_csv_kwargs | {"nrows": 0, "chunksize": None}
        columns = pandas.read_csv(first, **header).columns
        features = datasets.Features({name: datasets.Value("large_string") for name in columns})
        return {"features": features, "keep_default_na": False, "na_filter": False}
    return {}


def is_text(feature: Any) -> bool:
    """Whether a column holds strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def name_of(feature: Any) -> str:
    """What a column holds, for messages."""
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def plain_text(piece: pa.Array, what: str) -> pa.Array:
    """Strings of an array of JSON values: strings as they are, numbers as they are written."""

    def plain(value: str | None) -> str | None:
        loaded = None if value is None else json.loads(value)
        if isinstance(loaded, dict | list | bool):
            raise ValueError(f"{what} holds {one_line(ValueError(value))}, not text")
        return loaded if loaded is None or isinstance(loaded, str) else value

    return pa.array(map(plain, piece.cast(pa.large_string()).to_pylist()), pa.large_string())
