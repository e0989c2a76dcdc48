"""The picture of `benchmark decode`: time a token, a panel for each task and batch size."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm_softmax.benchmark.decode import HEAD, NAIVE, TASKS, Result
from lm_softmax.benchmark.plot import few

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOW = (
    "Marks are medians over {rounds} rounds, lines reach from the smallest to the largest; beside"
    " them how many times faster than naive code, in the same round. Greedy: topk(hidden, 1)."
    " Naive: log_prob(hidden).topk(k), and a draw by the inverse distribution function of"
    " log_prob(hidden).exp()."
)
COLORS = {HEAD: "C0", NAIVE: "dimgrey"}
MARKERS = {HEAD: "o", NAIVE: "s"}
LABELS = {HEAD: "head", NAIVE: "naive code"}


def draw(results: Sequence[Result], num_rounds: int, caption: Sequence[str]) -> "Figure":
    """Draws the panels.

    Args:
        results: Of all heads, vocabulary sizes, batch sizes and tasks.
        num_rounds: For the caption.
        caption: More paragraphs below the panels.
    """
    from matplotlib.figure import Figure  # of the train extra, see __main__

    rows = list(dict.fromkeys((result.head, result.vocab_size) for result in results))
    several = len({size for _, size in rows}) > 1
    names = [f"{head}, {size:,}" if several else head for head, size in rows]
    batch_sizes = sorted({result.batch_size for result in results})
    lines = [
        line
        for paragraph in (HOW.format(rounds=num_rounds), *caption)
        for line in textwrap.wrap(paragraph, 190)
    ]
    above, below = 3 * (0.75 + 0.42 * len(rows)), 0.5 + 0.17 * len(lines)
    height = above + below
    figure = Figure(figsize=(13, height))
    panels = figure.subplots(len(TASKS), len(batch_sizes), squeeze=False, sharey=True)
    left = 0.05 + 0.0065 * max(map(len, names))
    figure.subplots_adjust(
        left=min(left, 0.4), right=0.985, top=1 - 0.35 / height, bottom=(below + 0.3) / height,
        hspace=0.75 / (0.75 + 0.42 * len(rows)) * 1.1, wspace=0.08,
    )  # fmt: skip
    for task, across in zip(TASKS, panels, strict=True):
        for batch_size, axes in zip(batch_sizes, across, strict=True):
            own = [
                (rows.index((result.head, result.vocab_size)), result)
                for result in results
                if (result.task, result.batch_size) == (task, batch_size)
            ]
            _draw_panel(axes, own)
            axes.set_title(f"{task}, batch {batch_size}", size=10)
            axes.set_yticks(range(len(names)), names)
    panels[0, 0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("ms a token")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(0.985, 0.02 / height), ncols=2,
        frameon=False,
    )  # fmt: skip
    figure.text(0.02, 0.15 / height, "\n".join(lines), size=8.5, va="bottom", linespacing=1.3)
    return figure


def _draw_panel(axes: "Axes", own: Sequence[tuple[int, Result]]) -> None:
    from matplotlib.ticker import FuncFormatter

    for side, shift in ((HEAD, -0.15), (NAIVE, 0.15)):
        found = [(place, result.spread(side)) for place, result in own]
        known = [(place, spread) for place, spread in found if spread is not None]
        if known:
            axes.errorbar(
                [spread.median for _, spread in known],
                [place + shift for place, _ in known],
                xerr=[
                    [spread.median - spread.min for _, spread in known],
                    [spread.max - spread.median for _, spread in known],
                ],
                fmt=MARKERS[side],
                color=COLORS[side],
                elinewidth=1,
                capsize=2,
                label=LABELS[side],
            )
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.18)  # room for the words
    for place, result in own:
        ours, ratio = result.spread(HEAD), result.times_faster()
        if ours is not None and ratio is not None:
            text = f" {ratio.median:.1f}x"
            axes.text(ours.max, place - 0.15, text, size=7.5, va="center", clip_on=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.6g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(few))
    axes.tick_params(axis="x", which="minor", labelsize=8)
    axes.grid(alpha=0.3)
    axes.margins(y=0.5 / max(1, len(own)))
    axes.set_axisbelow(True)
