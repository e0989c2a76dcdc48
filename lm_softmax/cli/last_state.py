"""What a run ends with: a checkpoint of its very last state, and a validation of it."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`: written after each validation, at the end of an epoch, and on Ctrl-C.

    `ModelCheckpoint(save_last=True)` writes it only where a best one was written too. After any
    other error the file stays as it was: the state of a step that failed is worth nothing, and
    where one process of several failed, the others would wait for it for ever.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False)
        self._trained = self._interrupted = False

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Notes that there is something to save."""
        self._trained = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves, also where the run ends between two validations."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Saves if the run was interrupted after a step of its own."""
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if interrupted and self._trained and not self._should_skip_saving_checkpoint(trainer):
            self._interrupted = True
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes back a batch that was fetched but not trained on when Ctrl-C came."""
        if not self._interrupted:
            return
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.batch_progress"]
        done = progress["current"]["completed"]
        if progress["current"]["processed"] == progress["current"]["ready"]:
            return
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, counts["completed"]))
        for loader in loop["state_dict"].get("combined_loader", []):
            if "given" in loader:  # the position of `TextDataModule`'s loader
                loader["given"] = done


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
