"""The command line: `train.py fit | validate | test | predict`."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lm_softmax.allocator import keep_pages
from lm_softmax.cli.command import TerminatedError, TrainCLI
from lm_softmax.cli.messages import user_error
from lm_softmax.terminal import READER_LEFT, Parser, check_streams, drop_output

__all__ = ["TrainCLI", "main"]

IRRELEVANT_WARNINGS = (
    r".*does not have many workers",  # batches are slices of a memory-mapped file
    r".*isinstance.treespec, LeafSpec",  # Lightning on a newer torch
    r"FSDP2-wrapped module .* returned a view tensor",  # nothing here changes one in place
    r"Checkpoint directory .* exists and is not empty",  # a resumed run
    r".*ModelCheckpoint.monitor='val/ppl'.. could not find",  # no validation yet
    r"Experiment logs directory .* exists and is not empty",  # its rows are kept
)
IRRELEVANT_LOGS = re.compile(
    r"(GPU|TPU|HPU) available|💡 Tip|`weights_only` was not set|Loading `train_dataloader`|"
    r"(\[rank: \d+\] )?Seed set to"
)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; errors of the user end in one line and exit code 2, Ctrl-C in 130.

    SIGTERM ends it in 143, after a checkpoint where it trained.

    Args:
        args: Words of the command line; those of the process if not given.

    Raises:
        SystemExit: If the command did not come to its end.
    """
    check_streams(Parser())
    keep_pages()
    try:
        with _quiet():
            TrainCLI(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        sys.stderr.write(f"\n{str(error) or 'interrupted'}\n")
        sys.exit(130)
    except TerminatedError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(143)
    except BrokenPipeError:  # whoever read has enough
        drop_output()
        sys.exit(READER_LEFT)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:
            drop_output()
        if (line := user_error(error)) is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what Lightning and jsonargparse say about themselves."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    loggers = map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in handlers:
        handler.addFilter(_is_relevant)
    try:
        with warnings.catch_warnings():
            for message in IRRELEVANT_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    return IRRELEVANT_LOGS.match(record.getMessage()) is None
