"""Lightning's part: validation perplexity, and a short training of a compressed model."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl

from lm_softmax.data import TextDataModule
from lm_softmax.module import LanguageModel

TRAINER: dict[str, Any] = {
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def perplexity(
    model: LanguageModel, data: TextDataModule, device: str, num_batches: int | None
) -> float:
    """Exact perplexity of the validation split, or of its first batches."""
    limit = 1.0 if num_batches is None else num_batches
    with _quiet():
        trainer = pl.Trainer(**TRAINER, accelerator=device, limit_val_batches=limit)
        (metrics,) = trainer.validate(model, datamodule=data, verbose=False)
    return metrics["val/ppl"]


def finetune(
    model: LanguageModel,
    data: TextDataModule,
    device: str,
    *,
    minutes: float | None,
    num_steps: int | None,
    lr: float,
) -> int:
    """Trains all weights with the optimizer of the run, at a constant learning rate.

    Args:
        model: Trained in place.
        data: Its training split.
        device: "cpu" or "cuda".
        minutes: Stop after the step that ends later.
        num_steps: Stop after so many steps.
        lr: Learning rate.

    Returns:
        Steps that were done.

    Raises:
        ValueError: If the training diverges.
    """
    optimizer = model.hparams["optimizer"]
    model.hparams["optimizer"] = {
        **optimizer,
        "init_args": {**optimizer["init_args"], "lr": lr},
    }
    model.hparams["lr_scheduler"] = None
    with _quiet():
        trainer = pl.Trainer(
            **TRAINER,
            accelerator=device,
            max_time=None if minutes is None else timedelta(minutes=minutes),
            max_epochs=-1,
            max_steps=-1 if num_steps is None else num_steps,
            limit_val_batches=0,
            gradient_clip_val=1.0,
        )
        trainer.fit(model.train(), datamodule=data)
    model.eval()
    return trainer.global_step


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what Lightning says about itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*does not have many workers")
            warnings.filterwarnings("ignore", r".*isinstance.treespec, LeafSpec")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
