"""A training that diverged: the step at which its loss stopped being a number."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ADVICE = "training diverged: lower the learning rate or set trainer.gradient_clip_val"
MOST = 1000  # losses that wait to be looked at


class Position(NamedTuple):
    """Where in a training a loss comes from; step, epoch and batch begin with 0."""

    step: int
    epoch: int
    batch: int
    learning_rate: str

    def __str__(self) -> str:
        return (
            f"step {self.step} (batch {self.batch} of epoch {self.epoch},"
            f" learning rate {self.learning_rate})"
        )


class LossWatch:
    """Finds the first loss that is nan or infinite, without waiting for a device at each step.

    Args:
        hint: What else may be wrong where it does.
    """

    def __init__(self, hint: str) -> None:
        self.hint = hint
        self._seen: list[tuple[Position, Tensor]] = []

    def add(self, loss: Tensor, position: Position) -> None:
        """Notes a loss, to be looked at by `check`."""
        self._seen.append((position, loss))
        if len(self._seen) >= MOST:
            self.check()

    def clear(self) -> None:
        """Forgets what was not looked at: another training begins."""
        self._seen.clear()

    def check(self) -> None:
        """Looks at the losses since the last look, which waits for the device.

        Raises:
            ValueError: If one was nan or infinite. It is not forgotten.
        """
        if not self._seen:
            return
        losses = torch.stack([loss for _, loss in self._seen])
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            position, loss = self._seen[bad[0]]
            raise ValueError(f"train/loss is {float(loss)} at {position}: {ADVICE}, {self.hint}")
        self._seen.clear()


def learning_rate(optimizers: list[Any]) -> str:
    """The learning rates of all parameter groups, each once."""
    rates = [f"{float(group['lr']):.3g}" for o in optimizers for group in o.param_groups]
    return ", ".join(dict.fromkeys(rates))


def not_finite(module: nn.Module) -> list[str]:
    """Names of the parameters that hold a nan or an infinity, in this process's part of them."""
    named = [(name, _local(parameter)) for name, parameter in module.named_parameters()]
    if not named:
        return []
    device = named[0][1].device
    fine = torch.stack([value.isfinite().all().to(device) for _, value in named]).tolist()
    return [name for (name, _), good in zip(named, fine, strict=True) if not good]


def _local(parameter: Tensor) -> Tensor:
    to_local = getattr(parameter, "to_local", None)
    return (to_local() if to_local else parameter).detach()
