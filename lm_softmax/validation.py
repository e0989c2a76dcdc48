"""Text that a trained model is measured on, and the hidden vectors it makes of it."""

import inspect

import torch
from torch import Tensor

from lm_softmax.checkpoint import Checkpoint
from lm_softmax.data import TextDataModule
from lm_softmax.module import LanguageModel


def validation_text(checkpoint: Checkpoint, data_path: str | None) -> TextDataModule:
    """The data of the run, their vocabulary that of the checkpoint.

    Args:
        checkpoint: Says what the model was trained on.
        data_path: Another corpus, instead of `path`, `name` and `data_files` of the run.

    Raises:
        ValueError: If it is out of reach, or there is no vocabulary to read it with.
    """
    known = inspect.signature(TextDataModule).parameters
    options = {name: value for name, value in checkpoint.data_options.items() if name in known}
    if data_path is not None:
        options |= {"path": data_path, "name": None, "data_files": None}
    if "path" not in options:
        raise ValueError(f"{checkpoint.path} does not say what it was trained on: give --data-path")
    if checkpoint.hparams["vocab"] is None:
        raise ValueError(f"{checkpoint.path} holds no vocabulary to read text with")
    try:
        data = TextDataModule(**options | {"vocab_path": str(checkpoint.path)})
        data.val_dataloader()
    except (ValueError, OSError) as error:
        raise ValueError(f"no text to measure on: {error} (--data-path names another)") from error
    return data


@torch.no_grad()
def hidden_vectors(model: LanguageModel, data: TextDataModule, most: int) -> Tensor:
    """Hidden vectors of the first positions of the validation split, `(N, hidden_size)`.

    Args:
        model: In evaluation mode.
        data: What `validation_text` gave.
        most: The largest N; a split of fewer positions gives them all.
    """
    found: list[Tensor] = []
    state = None
    for batch in data.val_dataloader():
        tokens, target = batch.tokens.to(model.device), batch.target.to(model.device)
        hidden, state = model.encoder(tokens, state if batch.carry else None)
        found.append(hidden[target != model.head.ignore_index])
        if sum(map(len, found)) >= most:
            break
    return torch.cat(found)[:most]
