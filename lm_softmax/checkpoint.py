"""A checkpoint of a language model as a file, read without running anything in it."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from lm_softmax.encoders import Encoder
from lm_softmax.heads import OutputHead
from lm_softmax.module import LanguageModel

PARTS: dict[str, type] = {"encoder": Encoder, "head": OutputHead}
ZIP_MAGIC = b"PK\x03\x04"
# What reading a ZIP archive with flipped bits may end in: sizes, places, flags and names are wrong.
DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)


class Checkpoint:
    """A checkpoint of `LanguageModel`, read without running anything in it.

    Args:
        path: The file.

    Attributes:
        path: The file.
        content: What it holds.
        hparams: The model's part of it.
        data_options: The options of the data module that it was trained on.

    Raises:
        ValueError: If there is no such file, or no language model in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no checkpoint {self.path}")
        if _is_damaged(self.path):
            raise ValueError(f"{self.path} is damaged or incomplete")
        try:
            self.content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in as many ways as there are formats
            reason = str(error).split("\n")[0].split(". ")[0]
            raise ValueError(f"cannot read the checkpoint {self.path}: {reason}") from error
        hparams = self.content.get("hyper_parameters") if isinstance(self.content, dict) else None
        if not isinstance(hparams, dict) or not {*PARTS, "requested", "vocab"} <= set(hparams):
            raise ValueError(f"{self.path} is not the checkpoint of a language model")
        self.hparams: dict[str, Any] = hparams
        self.data_options: dict[str, Any] = self.content.get("datamodule_hyper_parameters", {})

    def model(self) -> LanguageModel:
        """The model, on the CPU.

        Raises:
            ValueError: If structure, vocabulary and weights do not make one.
        """
        try:
            return LanguageModel.load_from_checkpoint(
                self.path, map_location="cpu", weights_only=True
            )
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{self.path} holds a model that cannot be built: {error}") from error

    @property
    def step(self) -> int:
        """Optimizer steps that were done."""
        return int(self.content["global_step"])


def _is_damaged(path: Path) -> bool:
    """Whether what began as a ZIP archive, as checkpoints are, lacks a part or fails its CRC."""
    with path.open("rb") as file:
        begin = file.read(len(ZIP_MAGIC))
    if not ZIP_MAGIC.startswith(begin) and not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except DAMAGES:
        return True
