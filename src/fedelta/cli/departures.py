"""`fedelta departures`: whether a site's log of what left it is whole, what is in it, and what that adds up to."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedelta.cli.tables import new_table, show_table
from fedelta.core.chain import Line
from fedelta.core.errors import BadInput
from fedelta.fleet.departures import FILE, Departure, Total, read, totals
from fedelta.observe.text import bytes_text, plural

_LINES_SHOWN = 10
_TENSORS_SHOWN = 4


@click.command(short_help="Check a site's own log of what left it, and tell what was in it.")
@click.argument("log", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--last", type=click.IntRange(0), default=_LINES_SHOWN, show_default=True, metavar="N", help="Lines to show."
)
@click.option("--head", "noted", metavar="HASH", help="A hash that was noted down: fails if the log lacks that line.")
@click.option("--json", "as_json", is_flag=True, help="Print all lines as JSON.")
def command(log: Path, last: int, noted: str | None, as_json: bool) -> None:
    """Check the log FILE that `fedelta join` keeps of what left a site; it may be the folder of --keep."""
    path = log / FILE if log.is_dir() else log
    if not log.exists():
        raise BadInput(f"there is no {log}; give the folder of --keep of `fedelta join`, such as joined/NAME")
    lines = read(path, includes=noted)
    head = lines[-1].tip.head if lines else None
    if as_json:
        plain = [{"time": line.time.isoformat(), **asdict(line.entry)} for line in lines]
        click.echo(json.dumps({"departures": plain, "head": head}, indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    count = plural(len(lines), "reply") if len(lines) == 1 else f"{len(lines):,} replies"
    _say(console, f"{path}: {count}. Nothing was altered, removed or moved.")
    if not lines:
        return
    console.print()
    show_table(console, _totals(lines))
    if last:
        console.print()
        show_table(console, _lines(lines[-last:]))
    console.print()
    _say(console, f"head {head}")
    _say(
        console,
        "Note this hash down elsewhere: it stands for all lines up to here, and is the only way to see later that "
        "lines were cut off at the end, or that all was written anew.",
        "dim",
    )


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, soft_wrap=not console.is_terminal)


def _totals(lines: Sequence[Line[Departure]]) -> Table:
    """Of each experiment."""
    table = new_table("experiment", "answers", "failures", "rounds", "left", texts=2)
    for experiment, total in totals(lines).items():
        numbers = (f"{total.failures:,}", f"{total.rounds:,}", f"{total.bytes:,} B")
        table.add_row(f"{experiment[:16]}…", escape(_answers(total)), *numbers)
    return table


def _answers(total: Total) -> str:
    """ "20 train, 100 steps of sums"."""
    said = [f"{count:,} {op}" for op, count in sorted(total.answers.items()) if "/" not in op]
    steps = sum(count for op, count in total.answers.items() if "/" in op)
    return ", ".join([*said, *([plural(steps, "step") + " of secure sums"] if steps else [])]) or "none"


def _lines(lines: Sequence[Line[Departure]]) -> Table:
    table = new_table("time (UTC)", "request", "tensors", "round", "bytes", texts=3)
    for line in lines:
        entry = line.entry
        names = [
            f"{piece.name}:{piece.dtype}[{','.join(map(str, piece.shape))}]" for piece in entry.tensors[:_TENSORS_SHOWN]
        ]
        rest = len(entry.tensors) - len(names)
        what = entry.error or ", ".join([*names, *([f"… {rest} more"] if rest else [])]) or "nothing"
        when = f"{line.time:%Y-%m-%d %H:%M:%S}"
        table.add_row(when, escape(entry.op), escape(what), f"{entry.round:,}", bytes_text(entry.bytes))
    return table
