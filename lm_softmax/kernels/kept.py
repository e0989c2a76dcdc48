"""What is derived from weights, kept as long as they are what they were."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

SAMPLES = 256  # entries of the weights that are compared with what they were


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    samples: list[Tensor]  # what a few entries of the weights were
    derived: dict[Any, Any]


class _Steps:
    """Counts the steps of all optimizers: those of fused ones raise no tensor's version."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, *_: object) -> None:
        self.taken += 1


_steps = _Steps()
register_optimizer_step_post_hook(_steps)
_entries: Any = WeakIdKeyDictionary()  # by weight


def derived_from(weight: Tensor, bias: Tensor | None) -> dict[Any, Any] | None:
    """What callers have derived from weights, empty when they have changed; None if nothing can be.

    It is kept as long as the weights live, are the same tensors at the same place and of the same
    version, no optimizer makes a step, and a few of the values are what they were. The last is for
    code that writes through `.data`, which raises no version: it is not noticed if it changes
    single rows. Of tensors that have no version nothing is kept. Tensors that go into it must be
    made outside of inference mode, or they could be used inside of that mode only.

    Args:
        weight: `(n, width)`.
        bias: `(n,)` or None.
    """
    tensors = [tensor for tensor in (weight, bias) if tensor is not None]
    if torch.compiler.is_compiling() or any(t.is_meta or t.is_inference() for t in tensors):
        return None
    places = [(id(t), t._version, t.data_ptr(), t.dtype, t.shape) for t in tensors]
    key = (_steps.taken, *places)
    found: _Entry | None = _entries.get(weight)
    some = [_some(tensor) for tensor in tensors]
    if found is None or found.key != key or not all(map(torch.equal, some, found.samples)):
        found = _entries[weight] = _Entry(key, [part.clone() for part in some], {})
    return found.derived


def _some(tensor: Tensor) -> Tensor:
    """A few entries."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.shape[0] // SAMPLES)]
