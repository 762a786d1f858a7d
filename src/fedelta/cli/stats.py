"""`fedelta stats`: what the rows of all sites are like, before anything is trained.

Here are the options and which of them go together; reading is in `stats_data`, what is shown in `stats_report`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedelta.core.errors import BadInput
from fedelta.observe.text import plural

if TYPE_CHECKING:
    from rich.console import Console

    from fedelta.cli.stats_data import Source
    from fedelta.core.examples import Examples
    from fedelta.statistics.program import Statistics, StatisticsState

_QUANTILES = "0.05,0.25,0.5,0.75,0.95"
_DELTA = 1e-5
_WIDE = 140  # letters of a line that goes to no terminal


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The options that say how columns are looked at, under their names."""

    bins: int
    quantiles: tuple[float, ...]
    precision: float
    clear: bool
    epsilon: float | None
    delta: float | None
    ledger: Path | None


def _quantiles(_context: object, _option: object, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as {_QUANTILES}") from None


@click.command(short_help="Counts, means, histograms and quantiles over the sites, of which only sums are seen.")
@click.option("--site", "sites", multiple=True, metavar="NAME=FILE", help="A site and its table; once for each site.")
@click.option(
    "--data", metavar="D", help="Instead: one table of all sites' rows; a file as in finetune, or a hub name."
)
@click.option("--by", metavar="COLUMN", help="The column of --data that says to which site a row belongs.")
@click.option("--no-header", is_flag=True, help="The files have no header line: their columns are 1, 2, …")
@click.option("--columns", metavar="A,B,…", help="Their names, where files have no header line.")
@click.option("--only", metavar="A,B,…", show_default="all", help="The columns to look at.")
@click.option("--label", metavar="COLUMN", help="The column to be predicted: its distribution is shown first.")
@click.option(
    "--missing",
    multiple=True,
    metavar="TEXT",
    show_default="? NA N/A NaN null none -",
    help="What stands for no value, besides nothing at all; may be given several times.",
)
@click.option(
    "--range",
    "ranges",
    multiple=True,
    metavar="COLUMN=LOW:HIGH",
    help="Values to look at; those outside are counted apart. Where none is given, one is looked for.",
)
@click.option(
    "--categories",
    multiple=True,
    metavar="COLUMN=A,B,…",
    help="Values that are told apart, of text or numbers; all others are counted together.",
)
@click.option(
    "--bins", type=click.IntRange(2, 1000), metavar="N", default=20, show_default=True, help="About, of a histogram."
)
@click.option(
    "--quantiles",
    metavar="Q,Q,…",
    default=_QUANTILES,
    show_default=True,
    callback=_quantiles,
    help="Above 0 and below 1: the smallest value that so large a share of all values does not exceed.",
)
@click.option(
    "--precision",
    type=click.FloatRange(1e-9, 0.5),
    metavar="P",
    default=1e-6,
    show_default=True,
    help="Of quantiles, as a share of a column's range; those of values with up to 4 digits after the point are exact.",
)
@click.option("--clear", is_flag=True, help="Without secure aggregation: the coordinator sees what each site counts.")
@click.option(
    "--epsilon",
    type=click.FloatRange(0, min_open=True),
    metavar="E",
    help="Differential privacy for each row: sites add noise to what they count. Needs a --range, or --categories, for "
    "each column of numbers.",
)
@click.option(
    "--delta",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="D",
    show_default=f"{_DELTA:g}",
    help="The probability with which --epsilon may not hold; well below 1 / the number of rows.",
)
@click.option(
    "--ledger",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Privacy ledger that all that is released about the same rows shares: what others have spent counts.",
)
@click.option(
    "--json", "as_json", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write it all."
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="A figure: png, svg or pdf."
)
def command(as_json: Path | None, plot: Path | None, label: str | None, **options: Any) -> None:
    """Tell what the rows of all sites together are like: how many, what is missing, how values are distributed.

    The coordinator sees sums over the sites, and nothing of a single one; with --epsilon not even these without noise.
    This is a simulation: all sites' files are read here.
    """
    wanted = Wanted(**{name: options.pop(name) for name in Wanted.__dataclass_fields__})
    _check(wanted, as_json, plot, sites=options["sites"], data=options["data"], by=options["by"])
    from rich.console import Console

    from fedelta.cli.stats_data import Source
    from fedelta.cli.stats_report import show

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    with console.status("reading the sites' tables"):
        source = Source.take(options, label)
        program = _program(source, wanted)
        rows = source.rows()
    state = _run(program, rows, console)
    summary = program.summary(state)
    show(program, summary, label, source.not_told, console)
    if as_json is not None:
        as_json.write_text(json.dumps(summary.to_plain(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if plot is not None:
        from fedelta.cli.stats_figure import figure

        figure(summary, label).savefig(plot, dpi=150)
        console.print(f"The figure is in {plot}.", markup=False)


def _check(
    wanted: Wanted,
    as_json: Path | None,
    plot: Path | None,
    *,
    sites: tuple[str, ...],
    data: str | None,
    by: str | None,
) -> None:
    """Refuse options that do not go together."""
    refusals = [
        (not sites and data is None, "give the sites' tables: --site NAME=FILE for each, or --data D --by COLUMN."),
        (bool(sites) and data is not None, "--site and --data are two ways to give the rows; leave one of them out."),
        (data is not None and by is None, "--data needs --by COLUMN, which says to which site a row belongs."),
        (data is None and by is not None, "--by is for --data; each --site is a site of its own."),
        (wanted.delta is not None and wanted.epsilon is None, "--delta has no effect without --epsilon; give both."),
        (wanted.ledger is not None and wanted.epsilon is None, "--ledger has no effect without --epsilon; give both."),
        (
            plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"),
            f"--plot writes png, svg or pdf, by the name of the file, and {plot} is none of them.",
        ),
    ]
    for wrong, sentence in refusals:
        if wrong:
            raise click.UsageError(sentence)
    for option, path in (("--json", as_json), ("--plot", plot)):
        if path is not None:
            _check_writable(option, path)


def _check_writable(option: str, path: Path) -> None:
    """Refuse what could not be written at the end, when the sums are made and a budget is spent."""
    if not path.parent.is_dir():
        raise click.UsageError(f"there is no folder {path.parent} for {option} {path}; make it, or name another file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise click.UsageError(f"{option} {path} cannot be written; name another file, or make it writable.")


def _program(source: "Source", wanted: Wanted) -> "Statistics":
    from fedelta.algorithms.parts import Clear
    from fedelta.cli.privacy import ledger_in
    from fedelta.core.release import Budget
    from fedelta.privacy.ledger import MemoryLedger
    from fedelta.secure.aggregation import SecureAggregation
    from fedelta.statistics.program import Statistics

    sites = len(source.names)
    if sites < 2:
        raise BadInput(f"statistics are over several sites, and there is {plural(sites, 'site')}; give each its --site")
    if sites < SecureAggregation.least and not wanted.clear:
        raise BadInput(
            "of a sum over 2 sites each knows the other's part, so that secure aggregation needs 3; with --clear the "
            "coordinator sees what each site counts"
        )
    if wanted.epsilon is not None:
        source.check_ranges()
    return Statistics(
        columns=source.columns,
        bins=wanted.bins,
        quantiles=wanted.quantiles,
        precision=wanted.precision,
        collect=Clear() if wanted.clear else SecureAggregation(),
        privacy=None if wanted.epsilon is None else Budget(epsilon=wanted.epsilon, delta=wanted.delta or _DELTA),
        ledger=MemoryLedger() if wanted.ledger is None else ledger_in(wanted.ledger.parent, wanted.ledger),
    )


def _run(program: "Statistics", rows: "dict[str, Examples]", console: "Console") -> "StatisticsState":
    from fedelta.core.program import run
    from fedelta.fleet.local import Local

    state = program.init()
    with console.status("round 1: counting rows") as status:
        for after, report in run(program, Local(program, rows.__getitem__, list(rows))):
            state, left = after, int(report.metrics["open"])
            what = f"{plural(left, 'quantile')} between two bounds" if left else "looking at ranges and histograms"
            status.update(f"round {report.round + 1}: {what}")
    return state
