"""What is timed: output heads, their peers, and the matrix products alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm_softmax.benchmark.problem import Problem
from lm_softmax.heads import OutputHead
from lm_softmax.specs import Spec

Kind = Literal["standard", "peer", "head", "floor"]
LossFunction = Callable[[Tensor, Tensor], Tensor]


class Contestant(ABC):
    """One way through a training step, split into the parts that are timed."""

    @abstractmethod
    def forward(self) -> Tensor | None:
        """The loss without gradients, as a scalar; None where no loss is computed."""

    @abstractmethod
    def forward_backward(self) -> Tensor | None:
        """The loss, and all gradients, those of the hidden vectors too."""

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps over; nothing by default."""
        return []

    def after_step(self) -> None:
        """What a head learns without gradients; nothing by default."""
        return

    def clear(self) -> None:
        """Drops the gradients."""
        for parameter in self.parameters():
            parameter.grad = None


class Loss(Contestant):
    """A loss function of hidden vectors and targets.

    Args:
        function: Gives the mean loss as a scalar.
        parameters: All that it has.
        inputs: Hidden vectors and targets.
        after_optimizer_step: Called after each step of the optimizer.
    """

    def __init__(
        self,
        function: LossFunction,
        parameters: Sequence[nn.Parameter],
        inputs: tuple[Tensor, Tensor],
        after_optimizer_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.function, self._after_step = function, after_optimizer_step
        self._parameters = list(parameters)
        self.hidden, self.target = inputs

    @torch.no_grad()
    def forward(self) -> Tensor:
        """See `Contestant.forward`."""
        return self.function(self.hidden, self.target)

    def forward_backward(self) -> Tensor:
        """See `Contestant.forward_backward`."""
        loss = self.function(self.hidden, self.target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def parameters(self) -> list[nn.Parameter]:
        """See `Contestant.parameters`."""
        return self._parameters

    def after_step(self) -> None:
        """See `Contestant.after_step`."""
        self._after_step()

    def clear(self) -> None:
        """See `Contestant.clear`."""
        super().clear()
        self.hidden.grad = None


@dataclass(frozen=True)
class Entry:
    """A contestant before it is built.

    Attributes:
        name: Under which it is shown.
        kind: "standard" is the plain softmax over all words that speed-ups refer to.
        group: Those of one group compute the same function of the same weights, those of the head
            that `weights` makes; the floor of a group is its matrix products.
        what: What is called.
        spec: The head that the entry comes from; `line_up` with it alone has the entry too.
        weights: Makes the group's head.
        make: Makes the contestant from that head and the inputs.
    """

    name: str
    kind: Kind
    group: str
    what: str
    spec: Spec
    weights: Callable[[], OutputHead]
    make: Callable[[Any, tuple[Tensor, Tensor]], Contestant]


class Workshop:
    """Builds contestants of one problem; those of a group share weights.

    Args:
        problem: Sizes, types and targets.
    """

    def __init__(self, problem: Problem) -> None:
        self.inputs = problem.inputs()
        self._heads: dict[str, OutputHead] = {}

    def head(self, entry: Entry) -> OutputHead:
        """The head whose weights the entry's group shares."""
        if entry.group not in self._heads:
            self._heads[entry.group] = entry.weights()
        return self._heads[entry.group]

    def build(self, entry: Entry) -> Contestant:
        """The contestant."""
        return entry.make(self.head(entry), self.inputs)


def of_head(head: OutputHead, inputs: tuple[Tensor, Tensor]) -> Contestant:
    """A head's own training loss."""
    return Loss(head.loss, list(head.parameters()), inputs, head.after_optimizer_step)
