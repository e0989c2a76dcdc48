"""Results as text, JSON and CSV, and files that are there whole or not at all."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_softmax.benchmark.results import BACKWARD, Comparison, Result, Spread
from lm_softmax.benchmark.timing import FORWARD, FORWARD_BACKWARD, OPTIMIZER

COLUMNS = (
    *("contestant", "forward ms", "forward+backward ms", "backward ms", "optimizer ms"),
    *("extra MiB", "gradients MiB", "times faster"),
)
COMPARISON_COLUMNS = ("head", "against", "times faster", "of its time", "of its memory")
CSV_COLUMNS = (
    *("vocab_size", "contestant", "kind", "group", "measure", "unit", "min", "median", "max"),
)
PARTS = (FORWARD, FORWARD_BACKWARD, BACKWARD, OPTIMIZER)


def table(results: Sequence[Result], comparisons: Sequence[Comparison]) -> str:
    """A block for each vocabulary size: contestants, and heads beside their like."""
    blocks: list[str] = []
    for size in dict.fromkeys(result.vocab_size for result in results):
        own = [result for result in results if result.vocab_size == size]
        blocks.append(f"vocabulary {size:,}")
        blocks.append(align([COLUMNS, *map(_cells, own)]))
        pairs = [pair for pair in comparisons if pair.vocab_size == size]
        if pairs:
            rows = [COMPARISON_COLUMNS, *map(_comparison_cells, pairs)]
            blocks.append(align(rows, num_left=2))
        blocks += [f"not timed: {own.name}: {own.problem}" for own in own if own.problem]
        blocks += [
            f"no memory: {own.name}: {own.memory_problem}" for own in own if own.memory_problem
        ]
        blocks.append("")
    return "\n".join(blocks).rstrip("\n")


def align(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Rows of cells as aligned text, the first of them a header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_csv(results: Sequence[Result], comparisons: Sequence[Comparison]) -> str:
    """A row for each figure; what was not measured has none."""
    rows: list[Mapping[str, Any]] = []
    for result in results:
        key = {
            "vocab_size": result.vocab_size,
            "contestant": result.name,
            "kind": result.kind,
            "group": result.group,
        }
        for part in PARTS:
            rows += _csv_row(key, part, "ms", result.spread(part))
        rows += _csv_row(key, "speed_up", "times", Spread.of(result.speed_up))
        if result.memory is not None:
            for name, value in result.memory._asdict().items():
                measure = name.removesuffix("_mib")
                rows.append(key | {"measure": f"memory_{measure}", "unit": "MiB", "median": value})
    for pair in comparisons:
        key = {"vocab_size": pair.vocab_size, "contestant": pair.head, "kind": "head"}
        rows += _csv_row(key, f"times faster than {pair.other}", "times", pair.times_faster)
        if pair.memory_ratio is not None:
            measure = f"extra memory over that of {pair.other}"
            rows.append(key | {"measure": measure, "unit": "times", "median": pair.memory_ratio})
    return csv_text(CSV_COLUMNS, rows)


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under a header; missing cells are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(header: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """One object: header and body."""
    return json.dumps({**header, **body}, indent=2, allow_nan=False) + "\n"


def write(folder: Path, name: str, fill: Callable[[Path], object]) -> Path:
    """Writes a file under another name, then gives it its own.

    Args:
        folder: Where; made if it is not there.
        name: Of the file.
        fill: Writes the file it is given.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    temporary = folder / f".{os.getpid()}.{name}"
    try:
        fill(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(folder: Path, name: str, text: str) -> Path:
    """`write` of a text."""
    return write(folder, name, lambda path: path.write_text(text, encoding="utf-8"))


def show(spread: Spread | None, form: str = ",.2f") -> str:
    """`median (min - max)`, or a dash."""
    if spread is None:
        return "-"
    low, middle, high = (format(value, form) for value in spread)
    return f"{middle} ({low} - {high})"


def _cells(result: Result) -> tuple[str, ...]:
    name = result.name if result.kind != "standard" else f"{result.name} = 1"
    times = [show(result.spread(part)) for part in PARTS]
    memory = ["-", "-"]
    if result.memory is not None:
        memory = [f"{value:,.1f}" for value in result.memory[:2]]
    return (name, *times, *memory, show(Spread.of(result.speed_up)))


def _comparison_cells(pair: Comparison) -> tuple[str, ...]:
    memory = "-" if pair.memory_ratio is None else f"{pair.memory_ratio:.2f}"
    return (pair.head, pair.other, show(pair.times_faster), show(pair.time_ratio), memory)


def _csv_row(
    key: Mapping[str, Any], measure: str, unit: str, spread: Spread | None
) -> list[Mapping[str, Any]]:
    return [] if spread is None else [{**key, "measure": measure, "unit": unit, **spread._asdict()}]
