"""`benchmark cutoffs`: the clusters that are the fastest on the machine at hand.

The constants of the cost model are measured; then the predicted, and with `--measure` the measured,
step of the optimum stands beside those of common hand-written rules.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lm_softmax.benchmark.command import Report, add_command, natural, positive
from lm_softmax.benchmark.constants import Clock, Step, measure
from lm_softmax.benchmark.report import write_text
from lm_softmax.heads.cost_model import CostModel, predicted_time
from lm_softmax.heads.cutoffs import (
    AUTO_DIV_VALUE,
    resolve_clusters,
    resolve_tail_sizes,
    zipf_counts,
)

DESCRIPTION = """\
Measures the constants of the cost model of an adaptive softmax, and prints the clusters that
minimise the time of a step beside hand-written ones: predicted, and with --measure measured. Writes
the optimum as an overlay, cutoffs.yaml.
"""
OVERLAY = """\
# Clusters for {vocab_size:,} words, steps of {tokens:,} tokens, {device}, {dtype}; seconds
# {constants}
# python train.py fit -c configs/quickstart.yaml -c THIS_FILE
model:
  head:
    class_path: AdaptiveSoftmax
    init_args:
      cutoffs: {cutoffs}
      tail_sizes: {tail_sizes}
"""


class Rule(NamedTuple):
    """Clusters by name, and the seconds of a step with them."""

    name: str
    cutoffs: list[int]
    tail_sizes: list[int]
    predicted: float
    measured: float | None = None


def hand_written(counts: Tensor) -> dict[str, list[int]]:
    """Cutoffs that people write, by name; those that fit the vocabulary."""
    vocab_size = counts.numel()
    covered = counts.cpu().double().clamp(min=1).cumsum(0)
    text = torch.searchsorted(covered, covered.new_tensor([0.8, 0.95]) * covered[-1]) + 1
    named = {
        "no clusters": [],
        "10 % and 25 % of the words": [vocab_size // 10, vocab_size // 10 + vocab_size // 4],
        "thirds of the words": [vocab_size // 3, 2 * vocab_size // 3],
        "80 % and 95 % of the text": text.tolist(),
        "2000, 10000": [2000, 10_000],
        "20000, 40000, 200000": [20_000, 40_000, 200_000],
    }
    return {
        name: ids
        for name, ids in named.items()
        if [0, *ids, vocab_size] == sorted({0, *ids, vocab_size})
    }


def rules(
    model: CostModel, hidden_size: int, counts: Tensor, div_value: float, min_tail_size: int
) -> list[Rule]:
    """The optimum of a cost model, and the hand-written rules with the same widths, predicted."""
    found = []
    asked: dict[str, Sequence[int] | Literal["auto"]] = {"auto": "auto", **hand_written(counts)}
    for name, cutoffs in asked.items():
        ids, sizes = resolve_clusters(
            cutoffs,
            hidden_size,
            counts.numel(),
            counts,
            div_value=div_value,
            min_tail_size=min_tail_size,
            cost_model=model,
        )
        seconds = predicted_time(model, hidden_size, counts, ids, sizes)
        found.append(Rule(name, ids, sizes, seconds))
    return found


def timed(
    clock: Clock,
    found: Sequence[Rule],
    hidden_size: int,
    counts: Tensor,
    tokens: int,
    longest: float,
) -> list[Rule]:
    """The rules with the median time of a step, those predicted to exceed `longest` without.

    Each is timed in turn with the first, and two heads exist at a time.
    """

    def step_of(rule: Rule) -> Step:
        step = Step(clock, hidden_size, counts, tokens, rule.cutoffs, rule.tail_sizes)
        step()
        return step

    of_first: list[float] = []
    first, others = step_of(found[0]), []
    for rule in found[1:]:
        times = []
        if rule.predicted <= longest:
            step = step_of(rule)
            for _ in range(clock.repeats):
                of_first.append(clock.once(first))
                times.append(clock.once(step))
        others.append(rule._replace(measured=statistics.median(times) if times else None))
    measured = statistics.median(of_first) if of_first else clock.median(first)
    return [found[0]._replace(measured=measured), *others]


def table(found: Sequence[Rule]) -> str:
    """Rules as aligned text; ratios are to the first."""
    rows = [["rule", "cutoffs", "widths", "predicted ms", "ratio", "measured ms", "ratio"]]
    first = found[0]
    for rule in found:
        cells = [rule.name, str(rule.cutoffs), str(rule.tail_sizes)]
        for time, base in ((rule.predicted, first.predicted), (rule.measured, first.measured)):
            cells.append("" if time is None else f"{time * 1e3:.1f}")
            cells.append("" if time is None or base is None else f"{time / base:.2f}")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def read_counts(path: str) -> Tensor:
    """Counts by rank: of a saved vocabulary or checkpoint, or of a `.txt` file, one a line.

    Raises:
        ValueError: If there is no such file, or no ranked counts in it.
    """
    if not path.endswith(".txt"):
        from lm_softmax.vocab import Vocab  # needs the train extra

        return Vocab.load(path).counts
    try:
        numbers = [int(line) for line in Path(path).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not numbers or numbers[-1] < 0 or numbers != sorted(numbers, reverse=True):
        raise ValueError(f"{path}: counts must be at least 0 and never increase")
    return torch.tensor(numbers)


def add_parser(commands: Any, add_common_options: Callable[..., None]) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "cutoffs",
        "the fastest clusters of an adaptive softmax on this machine",
        DESCRIPTION,
        run=_run,
    )
    group = parser.add_argument_group("what is measured")
    words = group.add_mutually_exclusive_group(required=True)
    words.add_argument(
        "--counts", metavar="FILE", help="vocabulary, checkpoint, or .txt with one count a line"
    )
    words.add_argument(
        "--vocab-size",
        type=positive,
        metavar="V",
        help="number of words under Zipf's law instead",
    )
    group.add_argument(
        "--hidden-size", type=positive, default=256, metavar="D", help="default: 256"
    )
    group.add_argument(
        "--tokens",
        type=positive,
        default=64 * 35,
        metavar="N",
        help="tokens in a step (default: 2240)",
    )
    group.add_argument(
        "--div-value",
        type=float,
        default=AUTO_DIV_VALUE,
        metavar="F",
        help=f"tail i is D // F**i wide (default: {AUTO_DIV_VALUE:g})",
    )
    group.add_argument("--min-tail-size", type=natural, default=16, metavar="D", help="default: 16")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    group.add_argument("--measure", action="store_true", help="time a step with each rule too")
    group.add_argument(
        "--longest",
        type=float,
        default=10.0,
        metavar="S",
        help="measure no step predicted to take longer, in seconds (default: 10)",
    )
    add_common_options(parser)


def _run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print, and write.

    Raises:
        ValueError: If an option or the counts are impossible.
    """
    hidden_size = options.hidden_size
    resolve_tail_sizes(hidden_size, 1, options.div_value, options.min_tail_size)
    counts = read_counts(options.counts) if options.counts else zipf_counts(options.vocab_size)
    torch.manual_seed(options.seed)
    clock = Clock(options.device, getattr(torch, options.dtype), options.rounds)
    model = measure(clock, hidden_size, options.tokens)
    constants = ", ".join(f"{name} {value:.3g}" for name, value in asdict(model).items())
    found = rules(model, hidden_size, counts, options.div_value, options.min_tail_size)
    if options.measure:
        found = timed(clock, found, hidden_size, counts, options.tokens, options.longest)
    overlay = OVERLAY.format(
        vocab_size=counts.numel(),
        tokens=options.tokens,
        device=options.device,
        dtype=options.dtype,
        constants=constants,
        cutoffs=found[0].cutoffs,
        tail_sizes=found[0].tail_sizes,
    )
    path = write_text(options.output, "cutoffs.yaml", overlay)
    sys.stdout.write(f"measured: {constants}\n\n{table(found)}\n\n{overlay}\n")
    sys.stdout.write(f"{report.machine_line()}\n{report.command}\nfile: {path}\n")
