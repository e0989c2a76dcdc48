"""Options, rounds and table of `benchmark data`."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lm_softmax.benchmark.command import (
    Report,
    add_command,
    add_rounds_and_output,
    hush,
    positive,
    say,
)
from lm_softmax.benchmark.report import align, as_json, csv_text, show, write_text
from lm_softmax.benchmark.results import Spread
from lm_softmax.benchmark.timing import call_rounds

DESCRIPTION = """\
Times the way from text to token ids in tokens per second: a vocabulary of all white-space tokens of
train, and the text encoded with it, by this package and by the tokenizers library on the same rows,
in turns, in one process. Counts that differ are an error, before anything is timed. Prints a table
and writes data.json and data.csv.
"""
OURS, PEER = "lm_softmax", "tokenizers"
PARTS = ("counting", "encoding", "both")
COLUMNS = ("pipeline", *(f"{part}, M tokens/s" for part in PARTS), "both, ratio")
CSV_COLUMNS = ("pipeline", "measure", "unit", "min", "median", "max")
PACKAGES = ("datasets", "numpy", "pyarrow", "tokenizers")


def add_parser(commands: Any, add_common_options: Callable[..., None]) -> None:
    """Adds the subcommand; of the common options, those of torch mean nothing here."""
    parser = add_command(
        commands,
        "data",
        "tokens per second from text to token ids",
        DESCRIPTION,
        run=_run,
        device="cpu",
        threads=None,
        keep_pages=False,
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--path",
        default="python-stdlib",
        help="a corpus as for --data.path of train.py (default: python-stdlib)",
    )
    group.add_argument("--name", help="configuration of the dataset")
    group.add_argument("--text-column", default="text", metavar="NAME", help="default: text")
    group.add_argument(
        "--num-proc", type=positive, metavar="N", help="cores of this package (default: all)"
    )
    group.add_argument(
        "--memory",
        action="store_true",
        help="also the peak resident memory of this package, in a process of its own",
    )
    group.add_argument(
        "--alone", action="store_true", help="this package alone, for texts that exceed the memory"
    )
    add_rounds_and_output(parser.add_argument_group("how it is measured"), rounds=5)


def _run(options: argparse.Namespace, report: Report) -> None:
    """Checks, measures, prints, writes.

    Raises:
        ValueError: If the corpus cannot be read, or the counts differ.
    """
    from lm_softmax.benchmark import text
    from lm_softmax.corpus import Source

    report.versions.update({package: version(package) for package in PACKAGES})
    source = Source(options.path, options.name, None, options.text_column)
    with TemporaryDirectory(prefix="lm_softmax_benchmark_") as name:
        ours = text.Ours(source, options.num_proc, Path(name, "timed"))
        pipelines: dict[str, text.Pipeline] = {OURS: ours}
        if not options.alone:
            pipelines[PEER] = text.Peer(text.read_rows(source))
        say("a first round, not timed")
        for pipeline in pipelines.values():
            pipeline.run()
        counts = [pipeline.counts() for pipeline in pipelines.values()]
        if different := text.difference(counts[0], counts[-1]):
            raise ValueError(f"{options.path}: {different}")
        num_tokens, num_types = sum(counts[0].values()), len(counts[0])
        del counts
        seconds = call_rounds({name: p.run for name, p in pipelines.items()}, options.rounds, say)
        memory = None
        if options.memory:
            try:
                memory = text.peak_memory(source, options.num_proc, Path(name, "memory"))
            except RuntimeError as error:
                raise ValueError(f"--memory: {error}") from error
    hush()
    records = [_record(name, seconds, num_tokens) for name in pipelines]
    body = {
        "num_tokens": num_tokens,
        "num_types": num_types,
        "peak_memory_mib": memory,
        "pipelines": records,
    }
    files = [
        write_text(options.output, "data.json", as_json(report.header(), body)),
        write_text(options.output, "data.csv", csv_text(CSV_COLUMNS, _csv_rows(records))),
    ]
    lines = [
        f"{options.path}: {num_tokens:,} tokens of {num_types:,} types, counted alike by all.",
        report.machine_line(),
        f"Figures are median (min - max) of {options.rounds} rounds; the ratio is to"
        f" {[*pipelines][-1]} in the same round.",
        "",
        align([COLUMNS, *map(_cells, records)]),
        *(f"{name}: {pipeline.what}" for name, pipeline in pipelines.items()),
        *([] if memory is None else [f"peak resident memory of {OURS}: {memory:,.0f} MiB"]),
        *(f"written: {path}" for path in files),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _record(name: str, seconds: Mapping[str, Sequence[Any]], num_tokens: int) -> dict[str, Any]:
    last = [*seconds][-1]
    pairs = zip(seconds[last], seconds[name], strict=True)
    ratio = Spread.of([other.both / own.both for other, own in pairs])
    assert ratio is not None
    rates: dict[str, Any] = {}
    for part in PARTS:
        rate = Spread.of([num_tokens / getattr(own, part) for own in seconds[name]])
        assert rate is not None
        rates[part] = rate._asdict()
    rounds = {part: [getattr(own, part) for own in seconds[name]] for part in PARTS}
    return {
        "name": name,
        "tokens_per_s": rates,
        "ratio": ratio._asdict(),
        "rounds_s": rounds,
    }


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    rates = (Spread(**record["tokens_per_s"][part]) for part in PARTS)
    cells = (show(Spread(*(value / 1e6 for value in rate))) for rate in rates)
    return (record["name"], *cells, show(Spread(**record["ratio"])))


def _csv_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        key = {"pipeline": record["name"]}
        rates = record["tokens_per_s"]
        rows += [{**key, "measure": p, "unit": "tokens/s", **rates[p]} for p in PARTS]
        rows.append({**key, "measure": "ratio", "unit": "times", **record["ratio"]})
    return rows
