"""The file of token ids: a header that says what it holds and proves that it is whole, then ids."""

import json
import os
import zlib
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

MAGIC = b"lm_softmax token ids\n"
VERSION = 1
HEADER_BYTES = 4096  # a page: ids are mapped at their natural alignment
_CHUNK = 2**24
_KEYS = {"version", "dtype", "num_tokens", "vocab_size", "crc32", "about"}


class TokenWriter:
    """Writes ids, and the header once the last of them is there; to be used in a `with` block.

    Args:
        path: The file.
        vocab_size: Number of ids there can be; they take the smallest unsigned type for it.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.dtype = np.min_scalar_type(vocab_size - 1)
        self.about: dict[str, Any] = {}  # plain data to keep in the header
        self._path, self._vocab_size = path, vocab_size
        self._num_tokens = self._crc = 0
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        return self

    def append(self, ids: NDArray[Any]) -> None:
        """Writes ids of any integer type after those before."""
        data = np.ascontiguousarray(ids, self.dtype).data.cast("B") if len(ids) else b""
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._num_tokens += len(ids)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                header = {
                    "version": VERSION,
                    "dtype": self.dtype.name,
                    "num_tokens": self._num_tokens,
                    "vocab_size": self._vocab_size,
                    "crc32": self._crc,
                    "about": self.about,
                }
                text = MAGIC + json.dumps(header).encode()
                checked = text + b"\n%08x\n" % zlib.crc32(text)
                self._file.seek(0)
                self._file.write(checked.ljust(HEADER_BYTES))
                self._file.flush()
                os.fsync(self._file.fileno())


class TokenFile:
    """Token ids of a split on disk, in the smallest unsigned type that holds the vocabulary.

    Behaves as a one-dimensional numpy array for `len` and for indexing. Worker processes get the
    name of the file and map it themselves.

    Args:
        path: A file of `TokenWriter`.

    Attributes:
        dtype: Type of the ids.
        about: What its writer kept in the header.

    Raises:
        ValueError: If it is no such file, is of another version, or not whole: each id is checked,
            once in a process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = _header(path)
        self.dtype = np.dtype(header["dtype"])
        self.about: dict[str, Any] = header["about"]
        self._check(header["num_tokens"], header["vocab_size"])
        stat = path.stat()
        if _checksum(path, stat.st_size, stat.st_mtime_ns) != header["crc32"]:
            raise ValueError(f"token file {path} is damaged: its ids fail their checksum")

    def _check(self, num_tokens: int, vocab_size: int) -> None:
        size, whole = self.path.stat().st_size, HEADER_BYTES + num_tokens * self.dtype.itemsize
        if size != whole:
            raise ValueError(f"token file {self.path} is damaged: {size} bytes of {whole}")
        if self.dtype != np.min_scalar_type(vocab_size - 1):
            raise ValueError(f"token file {self.path} is damaged: {self.dtype} ids of {vocab_size}")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "dtype": self.dtype, "about": self.about}

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        return self._ids[index]

    @cached_property
    def _ids(self) -> NDArray[Any]:
        if self.path.stat().st_size == HEADER_BYTES:  # nothing to map
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, mode="r", offset=HEADER_BYTES)


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        raw = file.read(HEADER_BYTES)
    if not raw.startswith(MAGIC):
        raise ValueError(f"{path} is no token file of lm_softmax")
    text, _, rest = raw[len(MAGIC) :].partition(b"\n")
    if rest[:8] != b"%08x" % zlib.crc32(MAGIC + text):
        raise ValueError(f"token file {path} is damaged: its header fails its checksum")
    header: dict[str, Any] = json.loads(text)
    if header.get("version") != VERSION or set(header) != _KEYS:
        raise ValueError(f"token file {path} is of another version than {VERSION}")
    return header


@lru_cache(maxsize=64)
def _checksum(path: Path, size: int, changed: int) -> int:
    """CRC32 of all ids; `size` and `changed` are those of the file, so that it is read once."""
    crc = 0
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
