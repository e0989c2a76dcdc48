"""The command: its subcommands, their options, and errors of one line."""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from lm_softmax.allocator import keep_pages
from lm_softmax.benchmark.machine import machine, one_line, versions
from lm_softmax.benchmark.processes import PAGES_NOT_KEPT

PROGRAM = "python -m lm_softmax.benchmark"
FORMAT = 1  # of the JSON files: raise it when what a key means changes


def main(args: Sequence[str] | None = None) -> int:
    """Measures, prints a table and writes the files; returns the exit code.

    Args:
        args: Words of the command line; those of the process if not given.
    """
    words = list(sys.argv[1:] if args is None else args)
    parser = make_parser()
    options = parser.parse_args(words)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        _prepare(options)
        options.run(options, Report(words, options))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    except (ValueError, OSError) as error:
        parser.error(str(error))
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Other processes and temporary files are not left behind."""
    raise SystemExit(128 + number)


def make_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand's module adds its own."""
    from lm_softmax.benchmark import (
        cutoffs,
        data_command,
        decode_command,
        loop_command,
        train_command,
    )

    parser = _Parser(prog=PROGRAM, description="Times output heads beside their peers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (train_command, loop_command, decode_command, cutoffs, data_command):
        module.add_parser(commands, add_common_options)
    return parser


class Report:
    """What every file says of how it came about.

    Args:
        words: The command line.
        options: As they were understood.
    """

    def __init__(self, words: Sequence[str], options: argparse.Namespace) -> None:
        self.command = shlex.join([*PROGRAM.split(), *words])
        self.machine = machine(options.device)
        self.versions = versions(options.device)
        hidden = {"run", "command"}
        self.options = {
            name: _plain(value) for name, value in vars(options).items() if name not in hidden
        }

    def header(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": FORMAT,
            "command": self.command,
            "machine": self.machine,
            "versions": self.versions,
            "options": self.options,
        }

    def machine_line(self) -> str:
        """Machine and versions, for a reader."""
        found = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        pages = "pages kept" if self.options["keep_pages"] else "pages not kept"
        if self.options.get("as_used"):
            pages = "a process each, pages kept as train.py keeps them, not by plain loops"
        return f"{one_line(self.machine)}; {found}; {pages}."


def say(line: str) -> None:
    """Tells someone who watches how far it is."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def hush() -> None:
    """Takes the last line back."""
    say("")


def add_command(
    commands: Any, name: str, summary: str, description: str, **defaults: Any
) -> argparse.ArgumentParser:
    """A subcommand's parser.

    Args:
        commands: Where it belongs.
        name: Its name.
        summary: What it does, in the list of all.
        description: What it does, as it is printed.
        defaults: `run`, which is called with the options and a `Report`, and others.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(**defaults)
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options that every subcommand has."""
    group = parser.add_argument_group("how it is measured")
    add_rounds_and_output(group, rounds=7)
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="threads of torch (default: torch's choice)"
    )
    group.add_argument(
        "--keep-pages",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let glibc keep freed memory, as train.py does, for all contestants alike"
        " (default: no)",
    )
    group.add_argument("--seed", type=natural, default=0, metavar="N", help="default: 0")


def add_rounds_and_output(group: Any, rounds: int) -> None:
    """The options that a measurement without torch has too."""
    group.add_argument(
        "--rounds",
        type=positive,
        default=rounds,
        metavar="N",
        help=f"rounds that count (default: {rounds})",
    )
    group.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks"),
        metavar="FOLDER",
        help="where the files are written (default: benchmarks)",
    )


def add_memory_and_warmups(group: Any) -> None:
    """The options of a measurement that begins with rounds, and ends with memory."""
    group.add_argument("--no-memory", dest="memory", action="store_false", help="leave it out")
    group.add_argument(
        "--warmups", type=natural, default=1, metavar="N", help="rounds before (default: 1)"
    )


def positive(text: str) -> int:
    """A whole number from 1; takes 100_000 too."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same, its ValueError in argparse's words."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _prepare(options: argparse.Namespace) -> None:
    """Device, threads and allocator, before anything large is allocated."""
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output {options.output} is a file, it must be a folder")
    kind, _, number = options.device.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {options.device}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {options.device}: torch sees {torch.cuda.device_count()} GPUs")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.keep_pages and not keep_pages():
        raise ValueError(f"--keep-pages: {PAGES_NOT_KEPT}")


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the program with one line."""
        hush()
        self.exit(2, f"error: {' '.join(message.split())}\n")
