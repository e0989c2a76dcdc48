"""A language model with a smaller head, and its checkpoint."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_softmax.checkpoint import Checkpoint
from lm_softmax.heads import LowRankSoftmax, OutputHead, ProductQuantizedSoftmax
from lm_softmax.module import LanguageModel
from lm_softmax.specs import Spec

METHODS: dict[str, Callable[..., LowRankSoftmax | ProductQuantizedSoftmax]] = {
    "LowRankSoftmax": LowRankSoftmax.from_full,
    "ProductQuantizedSoftmax": ProductQuantizedSoftmax.from_full,
}
# What a checkpoint of weights alone keeps; not loops, optimizer, callbacks and random numbers.
KEPT = (
    *("epoch", "global_step", "pytorch-lightning_version", "hparams_name"),
    *("datamodule_hparams_name", "datamodule_hyper_parameters"),
)


def compress(source: LanguageModel, spec: Spec) -> LanguageModel:
    """The same encoder and vocabulary with a head that approximates the source's.

    Nothing is shared with the source. Where its embedding was tied to the output matrix, the new
    embedding keeps the whole matrix and the new head has parameters of its own.

    Args:
        source: A model whose head has one output row a word: `FullSoftmax`, `SampledSoftmax`, or
            `NCE`. Bias and softcap are its own; label smoothing and z-loss too.
        spec: `LowRankSoftmax` or `ProductQuantizedSoftmax`, with the options of its `from_full`.

    Raises:
        ValueError: If the source has another head, or an option is wrong.
    """
    head = spec.find(METHODS)(source.head, **spec.options)
    options = {
        "bias": head.bias is not None,
        "ignore_index": head.ignore_index,
        **head.objective._asdict(),
        **head.structure(),
    }
    kind: type[OutputHead] = type(head)
    hparams = source.hparams
    model = LanguageModel(
        hparams["encoder"],
        partial(kind, **options),
        hparams["counts"],
        vocab=hparams["vocab"],
        optimizer=hparams["optimizer"],
        lr_scheduler=hparams["lr_scheduler"],
    )
    encoder = {f"encoder.{name}": value for name, value in source.encoder.state_dict().items()}
    own = {f"head.{name}": value for name, value in head.state_dict().items()}
    model.load_state_dict(encoder | own)
    return model.eval()


def content(checkpoint: Checkpoint, source: LanguageModel, model: LanguageModel) -> dict[str, Any]:
    """What a checkpoint of a model's weights alone holds, in the dtypes of the one it came from.

    Args:
        checkpoint: The source's.
        source: What it holds.
        model: The source, or what `compress` made of it.
    """
    kept = {key: value for key, value in checkpoint.content.items() if key in KEPT}
    hparams = dict(checkpoint.hparams)
    if model is not source:
        head = model.hparams["head"]
        hparams |= {
            "head": head,
            "requested": {**hparams["requested"], "head": head},
            "tie_weights": False,
        }
    stored: dict[str, Tensor] = checkpoint.content["state_dict"]
    of_head = stored[f"head.{next(name for name, _ in source.head.named_parameters())}"].dtype
    weights = {
        name: value.to(stored[name].dtype if name in stored else of_head)
        if value.is_floating_point()
        else value
        for name, value in model.state_dict().items()
    }
    return kept | {"hyper_parameters": hparams, "state_dict": weights}


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint that is there whole or not at all.

    Raises:
        ValueError: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer hides what it failed at
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise ValueError(f"cannot write {path}: {cause.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def file_bytes(checkpoint: dict[str, Any]) -> int:
    """Size of the file that `save` would write."""
    sink = _Sink()
    torch.save(checkpoint, sink)  # type: ignore[arg-type]
    return sink.size


class _Sink:
    """Counts what is written."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass
