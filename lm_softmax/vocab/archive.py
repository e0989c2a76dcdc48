"""Files that `torch.save` wrote: checked as a whole before anything in them is read."""

import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from lm_softmax.vocab.hub import one_line

_MAGIC = b"PK\x03\x04"
# What reading a ZIP archive with flipped bits may end in: sizes, places, flags and names are wrong.
_DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)


def load_archive(path: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """`torch.load(path, map_location="cpu", weights_only=True)` of a file that is whole.

    Nothing in the file is run, whatever it holds.

    Args:
        path: The file.
        mmap: Whether tensors stay in the file until they are looked at.

    Raises:
        ValueError: If the file lacks a part, fails its checksums, or holds more than plain data.
    """
    if _is_damaged(Path(path)):
        raise ValueError(f"{os.fspath(path)} is damaged or incomplete")
    try:
        with warnings.catch_warnings():  # what old pickles bring; the error says more
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)
    except Exception as error:  # it fails in as many ways as there are formats
        reason = one_line(error).split(". ")[0]
        if not zipfile.is_zipfile(path):
            reason = "no archive that torch.save wrote"
        raise ValueError(f"cannot read {os.fspath(path)!r}: {reason}") from error


def _is_damaged(path: Path) -> bool:
    """Whether what began as a ZIP archive, as checkpoints are, lacks a part or fails its CRC."""
    with path.open("rb") as file:
        begin = file.read(len(_MAGIC))
    if not _MAGIC.startswith(begin) and not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except _DAMAGES:
        return True
