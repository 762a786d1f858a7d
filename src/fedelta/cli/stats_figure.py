"""A figure of what `fedelta stats` finds: a histogram or bars for each column, all sites together."""

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fedelta.cli.stats_report import among
from fedelta.observe.plots import COLOURS, INK, MUTED, RULE
from fedelta.observe.text import number_text
from fedelta.statistics.summary import CategorySummary, NumberSummary, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a "$" in a name is a dollar
}
_ACROSS = 4  # panels
_BARS = 15  # of a column of categories; more are left out


def figure(summary: Summary, label: str | None) -> "Figure":
    """The label first, if there is one; a title has the share of missing values."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = sorted(summary.columns, key=lambda column: column.name != label)  # stable
    across = min(_ACROSS, len(columns))
    down = -(-len(columns) // across)
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(3.1 * across, 2.3 * down + 0.5), layout="constrained", facecolor="white")
        panels = drawn.subplots(down, across, squeeze=False).flatten()
        for axes, column in zip(panels, columns, strict=False):
            _panel(axes, column, summary, COLOURS[1] if column.name == label else COLOURS[0])
        for axes in panels[len(columns) :]:
            axes.set_visible(False)
        noise = f", noise of standard deviation {number_text(summary.noise)} on each count" if summary.noise else ""
        drawn.suptitle(
            f"{max(0, round(summary.rows)):,} rows at {len(summary.sites)} sites{noise}", color=INK, x=0.01, ha="left"
        )
        drawn.draw_without_rendering()  # ticks are made when drawn, and would otherwise miss this style
    return drawn


def _panel(axes: "Axes", column: NumberSummary | CategorySummary, summary: Summary, colour: str) -> None:
    share = min(max(column.missing / max(summary.rows, 1), 0), 1)
    name = column.name if len(column.name) <= 24 else column.name[:23] + "…"
    axes.set_title(name, loc="left", fontsize=9.5, fontweight="bold", color=INK)
    if share >= 0.0005:
        axes.set_title(f"{share:.1%} missing", loc="right", fontsize=8, color=COLOURS[1] if share > 0.2 else MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, length=0)
    axes.set_axisbelow(True)
    if isinstance(column, CategorySummary):
        _bars(axes, column.shown if round(column.other) > 0 else column.counts, colour)
    elif column.values is not None:
        _bars(axes, column.values, colour)
    elif column.bins is not None:
        _histogram(axes, column, colour)
    else:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_axis_off()


def _histogram(axes: "Axes", column: NumberSummary, colour: str) -> None:
    assert column.bins is not None
    edges, counts = column.bins.edges, [max(count, 0) for count in column.bins.counts]
    widths = [high - low for low, high in pairwise(edges)]
    axes.bar(edges[:-1], counts, widths, align="edge", color=colour, edgecolor="white", linewidth=0.6)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    if column.mean is not None:
        axes.axvline(column.mean, color=INK, linewidth=1)
        axes.annotate(
            f"mean {among(column, column.mean)}",
            (column.mean, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            va="top",
            fontsize=7.5,
            color=INK,
        )
    axes.margins(x=0.02, y=0.16)


def _bars(axes: "Axes", counts: Mapping[str, float], colour: str) -> None:
    names, numbers = list(counts), _are_numbers(counts)
    if not numbers:
        names = names[:_BARS]
    axes.bar(range(len(names)), [max(counts[name], 0) for name in names], 0.8, color=colour)
    every = max(1, len(names) // 8)
    ticks = range(0, len(names), every)
    written = [names[place] if numbers else names[place][:12] for place in ticks]
    axes.set_xticks(list(ticks), written)
    if sum(map(len, written)) > 30:
        axes.tick_params(axis="x", rotation=40)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_xlim(-0.7, max(len(names), 3) - 0.3)


def _are_numbers(counts: Mapping[str, float]) -> bool:
    try:
        return [float(name) for name in counts] != []
    except ValueError:
        return False
