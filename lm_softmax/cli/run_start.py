"""What a command writes into the run's folder before all else, once nothing can refuse it."""

import os
from pathlib import Path

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from lm_softmax.cli.run_folder import RunFolder

CONFIG = "config.yaml"


class RunStart(SaveConfigCallback):
    """Writes the configuration, so that `fit --config` repeats the run, and goes back to its rows.

    A training does so when it starts: its text is found and dealt to the processes by then, and
    whatever is refused before has changed nothing in the folder of a run that was to go on.

    Args:
        parser: Writes the configuration.
        config: What to write.
        folder: Of the run.
        vocab_path: In place of the configuration's, where a checkpoint brings the vocabulary.
        step: The one to go on from; 0 for a new run.
        num_rows: Rows of metrics.csv that belong to the steps before; None for those whose number
            is below `step`.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        *,
        folder: RunFolder,
        vocab_path: str | None,
        step: int,
        num_rows: int | None,
    ) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder, self.vocab_path = folder, vocab_path
        self.step, self.num_rows = step, num_rows
        self._started = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes for an evaluation, whose folder is new, and goes where it is refused."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes for a training."""
        self._started = True
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")
        if self.step:
            self.folder.keep_rows(trainer.loggers, self.num_rows, self.step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Of a run that had no step to do, and is closed with its summary."""
        if self._started:
            return
        if self.step:
            self.folder.keep_rows(trainer.loggers, self.num_rows, self.step)
        elif trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves out what belongs to this run alone: its folder, and a checkpoint's vocabulary."""
        config = self.config.clone()
        config.run, config.data.vocab_path = None, self.vocab_path
        self.folder.path.mkdir(parents=True, exist_ok=True)
        path = Path(self.folder.path, CONFIG)
        temporary = path.with_name(f".{os.getpid()}.{CONFIG}")
        try:
            self.parser.save(config, temporary, skip_none=False, overwrite=True)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
