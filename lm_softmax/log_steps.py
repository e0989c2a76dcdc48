"""When there is something to log."""

import lightning.pytorch as pl
import torch
from torch import Tensor


class LogSteps:
    """Follows the optimizer steps of a trainer from `on_train_batch_end`.

    A batch whose gradient is only accumulated ends no step.
    """

    def __init__(self) -> None:
        self._last_step = 0

    def start(self, trainer: pl.Trainer) -> None:
        """Begins at the step the trainer starts or resumes from."""
        self._last_step = trainer.global_step

    def ended_step(self, trainer: pl.Trainer) -> bool:
        """Says whether the batch that has just ended was the last of an optimizer step."""
        ended = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        return ended

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Says whether the trainer logs the step that has just ended."""
        return logs_step(trainer, trainer.global_step)


def logs_step(trainer: pl.Trainer, step: int) -> bool:
    """Says whether the trainer logs an optimizer step, by whose end it has done `step` of them.

    It does every so many steps, and when it stops: of a figure that is not logged anew then, it
    would repeat an old value.
    """
    if not ever_logs(trainer):
        return False
    stops = trainer.should_stop or 0 <= trainer.max_steps <= step
    return stops or step % _interval(trainer) == 0


def ever_logs(trainer: pl.Trainer) -> bool:
    """Says whether the trainer logs any step; it does not with `log_every_n_steps=0`."""
    return _interval(trainer) > 0


def _interval(trainer: pl.Trainer) -> int:
    return trainer.log_every_n_steps  # type: ignore[attr-defined]


def on_host(metrics: dict[str, float]) -> dict[str, Tensor]:
    """Float64 tensors on the CPU, for `log_dict` at a training step.

    Lightning puts plain numbers on the module's device and, where they are shown in the progress
    bar, waits at every step to read them back.
    """
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
