"""Runs side by side: a table, a plot of perplexity against time, and the command."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lm_softmax.compare.runs import METRICS, TIME, Run, find_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = (
    *("run", "head", "vocabulary", "parameters"),
    *("val/ppl", "bits/byte", "<unk>", "ms/step", "tokens/s", "peak memory", "time"),
)


def table(runs: Sequence[Run]) -> str:
    """Returns the runs as aligned text, with notes where a figure does not compare."""
    rows = [COLUMNS, *map(_cells, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if any(run.comparable is False for run in runs):
        lines.append(
            "* another vocabulary: perplexity does not compare, bits/byte does,"
            " with the rate of <unk> beside it"
        )
    if any(run.comparable is None for run in runs):
        lines.append("? vocabulary not known: perplexity may not compare")
    return "\n".join(lines)


def draw(runs: Sequence[Run]) -> "Figure | None":
    """Draws perplexity against training time, beside it bits per byte if vocabularies differ.

    Returns:
        The figure; None if no run has a validation with a time.
    """
    from matplotlib.figure import Figure  # of the train extra, see __main__
    from matplotlib.ticker import LogFormatter

    runs = [run for run in runs if run.curve]
    if not runs:
        return None
    seconds, unit = _time_unit(max(run.curve[-1][0] for run in runs))
    num_panels = 1 if all(run.comparable for run in runs) else 2
    figure = Figure(figsize=(8 * num_panels, 5 + 0.2 * len(runs)), layout="constrained")
    perplexity, *others = figure.subplots(1, num_panels, squeeze=False)[0]
    _draw_curves(perplexity, runs, 1, seconds)
    perplexity.set(ylabel="validation perplexity", yscale="log")
    perplexity.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.6)))
    perplexity.yaxis.set_major_formatter(LogFormatter())
    if others:
        perplexity.set_title("dashed: another vocabulary, or not known; not comparable", size=10)
    for bits in others:
        _draw_curves(bits, runs, 2, seconds)
        bits.set(ylabel="validation bits per byte")
    for axes in figure.axes:
        axes.set(xlabel=f"training time ({unit})")
        axes.grid(which="both", alpha=0.25)
    handles, labels = perplexity.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=num_panels)
    return figure


def main(args: Sequence[str] | None = None) -> int:
    """Prints the table and writes the plot; returns the exit code."""
    parser = _Parser(
        prog="python -m lm_softmax.compare",
        description="Compares finished runs in a table and a plot.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders with runs, at any depth")
    parser.add_argument(
        "--output", type=Path, help="picture to write (default: compare.png in the first folder)"
    )
    options = parser.parse_args(args)
    output: Path = options.output or options.folders[0] / "compare.png"
    try:
        runs = find_runs(options.folders)
        figure = draw(runs)
        if figure is not None:
            _save(figure, output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(table(runs) + "\n")
    if figure is None:
        sys.stdout.write(f"no plot: no run has val/ppl beside {TIME} in its {METRICS}\n")
    else:
        sys.stdout.write(f"plot: {output}\n")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the program with one line."""
        self.exit(2, f"error: {' '.join(message.split())}\n")


def _cells(run: Run) -> tuple[str, ...]:
    return (
        run.label,
        run.head or "-",
        _show(run.vocab_size, "{:,}"),
        _show(run.num_parameters, "{:,}"),
        _show(run.best.get("val/ppl"), "{:.2f}"),
        _show(run.best.get("val/bits_per_byte"), "{:.4f}"),
        _show(run.best.get("val/unk_rate"), "{:.2%}"),
        _show(run.step_ms, "{:,.1f}"),
        _show(run.tokens_per_s, "{:,.0f}"),
        "-" if run.memory is None else "{:.2f} GiB {}".format(*run.memory),
        "-" if run.time_s is None else str(timedelta(seconds=round(run.time_s))),
    )


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds >= 3 * 3600:
        return 3600, "hours"
    return (60, "minutes") if seconds >= 180 else (1, "seconds")


def _draw_curves(axes: "Axes", runs: Sequence[Run], column: int, seconds: float) -> None:
    for number, run in enumerate(runs):
        axes.plot(
            [point[0] / seconds for point in run.curve],
            [point[column] for point in run.curve],
            color=f"C{number % 10}",
            linestyle="-" if run.comparable else "--",
            marker="os^Dv"[number // 10 % 5],
            markersize=4,
            label=run.label if (run.head or "") in run.name else f"{run.label}: {run.head}",
        )


def _save(figure: "Figure", path: Path) -> None:
    form = path.suffix.lstrip(".").lower()
    supported = figure.canvas.get_supported_filetypes()
    if form not in supported:
        raise ValueError(f"{path}: the picture's name must end in one of {', '.join(supported)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder to write {path.name} into")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format=form, dpi=150)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
