"""Lightning without its advice."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

IRRELEVANT = (
    r".*does not have many workers",
    r".*isinstance.treespec, LeafSpec",
    r".*GPU available but not used",
    r"Experiment logs directory .* exists and is not empty",
    r"You defined a `validation_step` but have no",
    r"The number of training batches .* is smaller than the logging interval",
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Inside, Lightning says no more than errors."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in IRRELEVANT:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
