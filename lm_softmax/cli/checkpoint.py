"""What a checkpoint gives to the command line: defaults of options, and choices already made."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lm_softmax import factory
from lm_softmax.checkpoint import PARTS, Checkpoint
from lm_softmax.cli.checkpoint_io import FOLDER, LAST, PREVIOUS, REQUEUED
from lm_softmax.cli.last_state import has_stopped
from lm_softmax.module import LanguageModel


class RunCheckpoint(Checkpoint):
    """A checkpoint that a command starts from.

    Args:
        path: The file, or "last" or "best" of a run. "last" is the newest one that is whole.
        run: The run's folder.

    Attributes:
        unknown: What is wrong with classes that `defaults` had to leave out.
        passed_over: What is wrong with newer ones than the one that "last" means.

    Raises:
        ValueError: If there is no such file, it is damaged, or there is no language model in it.
    """

    def __init__(self, path: str, run: str | None) -> None:
        self.unknown: list[str] = []
        self.passed_over: list[str] = []
        if path in ("last", "best") and run is None:
            raise ValueError(f"--ckpt_path {path} needs the run's folder: add --run DIR")
        if path == "last":
            self._read_newest(Path(str(run)))
        else:
            super().__init__(Path(str(run), FOLDER, "best.ckpt") if path == "best" else path)

    @staticmethod
    def candidates(run: Path) -> list[Path]:
        """What a run may go on from, newest first."""
        files = [run / FOLDER / name for name in (LAST, PREVIOUS)]
        files = [file for file in [*files, *run.glob(REQUEUED)] if file.is_file()]
        return sorted(files, key=lambda file: -file.stat().st_mtime_ns)

    def _read_newest(self, run: Path) -> None:
        files = self.candidates(run)
        if not files:
            raise ValueError(f"no checkpoint {run / FOLDER / LAST}")
        for number, file in enumerate(files, start=1):
            try:
                super().__init__(file)
                return
            except ValueError as error:
                if number == len(files):
                    raise
                self.passed_over.append(str(error))

    @property
    def folder(self) -> Path:
        """The folder of the run that wrote it, or else the one it lies in."""
        parent = self.path.parent
        return parent.parent if parent.name == "checkpoints" else parent

    def is_in(self, folder: Path | None) -> bool:
        """Whether the run in a folder wrote it."""
        return folder is not None and self.path.resolve().is_relative_to(folder.resolve())

    def check_data(self, options: Mapping[str, Any]) -> None:
        """Raises a ValueError for an option that would make another vocabulary."""
        for name in ("tokenizer", "max_vocab_size", "min_count"):
            if options[name] != self.data_options.get(name, options[name]):
                raise ValueError(
                    f"data.{name}={options[name]} comes too late for {self.path}, whose vocabulary "
                    f"was made with {self.data_options[name]}"
                )

    def check(self, model: LanguageModel) -> None:
        """Raises a ValueError that names what differs if it holds another model than this."""
        try:
            model.check_checkpoint(self.content)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def end(self, trainer: pl.Trainer) -> str | None:
        """Why a fit cannot do a step from here, and what to change; None where it can.

        Raises:
            ValueError: If there is no training to go on with.
        """
        if "loops" not in self.content:
            raise ValueError(f"{self.path} holds weights alone, no training to go on with")
        if not all("replica" in each for each in self.content.get("moments", [])):
            raise ValueError(
                f"{self.path} is of an earlier version, whose trainings cannot be gone on with: "
                "begin anew, or give its file to generate, validate or test"
            )
        max_epochs, max_steps = trainer.max_epochs, trainer.max_steps
        if 0 <= max_steps <= self.step:
            return (
                f"has done {self.step} steps of trainer.max_steps={max_steps} already: "
                "raise trainer.max_steps"
            )
        loops = self.content["loops"]["fit_loop"]
        epochs = loops["epoch_progress"]["current"]
        whole = loops["epoch_loop.batch_progress"]["is_last_batch"]
        done = epochs["started" if whole else "processed"]
        if max_epochs is not None and 0 <= max_epochs <= done:
            return (
                f"has done {done} epochs of trainer.max_epochs={max_epochs} already: "
                "raise trainer.max_epochs"
            )
        enough = self.step >= (trainer.min_steps or 0) and done >= (trainer.min_epochs or 0)
        for callback in trainer.early_stopping_callbacks if enough else []:
            state = self.content["callbacks"].get(callback.state_key, {})
            if has_stopped(state):
                return (
                    f"has done {self.step} steps, after which early stopping ended the run: "
                    f"leave EarlyStopping of {callback.monitor} out"
                )
        return None

    def defaults(self, data_options: Iterable[str]) -> dict[str, Any]:
        """Values of the options `model.*` and `data.*` of the run that wrote the checkpoint.

        Args:
            data_options: The data module's options; others of the checkpoint are left out.
        """
        found: dict[str, Any] = {"data.vocab_path": str(self.path)}
        model = {**self.hparams, **self.hparams["requested"]}
        bases = {**PARTS, "optimizer": Optimizer, "lr_scheduler": LRScheduler}
        for name, base in bases.items():
            if model[name] is None:
                continue
            try:  # before the parser sees it, which would import whatever a class path names
                found[f"model.{name}"] = factory.complete(model[name], base, f"model.{name}")
            except ValueError as error:
                self.unknown.append(str(error))
        found["model.tie_weights"] = model["tie_weights"]
        for name in data_options:
            if name in self.data_options:
                found.setdefault(f"data.{name}", self.data_options[name])
        return found

    def pin(self, model: Mapping[str, Any]) -> dict[str, factory.Spec]:
        """Encoder and head as they were built, where they are still asked for as they were.

        A choice that was derived from the data or from files, such as `cutoffs: auto`, so is not
        derived again.

        Args:
            model: The options of the model, `{"encoder": {"class_path", "init_args"}, ...}`.
        """
        return {
            name: self.hparams[name]
            for name, base in PARTS.items()
            if factory.complete(factory.describe(model[name], name), base, name)
            == factory.complete(self.hparams["requested"][name], base, name)
        }
