"""Options, rounds and table of `benchmark loop`."""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch

from lm_softmax.benchmark.command import Report, add_command, hush, natural, positive, say
from lm_softmax.benchmark.loops import EncoderSizes, Loop, Outcome, Text
from lm_softmax.benchmark.plain_loop import PlainLoop
from lm_softmax.benchmark.problem import ZIPF
from lm_softmax.benchmark.processes import OwnProcess
from lm_softmax.benchmark.report import align, as_json, csv_text, show, write_text
from lm_softmax.benchmark.results import Spread
from lm_softmax.benchmark.timing import call_rounds, first_line

DESCRIPTION = """\
Times whole training loops in tokens per second, in turns, in one process or, with --as-used, in one
each: models of this package under Lightning with the loggers and callbacks of train.py, and the
plain loop of a PyTorch user, nn.Embedding, nn.LSTM, torch's head and torch.optim.AdamW with its
defaults, on the same text. Prints a table and writes loop.json and loop.csv.

A head or configuration trains at --vocab-size, or at its own after an @: FullSoftmax@10000.
"""
COLUMNS = ("loop", "words", "tokens/s", "ratio", "last loss")
CSV_COLUMNS = ("loop", "vocab_size", "measure", "unit", "min", "median", "max")
Result = TypeVar("Result")


def add_parser(commands: Any, add_common_options: Callable[..., None]) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands, "loop", "tokens per second of whole training loops", DESCRIPTION, run=_run
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--vocab-size", type=positive, default=30_000, metavar="V", help="default: 30000"
    )
    group.add_argument(
        "--heads",
        nargs="*",
        default=["AdaptiveSoftmax"],
        metavar="HEAD",
        help='of models under Lightning; names, or calls as in "AdaptiveSoftmax(cutoffs=[2000])"'
        " (default: AdaptiveSoftmax)",
    )
    group.add_argument(
        "--configs",
        nargs="*",
        default=[],
        metavar="FILE",
        help="YAML files whose encoder, head, optimizer and clipping are trained under Lightning",
    )
    group.add_argument(
        "--torch",
        nargs="*",
        default=["adaptive"],
        metavar="KIND",
        help="heads of plain loops, adaptive or full (default: adaptive)",
    )
    group.add_argument(
        "--torch-cutoffs",
        type=positive,
        nargs="+",
        default=[2_000, 10_000],
        metavar="ID",
        help="of torch's adaptive head; those at or above the vocabulary's size are left out"
        " (default: 2000 10000)",
    )
    group.add_argument(
        "--targets",
        default=ZIPF,
        metavar="zipf|FILE",
        help="the text: drawn from Zipf's law, or a .npy file of token ids ranked by frequency"
        " (default: zipf)",
    )
    group.add_argument(
        "--reference", metavar="LOOP", help="whose tokens/s is 1 (default: the first plain loop)"
    )
    for name, number, what in (
        ("--batch-size", 64, "rows"),
        ("--block-size", 35, "tokens of a row"),
        ("--embedding-size", 256, "of the LSTM"),
        ("--hidden-size", 256, "of the LSTM"),
        ("--num-layers", 1, "of the LSTM"),
        ("--steps", 30, "steps of a round that are timed"),
    ):
        group.add_argument(
            name, type=positive, default=number, metavar="N", help=f"{what} (default: {number})"
        )
    group.add_argument(
        "--warmups", type=natural, default=5, metavar="N", help="steps before (default: 5)"
    )
    group.add_argument("--lr", type=float, default=0.001, help="learning rate (default: 0.001)")
    group.add_argument(
        "--clip", type=float, default=0.25, help="largest norm of the gradients (default: 0.25)"
    )
    group.add_argument(
        "--as-used",
        action="store_true",
        help="run each loop in a process of its own, with the allocator that it has where it is"
        " used: train.py's keeps pages, a plain loop's is as by default (default: all in one"
        " process, its allocator the same for all)",
    )
    add_common_options(parser)


class _Contestant(NamedTuple):
    """A loop that is yet to be made."""

    text: Text
    kind: type[Loop]
    arguments: tuple[Any, ...]
    keeps_pages: bool  # as it is used


def _run(options: argparse.Namespace, report: Report) -> None:
    if options.as_used and options.keep_pages:
        raise ValueError("--keep-pages is for all alike: leave it or --as-used out")
    with TemporaryDirectory(prefix="lm_softmax_benchmark_") as folder, ExitStack() as stack:
        contestants = _contestants(options, Path(folder))
        reference = options.reference or _default_reference(contestants)
        if reference not in contestants:
            raise ValueError(f"--reference: no loop {reference}, but {', '.join(contestants)}")
        make = partial(_in_own_process, stack) if options.as_used else _here
        runs = {
            name: partial(_named, name, _named(name, partial(make, contestant)))
            for name, contestant in contestants.items()
        }
        outcomes = call_rounds(runs, options.rounds, say)
    hush()
    speeds = {
        name: [contestants[name].text.timed_tokens / outcome.seconds for outcome in found]
        for name, found in outcomes.items()
    }
    records = [
        _record(name, contestant.text, outcomes[name][-1], speeds, reference)
        for name, contestant in contestants.items()
    ]
    body = {"reference": reference, "loops": records}
    files = [
        write_text(options.output, "loop.json", as_json(report.header(), body)),
        write_text(options.output, "loop.csv", csv_text(CSV_COLUMNS, _csv_rows(records))),
    ]
    lines = [
        _setting(options),
        report.machine_line(),
        f"Figures are median (min - max) of {options.rounds} rounds; ratio is tokens/s over those"
        f" of {reference} in the same round.",
        "",
        align([COLUMNS, *map(_cells, records)]),
        *(f"{record['name']}: {record['what']}" for record in records),
        *(f"written: {path}" for path in files),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _here(contestant: _Contestant) -> Callable[[], Outcome]:
    return contestant.kind(*contestant.arguments).run


def _in_own_process(stack: ExitStack, contestant: _Contestant) -> Callable[[], Outcome]:
    process = OwnProcess(
        contestant.kind,
        contestant.arguments,
        num_threads=torch.get_num_threads(),
        keeps_pages=contestant.keeps_pages,
    )
    stack.callback(process.close)
    return partial(process.call, "run")


def _named(name: str, call: Callable[[], Result]) -> Result:
    """What it returns; a loop that fails, for want of memory say, is an error of one line."""
    try:
        return call()
    except RuntimeError as error:
        raise ValueError(f"{name}: {first_line(error)}") from error


def _contestants(options: argparse.Namespace, folder: Path) -> dict[str, _Contestant]:
    """The loops by name."""
    from lm_softmax.benchmark.lightning_loop import LightningLoop
    from lm_softmax.benchmark.loop_models import from_config, from_head, split_size

    sizes = EncoderSizes(options.embedding_size, options.hidden_size, options.num_layers)
    models = [from_head(text, sizes, options.lr, options.clip) for text in options.heads]
    models += [from_config(text) for text in options.configs]

    def text(vocab_size: int | None) -> Text:
        return Text(
            vocab_size or options.vocab_size,
            options.targets,
            options.batch_size,
            options.block_size,
            options.warmups,
            options.steps,
            options.seed,
        )

    found: dict[str, _Contestant] = {}
    for i, model in enumerate(models):
        own = text(model.vocab_size)
        arguments = own, options.device, model.clip, model.options, folder / str(i)
        found[model.name] = _Contestant(own, LightningLoop, arguments, keeps_pages=True)
    for word in options.torch:
        kind, vocab_size = split_size(word)
        if kind not in ("adaptive", "full"):
            raise ValueError(f"--torch must be adaptive or full, got {word}")
        own = text(vocab_size)
        cutoffs = sorted(cutoff for cutoff in options.torch_cutoffs if cutoff < own.vocab_size)
        if kind == "adaptive" and not cutoffs:
            raise ValueError(f"--torch-cutoffs: none below the {own.vocab_size} words")
        name = f"torch {kind}" + ("" if vocab_size is None else f" @{vocab_size:,}")
        plain = own, options.device, options.clip, kind, sizes, cutoffs, options.lr
        found[name] = _Contestant(own, PlainLoop, plain, keeps_pages=False)
    if not found:
        raise ValueError("nothing to train: give --heads, --configs or --torch")
    return found


def _default_reference(names: Iterable[str]) -> str:
    return next((name for name in names if name.startswith("torch ")), next(iter(names)))


def _record(
    name: str,
    text: Text,
    outcome: Outcome,
    speeds: Mapping[str, Sequence[float]],
    reference: str,
) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(speeds[name], speeds[reference], strict=True)]
    speed, ratio = Spread.of(speeds[name]), Spread.of(ratios)
    assert speed is not None
    assert ratio is not None
    return {
        "name": name,
        "what": outcome.what,
        "vocab_size": text.vocab_size,
        "tokens_per_s": speed._asdict(),
        "ratio": ratio._asdict(),
        "step_time_ms": text.timed_tokens / median(speeds[name]) / text.num_steps * 1000,
        "last_loss": outcome.loss if isfinite(outcome.loss) else None,
        "rounds_tokens_per_s": list(speeds[name]),
    }


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    loss = "-" if record["last_loss"] is None else f"{record['last_loss']:.3f}"
    return (
        record["name"],
        f"{record['vocab_size']:,}",
        show(Spread(**record["tokens_per_s"]), ",.0f"),
        show(Spread(**record["ratio"])),
        loss,
    )


def _csv_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "loop": record["name"],
            "vocab_size": record["vocab_size"],
            "measure": measure,
            "unit": unit,
            **record[measure],
        }
        for record in records
        for measure, unit in (("tokens_per_s", "tokens/s"), ("ratio", "times"))
    ]


def _setting(options: argparse.Namespace) -> str:
    text = "Zipf text" if options.targets == ZIPF else options.targets
    own = "" if not options.configs else " (configurations have their own encoder and clipping)"
    return (
        f"batch {options.batch_size} x {options.block_size}, nn.LSTM {options.num_layers} x"
        f" {options.hidden_size} on embeddings of {options.embedding_size}, float32,"
        f" {options.device}, {text}, clipping at {options.clip}{own}, rounds of {options.steps}"
        f" steps after {options.warmups}."
    )
