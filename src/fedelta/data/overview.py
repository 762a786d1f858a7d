"""What each site got: counts of classes per site, as a table, a plot and a number.

Label skew as a mean total-variation distance: a half of the L1 distance of two distributions, the number of rows that
would have to change class, as a share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fedelta.core.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

_SITES_SHOWN = 20  # rows of a table; more are summed up
_CLASSES_SHOWN = 12  # columns of a table; more are summed up
_INK, _BAR, _GRID = "#222831", "#8a95a3", "#e8ecf0"
_SHADES = ["#f3f6f9", "#b9d3e6", "#5c9bc7", "#1f5f92", "#0b2f52"]  # from no rows to the most


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Overview:
    """`counts[k, c]`: number of rows of class `classes[c]` at site `names[k]`."""

    names: tuple[str, ...]
    classes: tuple[str, ...]
    counts: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.counts.shape != (len(self.names), len(self.classes)) or not self.counts.size:
            raise BadInput(
                f"counts of {len(self.names)} sites and {len(self.classes)} classes have shape {self.counts.shape}; "
                "an overview needs at least one of each"
            )

    def skew(self) -> float:
        """Mean total-variation distance of the sites' label distributions to the pooled one, in [0, 1].

        0: every site has the pooled mixture of classes. Each site that has rows counts the same. 0 if none has any.
        """
        sizes = self.counts.sum(axis=1)
        filled = self.counts[sizes > 0]
        if not len(filled):
            return 0.0
        pooled = filled.sum(axis=0) / filled.sum()
        return float((np.abs(filled / filled.sum(axis=1, keepdims=True) - pooled).sum(axis=1) / 2).mean())

    def summary(self) -> str:
        """Sizes and skew in a line."""
        sizes = self.counts.sum(axis=1)
        spread = f"{sizes.min():,} to {sizes.max():,}, median {np.median(sizes):,.0f}"
        return f"rows per site: {spread}; label skew {self.skew():.2f}"

    def table(self) -> Table:
        """A table with a line per site and a last line for all; of more than 20 sites the first ones are shown.

        Up to 12 classes have a column each; with more, the number of classes and the most frequent one are shown.
        """
        single = len(self.classes) <= _CLASSES_SHOWN
        table = Table(
            box=SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
        )
        table.add_column("site", overflow="fold")
        for heading in ("rows", *self.classes) if single else ("rows", "classes"):
            table.add_column(escape(heading), justify="right", overflow="fold")
        if not single:
            table.add_column("most frequent")
        many = len(self.names) > _SITES_SHOWN
        shown = _SITES_SHOWN if many else len(self.names)
        for name, counts in zip(self.names[:shown], self.counts[:shown], strict=True):
            table.add_row(escape(name), *self._cells(counts))
        if many:
            table.add_row(f"… {len(self.names) - shown:,} more", *self._cells(self.counts[shown:].sum(axis=0)))
        table.add_section()
        table.add_row(f"all {len(self.names):,}", *self._cells(self.counts.sum(axis=0)), style="bold")
        return table

    def _cells(self, counts: npt.NDArray[np.int64]) -> list[str]:
        total = int(counts.sum())
        if len(self.classes) <= _CLASSES_SHOWN:
            return [f"{total:,}", *(f"{count:,}" if count else "·" for count in counts)]
        top = int(counts.argmax())
        most = f"{escape(self.classes[top])} ({counts[top] / total:.0%})" if total else "–"
        return [f"{total:,}", f"{(counts > 0).sum():,}", most]

    def plot(self) -> "Figure":
        """A figure: above, a bar for the size of each site; below, a cell per site and class, darker with more rows.

        Cells carry their numbers where there is room. The figure belongs to no pyplot window: save it with
        `figure.savefig(path)`.
        """
        from matplotlib.figure import Figure

        sites, classes = self.counts.shape
        margin = 1.9 + 0.075 * max(len(_short(name)) for name in self.classes)  # inches beside the cells
        width = float(np.clip(0.52 * sites, 3.6, 11.5))
        height = float(np.clip(0.3 * classes, 1.2, 9.0))
        figure = Figure(figsize=(width + margin, height + 2.3), facecolor="white", layout="constrained")
        bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, height])
        self._draw_sizes(bars)
        self._draw_cells(cells, min(width / sites / 0.52, height / classes / 0.22))
        self._draw_ticks(cells, width / sites, height / classes)
        return figure

    def _draw_sizes(self, axes: "Axes") -> None:
        sizes = self.counts.sum(axis=1)
        axes.bar(range(len(sizes)), sizes, color=_BAR, width=0.8 if len(sizes) <= 120 else 1.0)
        axes.set_ylabel("rows", color=_INK, fontsize=9)
        axes.set_ylim(0, max(int(sizes.max()), 1) * 1.08)
        axes.locator_params(axis="y", nbins=3, integer=True)
        axes.yaxis.set_major_formatter(_thousands)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=_GRID)
        axes.tick_params(axis="x", labelbottom=False)
        at = f"at {len(sizes):,} sites" if len(sizes) > 1 else "at one site"
        title = f"{int(sizes.sum()):,} rows {at}, label skew {self.skew():.2f}"
        axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
        _plain(axes)

    def _draw_cells(self, axes: "Axes", room: float) -> None:
        """The cells; with their numbers if `room`, the size of a cell over that of a number, is at least 1."""
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        shades = LinearSegmentedColormap.from_list("rows", _SHADES)
        # The square root keeps small counts apart from none at all.
        scale = PowerNorm(0.5, vmin=0, vmax=max(int(self.counts.max()), 1))
        sites, classes = self.counts.shape
        edges = np.arange(sites + 1) - 0.5, np.arange(classes + 1) - 0.5
        line = 0.8 if sites <= 120 and classes <= 120 else 0.0
        mesh = axes.pcolormesh(*edges, self.counts.T, cmap=shades, norm=scale, edgecolors="white", linewidth=line)
        mesh.set_rasterized(line == 0)
        axes.invert_yaxis()
        bar = axes.figure.colorbar(mesh, ax=axes, pad=0.015, aspect=14, shrink=0.9, format=_thousands)
        bar.locator = _integers()
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=_INK, labelsize=8, length=0)
        bar.ax.set_title("rows", fontsize=9, color=_INK, loc="left")
        for site, label in zip(*np.nonzero(self.counts), strict=True) if room >= 1 else ():
            count = int(self.counts[site, label])
            ink = "white" if scale(count) > 0.52 else _INK
            axes.text(site, label, f"{count:,}", ha="center", va="center", fontsize=7.5, color=ink)
        _plain(axes)

    def _draw_ticks(self, axes: "Axes", step: float, rise: float) -> None:
        """Names of sites and classes, as many as fit in cells of `step` by `rise` inches."""
        flat = max(len(_short(name)) for name in self.names) * 0.085 <= step
        for axis, names, size in ((axes.xaxis, self.names, step), (axes.yaxis, self.classes, rise)):
            every = max(1, int(np.ceil(0.155 / size)))
            axis.set_ticks(range(0, len(names), every), [_short(name) for name in names[::every]])
        axes.tick_params(axis="x", rotation=0 if flat else 90)


def overview(sites: Mapping[str, Sequence[int] | npt.NDArray[Any]], classes: Sequence[str]) -> Overview:
    """Count the labels of each site: `sites[name]` holds integers that index `classes`.

    Raises BadInput without sites or classes, or for a label outside the classes.
    """
    if not sites or not classes:
        raise BadInput(f"an overview needs sites and classes, got {len(sites)} and {len(classes)}")
    counts = np.zeros((len(sites), len(classes)), dtype=np.int64)
    for row, (name, given) in enumerate(sites.items()):
        labels = np.asarray(given)
        if labels.size == 0:
            continue
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise BadInput(f"labels of site {name!r} are one row of integers, got {labels.dtype} {labels.shape}")
        outside = labels[(labels < 0) | (labels >= len(classes))]
        if len(outside):
            raise BadInput(f"site {name!r} has the label {outside[0]}, outside 0..{len(classes) - 1}")
        counts[row] = np.bincount(labels, minlength=len(classes))
    return Overview(names=tuple(sites), classes=tuple(classes), counts=counts)


def _short(name: str) -> str:
    """A name for an axis: cut, and with dollar signs that do not begin a formula."""
    return (name if len(name) <= 22 else name[:21] + "…").replace("$", r"\$")


def _thousands(value: float, _: object = None) -> str:
    return f"{value:,.0f}"


def _integers() -> "MaxNLocator":
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=True)


def _plain(axes: "Axes") -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
