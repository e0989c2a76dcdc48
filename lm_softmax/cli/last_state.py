"""The state that a run can go on from: when it is written, and what may interrupt a step."""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lm_softmax.cli.checkpoint_io import LAST, REQUEUED
from lm_softmax.cli.metrics_table import TableLogger

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
LOOK_EVERY = 20  # steps between two looks at the clock, at which all processes agree
Handler = Callable[[int, FrameType | None], Any]


def has_stopped(state: Mapping[str, Any]) -> bool:
    """Whether the `EarlyStopping` with this state has asked the trainer to stop."""
    reason: int = state.get("stopping_reason", EarlyStoppingReason.NOT_STOPPED.value)
    return reason != EarlyStoppingReason.NOT_STOPPED.value


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`: after each validation, at the end of an epoch, and on interrupts.

    `ModelCheckpoint(save_last=True)` writes it only where a best one was written too. After an
    error the file stays as it was: the state of a step that failed is worth nothing, and where one
    process of several failed, the others would wait for it for ever. It stays as well where an
    interrupt hits a step or a validation, which a resumed run then does again from its start.

    Every checkpoint holds how many rows of metrics.csv were written before it, and the metrics that
    other callbacks look at. Where early stopping has asked for the end, a resumed run is at it.
    """

    def __init__(self) -> None:
        super().__init__(filename=Path(LAST).stem, enable_version_counter=False)
        self._trained = self._in_step = False
        self._metrics: dict[str, Tensor] = {}  # of the checkpoint that a run goes on from

    def save(self, trainer: pl.Trainer) -> None:
        """Writes the file, unless the step has one; what a requeued job left goes."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        if trainer.is_global_zero:
            for file in Path(trainer.default_root_dir).glob(REQUEUED):
                file.unlink()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is trained yet; what the run goes on from is there."""
        super().on_train_start(trainer, pl_module)
        self._trained = self._in_step = False
        self._last_global_step_saved = trainer.global_step
        trainer.callback_metrics.update(self._metrics)
        if any(has_stopped(callback.state_dict()) for callback in trainer.early_stopping_callbacks):
            trainer.should_stop = True

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """From here on, until the batch ends, the state is neither that before nor that after."""
        self._in_step = True

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Notes that there is something to save."""
        self._trained, self._in_step = True, False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves, with what the validation came to."""
        self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves, also where the run ends between two validations."""
        self.save(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Saves if the run was interrupted between two steps, after one of its own."""
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if interrupted and self._trained and not (self._in_step or trainer.validating):
            self.save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes back a batch that was fetched but not trained on, and counts what was logged."""
        checkpoint["num_rows"] = _flushed(trainer)
        checkpoint["callback_metrics"] = {
            name: value.detach().cpu() for name, value in trainer.callback_metrics.items()
        }
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.batch_progress"]
        done = progress["current"]["completed"]
        if progress["current"]["processed"] == progress["current"]["ready"]:
            return
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, counts["completed"]))
        progress["is_last_batch"] = False
        for loader in loop["state_dict"].get("combined_loader", []):
            if "given" in loader:  # the position of `TextDataModule`'s loader
                loader["given"] = done

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the metrics for the start of the training."""
        self._metrics = checkpoint.get("callback_metrics", {})


class BetweenSteps(pl.Callback):
    """What happens between two steps only: a checkpoint from time to time, and interrupts.

    A checkpoint in the midst of a step could not be gone on from. Ctrl-C, SIGTERM and the signal
    that has Lightning requeue a SLURM job therefore wait for the end of the step that they hit, and
    with several processes for that of the same step in all of them; a second Ctrl-C does not wait.
    In a validation Ctrl-C and SIGTERM act at once, where there is one process.

    Args:
        every_n_steps: Write `last.ckpt` after so many optimizer steps; None for no such rule.
        every_minutes: Write it after so many minutes; None for no such rule.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(
        self, *, every_n_steps: int | None = None, every_minutes: float | None = 10.0
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_minutes", every_minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: it must be positive, or null for never")
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self._handlers: dict[int, Handler] = {}
        self._noted = 0  # the signal that waits
        self._in_step, self._alone, self._ends = False, True, False
        self._saved_at, self._saved_step = 0.0, 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes over SIGTERM, for which Lightning's handler would wait for the other processes.

        They may be in another collective operation at that moment, and all wait for ever.
        """
        self._noted, self._in_step, self._ends = 0, False, False
        self._alone = trainer.world_size == 1
        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = self._note

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over the other signals."""
        self._saved_at, self._saved_step = monotonic(), trainer.global_step
        for name in SIGNALS:
            handler = signal.getsignal(number) if (number := getattr(signal, name, 0)) else None
            if callable(handler) and not isinstance(handler, signal.Handlers):
                self._handlers[number] = handler
                _set(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._ends and number == signal.SIGTERM:
            return
        ends = number in (signal.SIGINT, signal.SIGTERM)  # the others save and go on
        now = ends and self._alone and not self._in_step
        if now or self._noted == number == signal.SIGINT:
            self._noted = 0
            self._deliver(number, frame)
        else:
            self._noted = number

    def _deliver(self, number: int, frame: FrameType | None = None) -> None:
        if number == signal.SIGTERM:
            self._ends = True  # a second one is not to stop what ends the run
            raise SIGTERMException
        self._handlers[number](number, frame)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Delivers the signal that came in the last step, and saves where it is time to."""
        self._in_step = False
        noted = _agreed(trainer, pl_module, self._noted)
        if noted:
            self._noted = 0
            self._deliver(noted)
        if self._is_due(trainer):
            self._saved_at, self._saved_step = monotonic(), trainer.global_step
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, LastCheckpoint):
                    callback.save(trainer)
        self._in_step = True

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether to save now: between two optimizer steps alone, in all processes or in none."""
        steps = trainer.global_step - self._saved_step
        if not steps or trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches:
            return False
        if self.every_n_steps is not None and steps >= self.every_n_steps:
            return True
        if self.every_minutes is None or trainer.global_step % LOOK_EVERY:
            return False
        late = monotonic() - self._saved_at >= 60 * self.every_minutes
        return bool(trainer.strategy.broadcast(late)) if trainer.world_size > 1 else late

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation may be interrupted, save by what waits already."""
        self._in_step = bool(self._noted)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the signals back."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Gives the signals back."""
        self._release()

    def _release(self) -> None:
        self._ends = True  # it is being saved, and what follows is short
        for number, handler in self._handlers.items():
            _set(number, handler)
        self._handlers.clear()


class FinalValidation(pl.Callback):
    """Validates where `max_steps` ends a run, wherever the regular validations are."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Asks the trainer to stop, before which it validates, as it does not for `max_steps`."""
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True


def _flushed(trainer: pl.Trainer) -> int | None:
    """Number of rows of metrics.csv; what was logged until now is on the disk, the events too."""
    num_rows = None
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TableLogger):
                num_rows = logger.experiment.num_rows
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
    return num_rows


def _agreed(trainer: pl.Trainer, pl_module: pl.LightningModule, number: int) -> int:
    """The signal that came to any process; each comes to this line after the same step."""
    if trainer.world_size == 1:
        return number
    noted = torch.tensor(number, device=pl_module.device)
    return int(trainer.strategy.reduce(noted, reduce_op="max"))


def _set(number: int, handler: Any) -> None:
    """Sets a handler, where this thread may."""
    try:
        signal.signal(number, handler)
    except ValueError:  # not the main thread
        return
