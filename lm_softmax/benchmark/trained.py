"""A trained model in a benchmark: its head, and whether two have the same words."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lm_softmax.checkpoint import Checkpoint
from lm_softmax.heads import OutputHead
from lm_softmax.module import LanguageModel


@dataclass(frozen=True)
class Trained:
    """The head of a checkpoint; plain values, so that another process can load it too.

    Attributes:
        path: The file.
        device: Where the head is put.
        dtype: What its parameters are turned into.
    """

    path: Path
    device: str
    dtype: torch.dtype

    def head(self) -> OutputHead:
        """The head alone, for evaluation."""
        return Checkpoint(self.path).model().head.to(self.device, self.dtype).eval()


def load(path: Path) -> tuple[Checkpoint, LanguageModel]:
    """A checkpoint, and its model in evaluation mode on the CPU.

    Raises:
        ValueError: If there is no such file, or no language model in it.
    """
    checkpoint = Checkpoint(path)
    return checkpoint, checkpoint.model().eval()


def check_source(model: LanguageModel, source: LanguageModel) -> None:
    """Raises a ValueError if ids of the two models are not the same words."""
    words, others = model.head.vocab_size, source.head.vocab_size
    if words != others:
        raise ValueError(f"--source has {others} words, the checkpoint has {words}")
    vocabs = [found.vocab.fingerprint for found in (model, source) if found.vocab is not None]
    if len(vocabs) == 2 and vocabs[0] != vocabs[1]:
        raise ValueError("--source has another vocabulary than the checkpoint")
