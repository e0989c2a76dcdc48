"""A trained model in a benchmark: its head, and the hidden vectors of its own encoder."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lm_softmax.checkpoint import Checkpoint
from lm_softmax.data import TextDataModule
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
        model = LanguageModel.load_from_checkpoint(self.path, map_location="cpu")
        return model.head.to(self.device, self.dtype).eval()


def load(path: Path) -> tuple[Checkpoint, LanguageModel]:
    """A checkpoint, and its model in evaluation mode on the CPU.

    Raises:
        ValueError: If there is no such file, or no language model in it.
    """
    checkpoint = Checkpoint(path)
    return checkpoint, LanguageModel.load_from_checkpoint(path, map_location="cpu").eval()


def validation_text(checkpoint: Checkpoint, data_path: str | None) -> TextDataModule:
    """The data of the run, their vocabulary that of the checkpoint.

    Args:
        checkpoint: Says what the model was trained on.
        data_path: Another corpus.

    Raises:
        ValueError: If it is out of reach.
    """
    known = inspect.signature(TextDataModule).parameters
    options = {name: value for name, value in checkpoint.data_options.items() if name in known}
    if data_path is not None:
        options |= {"path": data_path, "name": None, "data_files": None}
    if "path" not in options:
        raise ValueError(f"{checkpoint.path} does not say what it was trained on: give --data-path")
    try:
        data = TextDataModule(**options | {"vocab_path": str(checkpoint.path)})
        data.val_dataloader()
    except (ValueError, OSError) as error:
        raise ValueError(f"no text to measure on: {error} (--data-path names another)") from error
    return data


@torch.no_grad()
def hidden_vectors(model: LanguageModel, data: TextDataModule, num_vectors: int) -> Tensor:
    """Hidden vectors of the first positions of the validation split, `(N, hidden_size)`.

    Raises:
        ValueError: If there are fewer.
    """
    found: list[Tensor] = []
    state = None
    for batch in data.val_dataloader():
        hidden, state = model.encoder(batch.tokens, state if batch.carry else None)
        found.append(hidden[batch.target != model.head.ignore_index])
        if sum(map(len, found)) >= num_vectors:
            return torch.cat(found)[:num_vectors]
    raise ValueError(
        f"the validation split has {sum(map(len, found))} positions, --num-vectors {num_vectors}"
        " are asked for"
    )


def check_source(model: LanguageModel, source: LanguageModel) -> None:
    """Raises a ValueError if ids of the two models are not the same words."""
    words, others = model.head.vocab_size, source.head.vocab_size
    if words != others:
        raise ValueError(f"--source has {others} words, the checkpoint has {words}")
    vocabs = [found.vocab.fingerprint for found in (model, source) if found.vocab is not None]
    if len(vocabs) == 2 and vocabs[0] != vocabs[1]:
        raise ValueError("--source has another vocabulary than the checkpoint")
