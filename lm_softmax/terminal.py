"""What commands share: errors of one line, and a standard output that is full or not read."""

import argparse
import os
import sys
from contextlib import suppress
from textwrap import shorten
from typing import NoReturn

LONGEST = 1000  # of a message
SIGPIPE = 13
READER_LEFT = 128 + SIGPIPE  # exit code


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line and exit code 2."""
        self.exit(2, f"error: {shorten(message, LONGEST, placeholder=' ...')}\n")


def check_streams(parser: argparse.ArgumentParser) -> None:
    """Ends the program if there is no standard output; without standard error it is silent."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  to the end of the process
    if sys.stdout is None:
        parser.error("standard output is closed")


def drop_output() -> None:
    """Lets go of what standard output does not take, lest Python tries again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
