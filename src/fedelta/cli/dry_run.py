"""`fedelta join --dry-run`: what a site would compute and let out, beside its policy.

Nothing is sent, and no data are read.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedelta.algorithms.federation import Federation
from fedelta.algorithms.forecast import asked_in
from fedelta.algorithms.forecast_sums import Bearing
from fedelta.cli import guarantees
from fedelta.cli.tables import new_table, show_table
from fedelta.core.messages import PartyId
from fedelta.fleet.policy import Demand, Facts, Policy, demands, told
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
    show_table(console, _words(rows), "What it would do")
    show_table(console, _tensors(facts), "What is trained and leaves")
    show_table(console, _words(guarantees.trust(federation, _bearing(federation, sites))), "Who sees what")
    if policy is None:
        show_table(
            console, _words([("", "none: this site would take part, whatever this is; give --policy")]), "Policy"
        )
    else:
        found = demands(policy, facts)
        show_table(console, _held(found, facts), "Policy")
        unmet = sum(not one.met for one in found)
        met = not unmet
        verdict = "join" if met else f"not join: {unmet} of {len(found)} demands are not met"
        console.print()
        _say(console, f"This site would {verdict}.", "bold green" if met else "bold red")
    return met


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, soft_wrap=not console.is_terminal)


def _words(rows: Sequence[tuple[str, str]]) -> Table:
    table = new_table("", "", texts=2)
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _tensors(facts: Facts) -> Table:
    table = new_table("tensor", "shape", "numbers", texts=2)
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


def _held(found: Sequence[Demand], facts: Facts) -> Table:
    table = new_table("", "demand", "asks for", "found", texts=4)
    for one in found:
        mark = "met" if one.met else "[bold red]NOT MET[/]"
        said = one.found.replace(facts.experiment, f"{facts.experiment[:16]}…")  # above it is in full
        table.add_row(mark, escape(one.key), escape(one.asks), escape(said))
    return table


def _bearing(federation: Federation[Any], sites: Sequence[PartyId]) -> Bearing | None:
    """Of the secure sum over the smallest cohort; None where there is none, or nobody knows who takes part."""
    if not isinstance(federation.collect, SecureAggregation) or not sites:
        return None
    rounds = range(1, federation.rounds + 1)
    cohorts = [len(to) for number in rounds for op, to in asked_in(federation, sites, number) if op == "train"]
    return Bearing.of(federation.collect, min(cohorts)) if cohorts else None
