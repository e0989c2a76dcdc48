"""The callbacks of a command: what it has by default, and what of that it goes without."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar

from lm_softmax.cli.checkpoint_io import FOLDER
from lm_softmax.cli.last_state import BetweenSteps

BEST = {
    "monitor": "val/ppl",
    "mode": "min",
    "filename": "best",
    "save_on_train_epoch_end": False,  # with the validation, and so before `last.ckpt`
    "auto_insert_metric_name": False,
    "enable_version_counter": False,
}
BAR = {
    "class_path": "lightning.pytorch.callbacks.TQDMProgressBar",
    "init_args": {"refresh_rate": 10},
}
EVALUATION_CALLBACKS = [
    {"class_path": "lm_softmax.callbacks.PerplexityMonitor"},
    BAR,
]
FIT_CALLBACKS = [
    {"class_path": "lm_softmax.cli.last_state.BetweenSteps"},  # first: not a part of the step
    {"class_path": "lm_softmax.callbacks.StepTimeMonitor"},
    {"class_path": "lm_softmax.callbacks.MemoryMonitor"},
    {"class_path": "lm_softmax.callbacks.PerplexityMonitor"},
    {"class_path": "lm_softmax.callbacks.SampleText"},
    {"class_path": "lm_softmax.callbacks.RunSummary"},
    {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": BEST},
    {"class_path": "lm_softmax.cli.last_state.LastCheckpoint"},
    {"class_path": "lm_softmax.cli.last_state.FinalValidation"},
    {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
    BAR,
]


def callbacks_of(trainer: Namespace, folder: Path | None) -> list[pl.Callback]:
    """The callbacks as the trainer takes them.

    Those that its switches turn off are left out, as in the list they are an error. Of several
    `BetweenSteps` the one that was given last comes first, before those that watch the step.
    Checkpoints without a folder get that of the run.

    Args:
        trainer: The options of the trainer.
        folder: The run's folder.
    """
    given = trainer.callbacks or []
    unwanted = _switched_off(trainer)
    callbacks = [
        callback
        for callback in (given if isinstance(given, list) else [given])
        if not isinstance(callback, unwanted)
    ]
    if between := [each for each in callbacks if isinstance(each, BetweenSteps)]:
        callbacks = [between[-1], *(each for each in callbacks if each not in between)]
    for callback in callbacks:
        if folder and isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = os.path.abspath(folder / FOLDER)
    return callbacks


def _switched_off(trainer: Namespace) -> tuple[type[pl.Callback], ...]:
    switches: dict[type[pl.Callback], Any] = {
        ProgressBar: trainer.enable_progress_bar is not False,
        ModelCheckpoint: trainer.enable_checkpointing is not False,
        LearningRateMonitor: trainer.logger,
    }
    return tuple(kind for kind, on in switches.items() if not on)
