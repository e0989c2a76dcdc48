"""Checkpoints as files that are there whole or not at all, and the one before the last."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from lm_softmax.vocab import load_archive

FOLDER, LAST, PREVIOUS = "checkpoints", "last.ckpt", "previous.ckpt"
REQUEUED = "hpc_ckpt_*.ckpt"  # what Lightning writes before it puts a SLURM job back in the queue


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file of the name, forces it to the disk, and renames it.

    A `last.ckpt` that is replaced stays as `previous.ckpt`, unless it is damaged: one that another
    process wrote is read before. Whatever ends the process, and if the disk is full, each name
    holds what it held before or the new one, whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            ValueError: If the disk refuses.
        """
        file = Path(path)
        partial = file.with_name(f"{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, partial)
            if file.name == LAST and file.exists() and self._is_whole(file):
                _link(file, file.with_name(PREVIOUS))
            partial.replace(file)
            _sync_folder(file.parent)
            self._written.add(file)
        except OSError as error:
            raise ValueError(
                f"cannot write the checkpoint {file}: {error.strerror or error}; "
                + ("the one before it is as it was" if file.exists() else "there is none yet")
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def _is_whole(self, file: Path) -> bool:
        if file in self._written:
            return True
        try:
            load_archive(file, mmap=True)
        except ValueError:
            return False
        return True


class _Stream:
    """A file that remembers why it could not be written, which torch.save does not say."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self._file.write(data))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        stream = _Stream(file)
        try:
            torch.save(checkpoint, stream)  # type: ignore[arg-type]
        except Exception as error:
            raise stream.error or error from None
        file.flush()
        os.fsync(file.fileno())


def _link(file: Path, name: Path) -> None:
    """Gives a file a second name, in place of what had it."""
    partial = name.with_name(f"{name.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(file, partial)
    except OSError:  # a file system without hard links
        file.replace(name)
    else:
        partial.replace(name)


def _sync_folder(folder: Path) -> None:
    """Forces names to the disk, where a folder can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
