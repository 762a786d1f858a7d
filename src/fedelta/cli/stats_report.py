"""What `fedelta stats` prints: rows, label, missing values, numbers and categories, and who could see what."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedelta.core.program import Sight
from fedelta.observe.text import number_text, plural
from fedelta.privacy.ledger import MemoryLedger
from fedelta.statistics.program import Statistics
from fedelta.statistics.search import Quantile
from fedelta.statistics.summary import CategorySummary, NumberSummary, Summary, exact_text

_BLOCKS = "▁▂▃▄▅▆▇█"
_BAR = 30  # letters
_FEW = 12  # values that are listed
_LETTERS = 20  # of a histogram


def show(program: Statistics, summary: Summary, label: str | None, not_told: Sequence[str], console: Console) -> None:
    _head(program, summary, console)
    if label is not None:
        _label(summary, label, console)
    _missing(summary, console)
    numbers = [column for column in summary.columns if isinstance(column, NumberSummary)]
    if numbers:
        console.print(_numbers(numbers))
        _outside(numbers, console)
        console.print()
    few = {column.name: counts for column in summary.columns if (counts := _values(column)) and column.name != label}
    if few:
        console.print(_few(few))
    for name in not_told:
        console.print(
            f"{name} is text, and no values of it are declared: give --categories {name}=A,B,… to count them.",
            markup=False,
            soft_wrap=True,
        )


def seen(program: Statistics, summary: Summary) -> str:
    """Who could see what, and what is protected."""
    sums = program.collect.shows is Sight.SUM
    what = f"sums over {plural(len(summary.sites), 'site')}" if sums else "what each site counts"
    text = f"The coordinator saw {what}, in {plural(summary.rounds, 'round')}"
    remembered = not isinstance(program.ledger, MemoryLedger)
    if summary.privacy is None:
        return f"{text}; nothing bounds what exact counts tell of a row (--epsilon does)."
    honest = program.collect.honest(len(summary.sites) + len(summary.absent))
    others = f", as long as {plural(honest, 'site')} of those that answered add their noise" if sums else ""
    kept = "" if remembered else "\nNothing remembers what was spent: with --ledger FILE the next run knows of it."
    return (
        f"{text}, with noise that the sites added.\nPrivacy: each row is protected from the coordinator and whoever "
        f"reads this{others}; epsilon {summary.privacy.epsilon:g} at delta {summary.privacy.delta:g}, for the same "
        f"data with it and without it ({summary.rho:.4g}-zero-concentrated). Every count has noise of standard "
        f"deviation {number_text(summary.noise)}.{kept}"
    )


def _head(program: Statistics, summary: Summary, console: Console) -> None:
    about = "about " if summary.privacy is not None else ""
    rows = f"{about}{_count(summary.rows)} rows at {plural(len(summary.sites), 'site')}: {', '.join(summary.sites)}"
    console.print(rows, style="bold", markup=False, soft_wrap=True)
    console.print(seen(program, summary), markup=False, soft_wrap=True)
    for name, why in summary.absent.items():
        console.print(f"{name} is not in it: {why}", style="yellow", markup=False, soft_wrap=True)
    if summary.ended is not None:
        console.print(f"Not all is known: {summary.ended}", style="yellow", markup=False, soft_wrap=True)
    console.print()


def _label(summary: Summary, label: str, console: Console) -> None:
    column = summary[label]
    counts = _values(column)
    console.print(f"label {label}", style="bold", markup=False)
    if counts is None:
        console.print(f"  it has more than {_FEW} values: see below", markup=False)
    else:
        given = sum(max(count, 0) for count in counts.values()) or 1
        width = max(map(len, counts))
        for value, count in counts.items():
            share = max(count, 0) / given
            bar = "█" * round(_BAR * share)
            console.print(f"  {value:<{width}}  {_count(count):>9}  {share:6.1%}  {bar}", markup=False)
    console.print()


def _missing(summary: Summary, console: Console) -> None:
    lacking = sorted((c for c in summary.columns if _whole(c.missing)), key=lambda column: -column.missing)
    if not lacking:
        console.print("no value is missing", style="bold")
        console.print()
        return
    rows = max(summary.rows, 1)
    cells = sum(max(column.missing, 0) for column in summary.columns)
    about = f"{_count(cells)} of {_count(rows * len(summary.columns))} values"
    console.print(f"missing: {about} ({cells / rows / len(summary.columns):.1%})", style="bold", markup=False)
    width = max(len(column.name) for column in lacking)
    for column in lacking:
        share = min(max(column.missing / rows, 0), 1)
        bar = "█" * round(_BAR * share)
        console.print(
            f"  {column.name:<{width}}  {_count(column.missing):>9}  {share:6.1%}  {bar}", markup=False, soft_wrap=True
        )
    console.print()


def _numbers(columns: Sequence[NumberSummary]) -> Table:
    table = _table("column")
    quantiles = list(dict.fromkeys(q for column in columns for q in column.quantiles))
    noisy = any(column.mean_noise for column in columns)
    for heading in ("values", "mean", *(["± noise"] if noisy else []), "std", *(map(_percent, quantiles))):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("histogram", no_wrap=True)
    for column in columns:
        table.add_row(
            escape(column.name),
            _count(column.within),
            among(column, column.mean),
            *([f"{column.mean_noise:.2g}"] if noisy else []),
            _short(column.deviation),
            *(_quantile(column.quantiles.get(q), column) for q in quantiles),
            _histogram(column),
        )
    return table


def _few(columns: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("column")
    table.add_column("rows of each value", overflow="fold")
    for name, counts in columns.items():
        given = sum(max(count, 0) for count in counts.values()) or 1
        shown = [f"{value}: {_count(count)} ({max(count, 0) / given:.1%})" for value, count in counts.items()]
        table.add_row(escape(name), escape(",  ".join(shown)))
    return table


def _outside(columns: Sequence[NumberSummary], console: Console) -> None:
    for column in columns:
        if _whole(column.below) or _whole(column.above):
            console.print(
                f"{column.name} has {_count(column.below)} below and {_count(column.above)} above its range "
                f"{among(column, column.low)} to {among(column, column.high)}; they count nowhere else.",
                markup=False,
                soft_wrap=True,
            )


def _values(column: NumberSummary | CategorySummary) -> Mapping[str, float] | None:
    """The counts of a few values; None for what has more, or of which none is declared."""
    if isinstance(column, CategorySummary):
        if not column.counts:
            return None
        return column.shown if _whole(column.other) else column.counts
    counts = column.values
    found = {value: count for value, count in (counts or {}).items() if count}
    return found if 0 < len(found) <= _FEW else None


def _histogram(column: NumberSummary) -> str:
    """Where it begins, a letter for each bin or for several, and where it ends."""
    if column.bins is None:
        return ""
    together = -(-len(column.bins.counts) // _LETTERS)
    starts = range(0, len(column.bins.counts), together)
    counts = [max(sum(column.bins.counts[start : start + together]), 0.0) for start in starts]
    most = max(counts) or 1.0
    blocks = "".join(_BLOCKS[min(int(8 * count / most), 7)] if count else " " for count in counts)
    return f"{among(column, column.bins.edges[0])} {blocks} {among(column, column.bins.edges[-1])}"


def _quantile(found: Quantile | None, column: NumberSummary) -> str:
    """One number; two where a run has ended before it was found."""
    if found is None:
        return "–"
    wide = (column.high or 0.0) - (column.low or 0.0)
    if found.exact or column.mean_noise or found.high - found.low <= 1e-3 * wide:
        return among(column, found.high)
    return f"{among(column, found.low)} … {among(column, found.high)}"


def among(column: NumberSummary, number: float | None) -> str:
    """With as many digits as tell a thousandth of the column's range, and 4 at least."""
    if number is None or column.low is None or column.high is None or not column.low < column.high:
        return "–" if number is None else exact_text(number)
    largest = max(abs(column.low), abs(column.high))
    digits = 3 + math.ceil(math.log10(largest / (column.high - column.low)) + 1e-9)
    return f"{number:.{min(max(4, digits), 17)}g}"


def _percent(q: float) -> str:
    return f"{(100 * Decimal(repr(q))).normalize():f}%"


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"


def _count(count: float) -> str:
    return f"{_whole(count):,}"


def _whole(count: float) -> int:
    """Without its noise below 0: no count is negative."""
    return max(0, round(count))


def _table(first: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    return table
