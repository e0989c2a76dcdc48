"""The LightningCLI behind `train.py`."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

import lm_softmax.schedule  # noqa: F401  a class is known by its name once it is imported
from lm_softmax.callbacks import RunSummary
from lm_softmax.cli.callbacks import EVALUATION_CALLBACKS, FIT_CALLBACKS, callbacks_of
from lm_softmax.cli.checkpoint import RunCheckpoint
from lm_softmax.cli.checkpoint_io import AtomicCheckpointIO
from lm_softmax.cli.given import Given
from lm_softmax.cli.messages import option_error
from lm_softmax.cli.nulls import check_nulls
from lm_softmax.cli.predictions import NUM_TOKENS, PredictionWriter
from lm_softmax.cli.run_folder import RunFolder
from lm_softmax.cli.run_start import CONFIG, RunStart
from lm_softmax.data import TextDataModule
from lm_softmax.module import LanguageModel
from lm_softmax.parallel import check_sizes
from lm_softmax.vocab import Vocab

GROUPS = {"model": LanguageModel, "data": TextDataModule, "trainer": pl.Trainer}
PREDICTIONS = "predictions.jsonl"


class TerminatedError(Exception):
    """SIGTERM has ended the command; says what it can go on from."""


class TrainCLI(LightningCLI):
    """`fit | validate | test | predict` of a `LanguageModel` on a `TextDataModule`.

    Beyond LightningCLI: a run has one folder; the vocabulary goes from the data to the model; a
    checkpoint brings the options it was made with as defaults, and its vocabulary; a wrong option
    is a `ValueError` of one line.

    Args:
        args: The words of the command line.
    """

    config_init: Any
    model: LanguageModel
    datamodule: TextDataModule

    def __init__(self, args: Sequence[str]) -> None:
        self.given = Given.read(args)
        self.folder: RunFolder | None = None
        self.checkpoint: RunCheckpoint | None = None
        if self.given.ckpt_path is not None:
            self.checkpoint = RunCheckpoint(self.given.ckpt_path, self.given.run)
            _say_what_was_passed_over(self.checkpoint)
        self.parsers: dict[str, LightningArgumentParser] = {}
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            LanguageModel,
            TextDataModule,
            save_config_callback=RunStart,
            seed_everything_default=1,
            parser_kwargs={**strict, **{name: dict(strict) for name in self.subcommands()}},
            args=self._with_config_of_run(args),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is asked for, or all; each costs a tenth of a second."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in known if name == self.given.subcommand} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--run`, the links from data to model, and the defaults."""
        subcommand = list(self.subcommands())[len(self.parsers)]
        self.parsers[subcommand] = parser
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Folder of the run; by default runs/<config>-<head>-<time>.",
        )
        if subcommand == "predict":
            parser.add_argument(
                "--num_tokens",
                type=NonNegativeInt,
                default=NUM_TOKENS,
                help="Tokens to continue each row by, greedily; 0 for no continuations.",
            )
        parser.link_arguments("data.vocab", "model.vocab", apply_on="instantiate")
        parser.link_arguments("data.vocab", "model.counts", _counts, apply_on="instantiate")
        fits = self.given.subcommand == "fit"
        parser.set_defaults({"trainer.callbacks": FIT_CALLBACKS if fits else EVALUATION_CALLBACKS})
        if self.checkpoint is not None:
            parser.set_defaults(self.checkpoint.defaults(parser.get_defaults().data.keys()))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the words, and hands choices that a checkpoint has made already to the model.

        Raises:
            ValueError: If an option is wrong.
        """
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise ValueError(self._option_error(str(error))) from error
        subcommand = self.config.subcommand
        for name, cls in GROUPS.items():
            if not isinstance(value := self.config[subcommand].get(name), Namespace):
                raise ValueError(f"{name} is {value!r}: give its options, or leave it out")
            check_nulls(value.as_dict(), cls, name)
        if self.checkpoint is not None:
            self.checkpoint.check_data(self.config[subcommand].data)
            pinned = self.checkpoint.pin(self.config[subcommand].model.as_dict())
            self.config = parser.parse_object({subcommand: {"model": pinned}}, self.config)
        elif self.config[subcommand].ckpt_path is not None:
            raise ValueError("ckpt_path stands in a config: give --ckpt_path instead")
        self.config[subcommand].ckpt_path = None  # LightningCLI would parse its contents again

    def before_instantiate_classes(self) -> None:
        """Decides on the folder, before the data are read.

        Raises:
            ValueError: If it exists already, or there is nothing to evaluate.
        """
        config, folder = self.config[self.subcommand], None
        if config.trainer.default_root_dir is not None:
            raise ValueError("trainer.default_root_dir is the run's folder: give --run instead")
        if config.run is not None:
            folder = Path(config.run)
        elif self.subcommand == "fit":
            head = config.model.head.class_path.rpartition(".")[2]
            folder = RunFolder.name(self.given.configs, head)
        elif self.checkpoint is None:
            raise ValueError(_needs_checkpoint(str(self.subcommand)))
        resumes = self.checkpoint is not None and self.checkpoint.is_in(folder)
        if folder is not None and (self.subcommand == "fit" or not resumes):
            self.folder = RunFolder(folder, resumes=resumes, numbered=config.run is None)
            vocab_path = config.data.vocab_path
            if self.checkpoint is not None and vocab_path == str(self.checkpoint.path):
                vocab_path = self.checkpoint.data_options.get("vocab_path")
            num_rows = self.checkpoint.content.get("num_rows") if self.checkpoint else None
            self.save_config_kwargs = {
                "folder": self.folder,
                "vocab_path": vocab_path,
                "step": self._first_step if resumes else 0,
                "num_rows": num_rows,
            }
        else:  # an evaluation says its figures and leaves the run as it is
            self.save_config_callback = None

    def instantiate_classes(self) -> None:
        """Makes data, model and trainer; if that fails, the folder goes."""
        try:
            super().instantiate_classes()
        except BaseException:
            if self.folder is not None:
                self.folder.remove()
            raise

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Makes the trainer, with loggers and checkpoints in the run's folder."""
        if self.checkpoint is not None:
            self.checkpoint.check(self.model)
        trainer = self.config_init[self.subcommand].trainer
        if trainer.logger in (None, True):
            trainer.logger = self.folder.loggers(self._first_step) if self.folder else False
        path = None if self.folder is None else self.folder.path
        if path is not None:
            trainer.default_root_dir = path
        callbacks = callbacks_of(trainer, path)
        try:
            made = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except RuntimeError as error:  # Lightning's way to refuse some combinations of options
            raise ValueError(str(error)) from error
        check_sizes(made.strategy)
        # RunStart goes first: a summary tells of what it writes
        made.callbacks.sort(key=lambda one: not isinstance(one, RunStart))  # type: ignore[attr-defined]
        if type(made.strategy.checkpoint_io) is TorchCheckpointIO:  # else the user's choice
            made.strategy.checkpoint_io = AtomicCheckpointIO()
        return made

    def fit(self, **options: Any) -> None:
        """Trains, and closes with what came of it; a run that does no step leaves no folder.

        Where `last` is the end of the run, it says so. What a kill may have kept the run from
        writing after its last checkpoint is made up for.
        """
        assert self.folder is not None
        path = self.checkpoint and self.checkpoint.path
        try:
            if self.checkpoint is not None:
                end = self.checkpoint.end(self.trainer)
                if end and self.given.ckpt_path != "last":
                    raise ValueError(f"{path} {end}")
                if end:
                    _say(f"nothing is left to do: {path} {end} to train on")
                    if self.folder.is_closed(self._first_step):
                        return
            self.trainer.fit(**options | {"ckpt_path": path, "weights_only": True})
        except BaseException as error:
            if self.trainer.global_step in (0, self._first_step):
                self.folder.remove()
            if _is_ctrl_c(error):
                raise KeyboardInterrupt(self.folder.last_words()) from error
            if isinstance(error, SIGTERMException):
                raise TerminatedError(self.folder.last_words()) from error
            raise
        self.folder.remove(only_empty=True)  # trainer.fast_dev_run writes nothing
        for callback in self._callbacks:
            if isinstance(callback, RunSummary):
                for line in callback.lines():
                    _say(line)

    def validate(self, **options: Any) -> None:
        """Prints the metrics of the validation split."""
        self._evaluate(self.trainer.validate, **options)

    def test(self, **options: Any) -> None:
        """Prints the metrics of the test split."""
        self._evaluate(self.trainer.test, **options)

    def predict(self, **options: Any) -> None:
        """Writes the log-probability of each token, and continuations, into the run's folder."""
        assert self.checkpoint is not None
        folder = self.folder.path if self.folder else self.checkpoint.folder
        num_tokens = self.config_init["predict"].num_tokens
        try:
            writer = PredictionWriter(folder / PREDICTIONS, num_tokens)
        except ValueError:
            if self.folder is not None:
                self.folder.remove()
            raise
        self._callbacks.append(writer)
        self._evaluate(self.trainer.predict, **options | {"return_predictions": False})
        what = "log-probabilities of each token"
        what += " and a continuation of each row" if num_tokens else ""
        if writer.path is not None:
            _say(f"{what}: {writer.path}")

    def _evaluate(self, run: Callable[..., Any], **options: Any) -> None:
        assert self.checkpoint is not None
        # What training's own callbacks have in the checkpoint is of no use here.
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
        try:
            run(**options | {"ckpt_path": self.checkpoint.path, "weights_only": True})
        except BaseException as error:
            if self.folder is not None:
                self.folder.remove()
            if _is_ctrl_c(error):
                raise KeyboardInterrupt("interrupted") from error
            if isinstance(error, SIGTERMException):
                raise TerminatedError("interrupted") from error
            raise

    def _option_error(self, message: str) -> str:
        subcommand = self.given.subcommand or "fit"
        if "arguments are required" in message:
            if self.checkpoint is not None and self.checkpoint.unknown:
                return f"{self.checkpoint.unknown[0]}; a --config that names it does"
            if self.checkpoint is None and subcommand != "fit":
                return _needs_checkpoint(subcommand)
        return option_error(message, self.parsers[subcommand].get_defaults().keys())

    @property
    def _callbacks(self) -> list[pl.Callback]:
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return callbacks

    @property
    def _first_step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step

    def _with_config_of_run(self, args: Sequence[str]) -> list[str]:
        """A run that goes on, and is given no config, has its own."""
        given, args = self.given, list(args)
        run = Path(given.run) if given.run else None
        goes_on = self.checkpoint is not None and self.checkpoint.is_in(run)
        if given.subcommand == "fit" and run and goes_on and not given.configs:
            config = run / CONFIG
            if config.is_file():
                args.insert(args.index("fit") + 1, f"--config={config}")
        return args


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether the trainer was interrupted, which it turns into an exit."""
    return isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)


@rank_zero_only
def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


@rank_zero_only
def _say_what_was_passed_over(checkpoint: RunCheckpoint) -> None:
    for reason in checkpoint.passed_over:
        sys.stderr.write(f"warning: {reason}; going on from {checkpoint.path} instead\n")


def _needs_checkpoint(subcommand: str) -> str:
    return f"{subcommand} needs a trained model: give --ckpt_path FILE"


def _counts(vocab: Vocab) -> Tensor:
    return vocab.counts
