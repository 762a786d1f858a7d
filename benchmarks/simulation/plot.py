"""Two pictures: every contestant in units of the bare loop, and how the time of a round grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.simulation.figures import figures
from benchmarks.simulation.measure import BASE

_COLOURS = ("#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#332288", "#117733")  # of fedelta's plans
_PEERS = {BASE: "#000000", "flower": "#d55e00", "pfl-research": "#e69f00"}
_GREY, _GRID = "#8a95a3", "#e8ecf0"


def ratios(blocks: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a workload: median ratio to the bare loop, and the least and the most of the repeats."""
    found = [figures(block) for block in blocks]
    rows = sum(len(own) for own in found)
    figure = Figure(figsize=(7, 0.9 * len(found) + 0.3 * rows), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False, height_ratios=[len(own) for own in found])
    colours = _colours(blocks)
    for block, own, axes in zip(blocks, found, panels[:, 0], strict=True):
        for place, entry in enumerate(own):
            axes.plot([entry.least, entry.most], [place, place], color=colours[entry.name], linewidth=2, alpha=0.5)
            axes.plot(entry.ratio, place, "o", color=colours[entry.name])
            axes.annotate(f"{entry.ratio:.3g}", (entry.ratio, place), (0, 5), textcoords="offset points", ha="center")
        axes.axvline(1, color=_GREY, linewidth=1, linestyle=":")
        axes.set(xscale="log", ylim=(len(own) - 0.5, -0.8), title=block["workload"])
        axes.set_yticks(range(len(own)), [entry.name for entry in own])
        axes.grid(axis="x", color=_GRID)
    panels[-1, 0].set_xlabel("time of a round in units of the bare loop (median, least to most)")
    _save(figure, path)


def growth(panels: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Log-log: time of a round against what the panel is named for; blocks are named KIND@SIZE."""
    figure = Figure(figsize=(4.6 * len(panels), 3.9), layout="constrained")
    for (label, blocks), axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _lines(axes, blocks)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="time of a round (s)")
        axes.grid(color=_GRID)
        axes.legend(frameon=False, fontsize="small")
    _save(figure, path)


def _lines(axes: Axes, blocks: Sequence[Mapping[str, Any]]) -> None:
    colours = _colours(blocks)
    lines: dict[str, list[tuple[int, float]]] = {}
    for block in blocks:
        size = int(block["workload"].partition("@")[2])
        for entry in figures(block):
            lines.setdefault(entry.name, []).append((size, entry.round_s))
    for name, points in lines.items():
        style = "--" if name == BASE else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=name, color=colours[name], markersize=4)


def _colours(blocks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    plans = dict.fromkeys(name for block in blocks for name in block["contestants"] if name not in _PEERS)
    return _PEERS | {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(plans)}


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
