"""The models that `benchmark loop` trains: from the name of a head, or from a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

import lm_softmax.encoders
import lm_softmax.heads
import lm_softmax.schedule
from lm_softmax.benchmark.line_up import head_classes
from lm_softmax.benchmark.loops import EncoderSizes
from lm_softmax.specs import Spec, parse_spec

NAMESPACES = (lm_softmax.heads, lm_softmax.encoders, lm_softmax.schedule, torch.optim)
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"fused": True}}


@dataclass(frozen=True)
class Model:
    """What to build.

    Attributes:
        name: Under which it is shown.
        options: Keyword arguments of `LanguageModel`.
        clip: Largest norm of the gradients, None for any.
        vocab_size: Number of words, if it is not that of the command.
    """

    name: str
    options: Mapping[str, Any]
    clip: float | None
    vocab_size: int | None


def split_size(text: str) -> tuple[str, int | None]:
    """`what@vocab_size` as the two.

    Raises:
        ValueError: If what follows the @ is no number of words.
    """
    what, mark, size = text.rpartition("@")
    if not mark:
        return text, None
    if not size.replace("_", "").isdecimal() or int(size) < 1:
        raise ValueError(f"{text}: after @ comes a number of words, got {size!r}")
    return what, int(size)


def from_head(text: str, sizes: EncoderSizes, lr: float, clip: float | None) -> Model:
    """An LSTM with a head, trained by a fused AdamW.

    Args:
        text: A head as `parse_spec` takes it, with "@vocab_size" if it has one of its own.
        sizes: Of the LSTM.
        lr: Learning rate.
        clip: Largest norm of the gradients, None for any.

    Raises:
        ValueError: If there is no such head, or it has no such option.
    """
    what, vocab_size = split_size(text)
    spec = parse_spec(what)
    spec.find(head_classes())
    options = {
        "encoder": {"class_path": "lm_softmax.encoders.LSTMEncoder", "init_args": vars(sizes)},
        "head": _of_spec(spec),
        "optimizer": {**ADAM, "init_args": {**ADAM["init_args"], "lr": lr}},  # type: ignore[dict-item]
    }
    return Model(_named(str(spec), vocab_size), options, clip, vocab_size)


def from_config(text: str) -> Model:
    """The model of a configuration, with its own optimizer and clipping.

    Args:
        text: The file, with "@vocab_size" if it has one of its own.

    Raises:
        ValueError: If it cannot be read, or has no encoder, head and optimizer.
    """
    what, vocab_size = split_size(text)
    try:
        config = yaml.safe_load(Path(what).read_text(encoding="utf-8"))
        model = dict(config["model"])
        parts = {name: _full_paths(model[name]) for name in ("encoder", "head", "optimizer")}
        clip = config.get("trainer", {}).get("gradient_clip_val")
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{what}: cannot be read, {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}: not the configuration of a model, {error}") from None
    options = {**parts, "tie_weights": bool(model.get("tie_weights", False))}
    return Model(_named(what, vocab_size), options, clip, vocab_size)


def _of_spec(spec: Spec) -> dict[str, Any]:
    return {"class_path": f"lm_softmax.heads.{spec.name}", "init_args": dict(spec.options)}


def _named(name: str, vocab_size: int | None) -> str:
    return name if vocab_size is None else f"{name} @{vocab_size:,}"


def _full_paths(value: Any) -> Any:
    """The same, with the import path of each class that is named without."""
    if isinstance(value, list):
        return [_full_paths(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    found = {key: _full_paths(item) for key, item in value.items()}
    if isinstance(name := found.get("class_path"), str) and "." not in name:
        for module in NAMESPACES:
            if isinstance(getattr(module, name, None), type):
                found["class_path"] = f"{module.__name__}.{name}"
    return found
