"""A checkpoint of a language model as a file, read without running anything in it."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lm_softmax.encoders import Encoder
from lm_softmax.heads import OutputHead
from lm_softmax.module import LanguageModel
from lm_softmax.vocab import load_archive

PARTS: dict[str, type] = {"encoder": Encoder, "head": OutputHead}
PIECES = {"state_dict": dict, "hyper_parameters": dict, "pytorch-lightning_version": str}
OPTIONS = ("counts", "vocab", "optimizer", "lr_scheduler", "tie_weights", "requested")


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
        ValueError: If there is no such file, it is damaged, or there is no language model in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder: name a checkpoint in it")
        if not self.path.is_file():
            raise ValueError(f"no checkpoint {self.path}")
        self.content = load_archive(self.path)
        if missing := _missing(self.content):
            raise ValueError(
                f"{self.path} is not the checkpoint of a language model: it has no {missing}"
            )
        self.hparams: dict[str, Any] = self.content["hyper_parameters"]
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
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{self.path} holds a model that cannot be built: {reason}") from error

    @property
    def step(self) -> int:
        """Optimizer steps that were done.

        Raises:
            ValueError: If it does not say so.
        """
        if "global_step" not in self.content:
            raise ValueError(f"{self.path} does not say after how many steps it was written")
        return int(self.content["global_step"])


def _missing(content: Any) -> str:
    """The first piece that a language model is made of and the content of a file lacks."""
    for name, kind in PIECES.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            return name
    for name in (*PARTS, *OPTIONS):
        if name not in content["hyper_parameters"]:
            return f"hyper_parameters[{name!r}]"
    for name, value in content["state_dict"].items():
        if not isinstance(value, Tensor):
            return f"tensor state_dict[{name!r}]"
    return ""
