"""What has to be known of a command line before its parser is made."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_softmax.cli.checkpoint import RunCheckpoint

SUBCOMMANDS = ("fit", "validate", "test", "predict")


@dataclass
class Given:
    """The options that decide on the parser's defaults.

    Attributes:
        subcommand: One of `SUBCOMMANDS`.
        ckpt_path: A file, "last" or "best"; "last" too for a run that SLURM starts once more.
        run: The run's folder.
        configs: Configuration files, in their order.
    """

    subcommand: str | None
    ckpt_path: str | None
    run: str | None
    configs: list[str]

    @classmethod
    def read(cls, args: Sequence[str]) -> "Given":
        """Look for a few options, and leave every error to the parser."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for option in ("--ckpt_path", "--run"):
            parser.add_argument(option, nargs="?")
        parser.add_argument("-c", "--config", nargs="?", action="append", default=[])
        found, others = parser.parse_known_args(args)
        subcommand = next((word for word in others if word in SUBCOMMANDS), None)
        configs = [config for config in found.config if config]
        if subcommand == "fit" and found.run and found.ckpt_path is None and _is_requeued():
            found.ckpt_path = "last" if RunCheckpoint.candidates(Path(found.run)) else None
        return cls(subcommand, found.ckpt_path, found.run, configs)


def _is_requeued() -> bool:
    """Whether SLURM has put the job back in the queue and starts its command once more."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
