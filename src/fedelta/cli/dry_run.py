"""`fedelta join --dry-run`: what a site would compute and let out, beside its policy.

Nothing is sent, and no data are read.
"""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedelta.algorithms.federation import Federation
from fedelta.algorithms.forecast import asked_in
from fedelta.algorithms.forecast_sums import Bearing
from fedelta.cli import guarantees
from fedelta.core.messages import PartyId
from fedelta.fleet.policy import Demand, Facts, Policy, demands, told, verdict
from fedelta.secure.aggregation import SecureAggregation

_TENSORS_SHOWN = 12


def show(
    federation: Federation[Any],
    facts: Facts,
    policy: Policy | None,
    site: PartyId,
    sites: Sequence[PartyId],
    console: Console,
) -> bool:
    """Print all of it; returns whether the site would take part."""
    met = True
    _say(console, f"{site} has not connected to anybody: this is what its own copy of the experiment says.")
    rows = told(facts)
    if policy is not None and policy.hours is not None:
        rows.append(("hours", f"{'; '.join(map(str, policy.hours))} in {policy.zone}"))
    _print(console, "What it would do", _words(rows))
    _print(console, "What is trained and leaves", _tensors(facts))
    _print(console, "Who sees what", _words(guarantees.trust(federation, _bearing(federation, sites))))
    if policy is None:
        _print(console, "Policy", _words([("", "none: this site would take part, whatever this is; give --policy")]))
    else:
        found = demands(policy, facts)
        _print(console, "Policy", _held(found))
        met = all(one.met for one in found)
        console.print()
        _say(console, f"{verdict(found).capitalize()}.", "bold green" if met else "bold red")
    return met


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, soft_wrap=not console.is_terminal)


def _print(console: Console, heading: str, table: Table) -> None:
    console.print()
    console.print(heading, style="bold")
    console.print(table)


def _table(*columns: str, numbers: int = 0) -> Table:
    """A table whose last `numbers` columns are numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(columns), show_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place >= len(columns) - numbers else "left", overflow="fold")
    return table


def _words(rows: Sequence[tuple[str, str]]) -> Table:
    table = _table("", "")
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _tensors(facts: Facts) -> Table:
    table = _table("tensor", "shape", "numbers", numbers=1)
    sizes = [_count(shape) for shape in facts.shapes]
    rows = list(zip(facts.tensors, facts.shapes, sizes, strict=True))
    for name, shape, size in rows[:_TENSORS_SHOWN]:
        table.add_row(escape(name), escape(" × ".join(map(str, shape)) or "a number"), f"{size:,}")
    rest = sizes[_TENSORS_SHOWN:]
    if rest:
        table.add_row(f"… {len(rest):,} more", "", f"{sum(rest):,}")
    table.add_section()
    table.add_row("in all", "", f"{facts.parameters:,}")
    return table


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _held(found: Sequence[Demand]) -> Table:
    table = _table("", "demand", "asks for", "found")
    for one in found:
        mark = "met" if one.met else "[bold red]NOT MET[/]"
        table.add_row(mark, escape(one.key), escape(one.asks), escape(one.found))
    return table


def _bearing(federation: Federation[Any], sites: Sequence[PartyId]) -> Bearing | None:
    """Of the secure sum over the smallest cohort; None where there is none, or nobody knows who takes part."""
    if not isinstance(federation.collect, SecureAggregation) or not sites:
        return None
    rounds = range(1, federation.rounds + 1)
    cohorts = [len(to) for number in rounds for op, to in asked_in(federation, sites, number) if op == "train"]
    return Bearing.of(federation.collect, min(cohorts)) if cohorts else None
