"""What is derived from weights that do not change, and kept until they do.

A head in training changes at every step and pays for nothing: only the second call that finds the
same weights derives. Whether they are the same is told without a look at them: by their version
and place, by the steps that optimizers made (fused ones raise no version), and by a few entries,
since writing through `.data` raises no version either. A single row that is written so goes
unnoticed.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from lm_softmax.kernels.workspace import reads_are_cheap

PLACES, RUN = 64, 4  # of the entries that are compared: so many runs of neighbours
FEW_ROWS = 3  # of a product that takes half the time with columns; from 4 on they do not matter
MANY_WORDS = 2**16  # of a matrix whose columns are not kept

T = TypeVar("T")


class _Steps:
    """Counts the steps of all optimizers."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, *_: object) -> None:
        self.taken += 1


_steps = _Steps()
register_optimizer_step_post_hook(_steps)


class _Sample(NamedTuple):
    """A few entries of a tensor, in the order of their places in memory."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "_Sample":
        """What they are now."""
        size = tensor.numel()
        shape, strides = (1, size), (size, 1)
        if size > PLACES * RUN:
            shape, strides = (PLACES, RUN), (size // PLACES, 1)
        return cls(shape, strides, tensor.detach().as_strided(shape, strides).clone())

    def is_of(self, tensor: Tensor) -> bool:
        """Whether they are what they were."""
        return torch.equal(tensor.as_strided(self.shape, self.strides), self.values)


class _Entry(NamedTuple):
    weight: Callable[[], Tensor | None]
    key: tuple[Any, ...]
    samples: list[_Sample]
    made: Any


class Kept(Generic[T]):
    """Of each weight, as long as it lives, what was made of it."""

    def __init__(self) -> None:
        self.entries: dict[int, _Entry] = {}  # by id; a dictionary by weight is slow to look into

    def get(self, tensors: Sequence[Tensor], make: Callable[[], T]) -> T | None:
        """What was made of some tensors; None at the first call that finds them like this.

        Of tensors without a version or of another kind, as sharded ones, and of those whose
        entries are not one dense run of memory, nothing is kept.

        Args:
            tensors: The weight, and others that it goes with.
            make: Called without gradients.
        """
        if torch.compiler.is_compiling():
            return None
        weight = tensors[0]
        found = self.entries.get(id(weight))
        if found is None or found.weight() is not weight:
            self._begin(tensors)
            return None
        if found.key != _key(tensors) or not all(map(_Sample.is_of, found.samples, tensors)):
            self._begin(tensors)
            return None
        if found.made is None:
            with torch.inference_mode(False), torch.no_grad():  # else of use inside of it only
                found = found._replace(made=make())
            self.entries[id(weight)] = found
        return found.made  # type: ignore[no-any-return]

    def _begin(self, tensors: Sequence[Tensor]) -> None:
        """Remembers tensors, to know them again."""
        place = id(tensors[0])
        self.entries.pop(place, None)
        if not all(map(_can_be_checked, tensors)):
            return
        weight = weakref.ref(tensors[0], lambda ended: self._end(place, ended))
        samples = list(map(_Sample.of, tensors))
        self.entries[place] = _Entry(weight, _key(tensors), samples, None)

    def _end(self, place: int, ended: object) -> None:
        found = self.entries.get(place)
        if found is not None and found.weight is ended:
            del self.entries[place]


def _key(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    places = [(id(t), t._version, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
    return (_steps.taken, *places)


def _can_be_checked(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, Parameter) or tensor.is_meta or tensor.is_inference():
        return False
    return tensor.is_contiguous() or tensor.t().is_contiguous()


_columns: Kept[Tensor] = Kept()


def by_columns(weight: Tensor, num_rows: int) -> Tensor:
    """The same matrix `(n, width)`, laid out by columns if that is kept and serves.

    A CPU reads a matrix once to multiply few rows with it, and reads it twice as fast by columns.

    Args:
        weight: Read by rows in all else.
        num_rows: What it is to multiply.
    """
    if num_rows > FEW_ROWS or weight.shape[0] >= MANY_WORDS or not reads_are_cheap(weight):
        return weight
    kept = _columns.get([weight], lambda: weight.t().clone(memory_format=torch.contiguous_format))
    return weight if kept is None else kept.t()
