"""The picture of `benchmark train`: four panels against vocabulary size."""

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_softmax.benchmark.peers import PLAIN
from lm_softmax.benchmark.results import BACKWARD, Result, Spread
from lm_softmax.benchmark.timing import FORWARD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOW = (
    "Forward: the loss without gradients. Backward: forward and backward pass together less"
    " forward, gradients of parameters and hidden vectors. Lines are medians over {rounds} rounds,"
    " bars reach from the smallest to the largest; contestants take turns. Memory:"
    " high-water mark of the first forward and backward pass less what was held before it,"
    " gradients included, each in a process of its own. Speed-up: forward and backward, {plain}"
    " over contestant, paired by round. Products alone: the matrix products into buffers allocated"
    " before."
)
Point = Spread | float | None
PANELS: tuple[tuple[str, str, Callable[[Result], Point]], ...] = (
    ("forward", "time (ms)", lambda result: result.spread(FORWARD)),
    ("backward", "time (ms)", lambda result: result.spread(BACKWARD)),
    ("memory of a step", "extra memory (MiB)", lambda result: _extra_memory(result)),
    ("speed-up over the plain softmax", "times faster", lambda result: _speed_up(result)),
)
COLORS = [*(f"C{i}" for i in range(10)), "navy", "darkgoldenrod", "teal", "crimson"]
MARKERS = "sD^vPX*<>"


def draw(results: Sequence[Result], caption: Sequence[str]) -> "Figure":
    """Draws the panels.

    Args:
        results: Of all contestants and vocabulary sizes.
        caption: Paragraphs below the panels.
    """
    from matplotlib.figure import Figure  # of the train extra, see __main__

    names = list(dict.fromkeys(result.name for result in results if result.rounds))
    lines = [line for paragraph in caption for line in textwrap.wrap(paragraph, 205)]
    legend_rows = -(-len(names) // 3)
    below = 0.25 + 0.17 * len(lines) + 0.24 * legend_rows + 0.2
    figure = Figure(figsize=(13, 9 + below))
    panels = figure.subplots(2, 2)
    figure.subplots_adjust(
        left=0.065, right=0.985, top=1 - 0.35 / (9 + below), bottom=(below + 0.55) / (9 + below),
        hspace=0.25, wspace=0.16,
    )  # fmt: skip
    for axes, (title, label, value) in zip(panels.flat, PANELS, strict=True):
        _draw_panel(axes, names, results, value)
        axes.set(title=title, ylabel=label, xlabel="vocabulary size (words)")
    handles, labels = _legend(panels.flat)
    place = (0.5, (0.25 + 0.17 * len(lines)) / (9 + below))
    figure.legend(
        handles, labels, loc="lower center", bbox_to_anchor=place, ncols=3, fontsize=9.5,
        frameon=False,
    )  # fmt: skip
    figure.text(0.02, 0.12 / (9 + below), "\n".join(lines), size=8.5, va="bottom", linespacing=1.3)
    return figure


def caption(num_rounds: int, setting: str, machine: str, command: str) -> list[str]:
    """What the reader of the picture has to know, by paragraph."""
    return [HOW.format(rounds=num_rounds, plain=PLAIN), setting, machine, command]


def _draw_panel(
    axes: "Axes",
    names: Sequence[str],
    results: Sequence[Result],
    value: Callable[[Result], Point],
) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    sizes = sorted({result.vocab_size for result in results})
    styles = _styles(results)
    for name in names:
        own = [result for result in results if result.name == name]
        points = [(result.vocab_size, value(result)) for result in own]
        _draw_line(axes, name, points, own[0].kind, *styles[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    plain_number = FuncFormatter(lambda number, _: f"{number:,.6g}")
    axes.yaxis.set_major_formatter(plain_number)
    low, high = axes.get_ylim()
    if high / low < 30:  # a decade or so: its powers of ten alone would leave the axis bare
        axes.yaxis.set_minor_formatter(FuncFormatter(few))
        axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.grid(alpha=0.3)
    axes.grid(which="minor", axis="y", alpha=0.12)


def _styles(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """Colour and marker by name; what belongs to one head alone has its colour."""
    heads: dict[str, str] = {}
    for result in results:
        if result.kind == "head":
            heads.setdefault(result.group, result.name)
    kinds = {result.name: result.kind for result in results}
    groups = {result.name: result.group for result in results}
    own = [name for name, kind in kinds.items() if kind == "head"]
    own += [name for name, kind in kinds.items() if kind == "peer" and groups[name] == "full"]
    styles = {
        name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(own)
    }
    for name, kind in kinds.items():
        if kind == "standard":
            styles[name] = ("black", "o")
        elif name not in styles:
            styles[name] = styles.get(heads.get(groups[name], ""), ("grey", "."))
    return styles


def few(number: float, position: int) -> str:
    """A label for 2 and 5 in each decade."""
    digit = f"{number:e}"[0]
    return f"{number:,.6g}" if digit in "25" else ""


def _draw_line(
    axes: "Axes",
    name: str,
    points: Sequence[tuple[int, Point]],
    kind: str,
    color: str,
    marker: str,
) -> None:
    known = [(size, point) for size, point in points if point is not None]
    spreads = [
        (size, point if isinstance(point, Spread) else Spread(point, point, point))
        for size, point in known
    ]
    spreads = [(size, spread) for size, spread in spreads if spread.median > 0]
    if not spreads:
        return
    medians = [spread.median for _, spread in spreads]
    lows = [spread.median - max(spread.min, spread.median * 0.01) for _, spread in spreads]
    highs = [spread.max - spread.median for _, spread in spreads]
    axes.errorbar(
        [size for size, _ in spreads],
        medians,
        yerr=[[max(low, 0) for low in lows], highs],
        label=name,
        color=color,
        linestyle={"floor": ":", "peer": "--"}.get(kind, "-"),
        marker=None if kind == "floor" and len(spreads) > 1 else marker,
        markersize=5,
        linewidth=2 if kind == "head" else 1.4,
        elinewidth=1,
        capsize=2,
    )


def _legend(panels: Sequence["Axes"]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _extra_memory(result: Result) -> float | None:
    return None if result.memory is None else result.memory.extra_mib


def _speed_up(result: Result) -> Spread | None:
    return Spread.of(result.speed_up)
