"""The command: options, the order of steps, a table and a JSON file."""

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lm_softmax.allocator import keep_pages
from lm_softmax.compress.convert import METHODS
from lm_softmax.compress.study import Study, hush
from lm_softmax.heads import SVDPreview
from lm_softmax.specs import Spec, parse_spec
from lm_softmax.terminal import READER_LEFT, Parser, check_streams, drop_output

PROGRAM = "python -m lm_softmax.compress"
MOST_MINUTES = 1e9  # timedelta holds a thousand times as many
DESCRIPTION = """\
Makes a smaller checkpoint from a trained one whose head has one output row a word (FullSoftmax,
SampledSoftmax, NCE): by a singular value decomposition (LowRankSoftmax) or by k-means
(ProductQuantizedSoftmax). The new file needs nothing else, holds weights alone and no state of a
training. On the validation split of the run it reports perplexity, time of topk, and agreement with
the source; with --preview also those of SVD-softmax, an approximate topk of the source itself.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Compresses, prints a table and writes the files; returns the exit code.

    Args:
        args: Words of the command line; those of the process if not given.
    """
    words = list(sys.argv[1:] if args is None else args)
    parser = _make_parser()
    options = parser.parse_args(words)
    check_streams(parser)
    try:
        _check(options)
        report = Study(options).run()
        report["command"] = shlex.join([*PROGRAM.split(), *words])
        if options.output is not None:
            _write_json(report, _json_path(options.output))
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        return _interrupted()
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        parser.error(str(error))
    hush()
    try:
        sys.stdout.write("\n".join(_lines(report, options)) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has enough
        drop_output()
        return READER_LEFT
    except OSError as error:
        drop_output()
        parser.error(f"{error.strerror}: standard output; the files are written")
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the trained model")
    group = parser.add_argument_group("what is made")
    group.add_argument(
        "--head",
        type=_spec(METHODS),
        metavar="HEAD",
        help='"LowRankSoftmax(rank=64)" or "ProductQuantizedSoftmax(num_codebooks=32,'
        ' codebook_size=256, rank=None, iterations=20, seed=0)"',
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="checkpoint to write")
    group.add_argument("--force", action="store_true", help="replace it")
    group.add_argument(
        "--preview",
        type=_spec({"SVDPreview": SVDPreview}),
        nargs="+",
        default=[],
        metavar="PREVIEW",
        help='approximate topk of the source to measure: "SVDPreview(window=64, num_rescored=500)"',
    )
    group = parser.add_argument_group(
        "fine-tuning: as the run was, but at a constant learning rate"
    )
    group.add_argument("--finetune-minutes", type=_minutes, metavar="M", help="stop after them")
    group.add_argument("--finetune-steps", type=_positive, metavar="N", help="stop after them")
    group.add_argument(
        "--lr", type=_above_zero, help="learning rate (default: a tenth of the run's)"
    )
    group = parser.add_argument_group("how it is measured")
    group.add_argument(
        "--data-path",
        metavar="PATH",
        help="corpus, instead of path, name and data_files of the run (default: the run's)",
    )
    group.add_argument(
        "--eval-batches",
        type=_positive,
        metavar="N",
        help="perplexity of so many batches of the validation split (default: all)",
    )
    group.add_argument("--no-eval", action="store_true", help="report sizes alone; needs no data")
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one",
    )
    group.add_argument("--threads", type=_positive, metavar="N", help="threads of torch")
    group.add_argument("--seed", type=_seed, metavar="N", help="of fine-tuning (default: 1)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """What can be wrong before anything is read; then threads and allocator."""
    output: Path | None = options.output
    if options.head is None and not options.preview:
        raise ValueError("nothing to do: give --head and --output, or --preview")
    if (options.head is None) != (output is None):
        raise ValueError("--head makes what --output names: give both")
    finetunes = options.finetune_minutes is not None or options.finetune_steps is not None
    if finetunes and options.head is None:
        raise ValueError("there is nothing to fine-tune without --head")
    if options.lr is not None and not finetunes:
        raise ValueError("--lr is that of fine-tuning: add --finetune-minutes or --finetune-steps")
    if options.seed is not None and not finetunes:
        raise ValueError(
            "--seed is that of fine-tuning: add --finetune-minutes or --finetune-steps"
            " (k-means has one of its own, seed= of the head)"
        )
    if options.force and output is None:
        raise ValueError("--force replaces what --output names: give both")
    for name in ("data_path", "eval_batches", "finetune_minutes", "finetune_steps"):
        if options.no_eval and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs data, --no-eval reads none")
    if options.no_eval and options.preview:
        raise ValueError("--preview is measured on data, --no-eval reads none")
    if output is not None:
        _check_output(output, options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_pages()


def _check_output(output: Path, options: argparse.Namespace) -> None:
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent}: no such folder to write {output.name} into")
    if output.is_dir():
        raise ValueError(f"{output} is a folder, --output names a file")
    if output.suffix == ".json":
        raise ValueError(f"{output} would be the report's name: give --output another suffix")
    for path in (output, _json_path(output)):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no regular file, which could be replaced")
        if path.exists() and path.resolve() == options.checkpoint.resolve():
            raise ValueError(f"--output {output} would replace the checkpoint that it comes from")
        if path.exists() and not options.force:
            raise ValueError(f"{path} exists: give another --output, or --force to replace it")
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"no permission to write into {output.parent}")


def _json_path(output: Path) -> Path:
    return output.with_suffix(".json")


def _write_json(report: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _lines(report: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """For people: the table, what there is to know about it, the files."""
    speeds = list(report["rows"][0]["ms_per_token"])
    header = ["", "head MB", "file MB", "parameters", "val/ppl"]
    header += [f"{what} (ms)" for what in speeds] + ["top-1 agrees", "top-10 agrees"]
    rows = [header]
    for row in report["rows"]:
        cells = [row["name"], _show(row["head_mb"], ",.2f"), _show(row["file_mb"], ",.2f")]
        cells += [_show(row["num_parameters"], ","), _show(row["val_ppl"], ",.2f")]
        cells += [_show(row["ms_per_token"].get(what), ",.3f") for what in speeds]
        rows.append([*cells, _show(row["top_1"], ".2%"), _show(row["top_10"], ".2%")])
    lines = [*align(rows), *report["notes"]]
    if options.output is not None:
        lines += [f"checkpoint: {options.output}", f"report: {_json_path(options.output)}"]
    return lines


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first of them a header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interrupted() -> int:
    hush()
    sys.stderr.write("interrupted; nothing was written\n")
    return 130


def _spec(classes: Mapping[str, Callable[..., Any]]) -> Callable[[str], Spec]:
    def read(text: str) -> Spec:
        try:
            spec = parse_spec(text)
            spec.find(classes)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return spec

    return read


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    if int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**31, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**32, got {text!r}")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _minutes(text: str) -> float:
    number = _above_zero(text)
    if number > MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_MINUTES:.0e}, got {text!r}")
    return number


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        """Ends the program with one line, in place of the last one."""
        hush()
        super().error(message)
