"""`fedelta ledger`: whether a privacy ledger is what was recorded in it, what is in it, and what that adds up to."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedelta.cli.privacy import LEDGER, key_of
from fedelta.cli.releases import (
    ROWS_SHOWN,
    WORDS,
    Alike,
    Spent,
    alike,
    event_text,
    rounds_text,
    sites_text,
    spent,
)
from fedelta.cli.tables import new_table, show_table
from fedelta.core.chain import is_signed
from fedelta.core.errors import BadInput
from fedelta.core.messages import PartyId
from fedelta.core.release import Release, Unit
from fedelta.observe.text import plural
from fedelta.privacy.ledger import Verified, verified

_NO_KEY = (
    "Its lines are not signed: this shows damage, and not what anybody changed on purpose. Nothing is known of who "
    "wrote it."
)
_HEAD = (
    "Note this hash down elsewhere: it stands for all lines up to here, and is the only way to see later that lines "
    "were cut off at the end, or that all was written anew."
)


@click.command(short_help="Check a privacy ledger, and tell what was released and what it adds up to.")
@click.argument("ledger", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PUB",
    show_default="the .pub of its key beside it, if there",
    help="The public key with which lines are checked.",
)
@click.option(
    "--delta",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="D",
    default=1e-5,
    show_default=True,
    help="At which epsilon is computed.",
)
@click.option("--unit", type=click.Choice(get_args(Unit)), show_default="both", help="For what epsilon is computed.")
@click.option("--sites", is_flag=True, help="Epsilon of each site as well, not only the largest.")
@click.option(
    "--head", "noted", metavar="HASH", help="A hash that was noted down: fails if the ledger lacks that line."
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(
    ledger: Path, key: Path | None, delta: float, unit: Unit | None, sites: bool, noted: str | None, as_json: bool
) -> None:
    """Check the privacy ledger FILE, and tell what was released and what it adds up to; it may be a run's folder."""
    if math.isnan(delta):
        raise click.UsageError("--delta is not a number.")
    path = ledger / LEDGER if ledger.is_dir() else ledger
    key = _key(path, key)
    found = verified(path, key, includes=noted)
    units: list[Unit] = [unit] if unit else list(get_args(Unit))
    with Console(stderr=True).status("adding up what was released"):
        totals = {each: _totals(found.releases, delta, each, sites) for each in units}
    if as_json:
        click.echo(json.dumps(_numbers(found, key, delta, totals), indent=1, allow_nan=False))
    else:
        _show(path, found, key, delta, totals, Console(highlight=False))


def _key(path: Path, given: Path | None) -> Path | None:
    """The public key to check with; None for a ledger that is not signed. Raises BadInput where one is needed."""
    private = None if path.suffix == ".key" else key_of(path)
    beside = None if private is None else private.with_name(f"{private.name}.pub")
    if given is not None or beside is None:
        return given
    if not is_signed(path):
        return None
    if not beside.is_file():
        raise BadInput(
            f"{path} is signed, and {beside} is not there to check it with; give its public key as --key PUB"
        )
    return beside


def _totals(releases: Sequence[Release], delta: float, unit: Unit, sites: bool) -> dict[PartyId | None, Spent]:
    """For the site with the largest (None), and for each."""
    names = sorted({one.of for one in releases if one.of is not None}) if sites else []
    return {of: spent(releases, delta, unit, of) for of in (None, *names)}


def _numbers(
    found: Verified, key: Path | None, delta: float, totals: dict[Unit, dict[PartyId | None, Spent]]
) -> dict[str, object]:
    return {
        "releases": len(found.releases),
        "signed": key is not None,
        "head": found.head,
        "delta": delta,
        "groups": [asdict(group) for group in alike(found.releases)],
        "epsilon": {
            unit: {
                **_plain(own[None]),
                "sites": {of: _plain(one) for of, one in own.items() if of is not None},
            }
            for unit, own in totals.items()
        },
    }


def _plain(one: Spent) -> dict[str, object]:
    """`epsilon` is null where there is no guarantee, and where it is not known."""
    known = one.epsilon is not None
    finite = one.epsilon if one.epsilon is not None and math.isfinite(one.epsilon) else None
    return {"epsilon": finite, "known": known, "accountant": one.accountant, "why": one.why}


def _show(
    path: Path,
    found: Verified,
    key: Path | None,
    delta: float,
    totals: dict[Unit, dict[PartyId | None, Spent]],
    console: Console,
) -> None:
    checked = _NO_KEY if key is None else f"Each line is signed, and was checked with {key}."
    console.print(
        f"{path}: {plural(len(found.releases), 'release')}. Nothing was altered, removed or moved.", markup=False
    )
    console.print(checked, markup=False, soft_wrap=True)
    console.print()
    show_table(console, _table(alike(found.releases)))
    console.print()
    for unit, own in totals.items():
        where = "largest of all sites" if any(one.of is not None for one in found.releases) else "all sites alike"
        console.print(
            f"{WORDS[unit]}: {own[None].text()} at delta {delta:g} ({where}; {own[None].accountant.upper()})",
            markup=False,
            soft_wrap=True,
        )
        for of, one in own.items():
            if of is not None:
                console.print(f"  {of}: {one.text()}", markup=False, soft_wrap=True)
    console.print(f"\nhead {found.head}", markup=False, soft_wrap=True)
    console.print(_HEAD, style="dim", markup=False, soft_wrap=not console.is_terminal)


def _table(groups: Sequence[Alike]) -> Table:
    table = new_table("job", "unit", "what a release was", "sites", "rounds", "releases", texts=4)
    for one in groups[:ROWS_SHOWN]:
        event = escape(event_text(one.event))
        table.add_row(escape(one.job[:8]), one.unit, event, sites_text(one), rounds_text(one), f"{one.releases:,}")
    if len(groups) > ROWS_SHOWN:
        table.add_row(f"… {len(groups) - ROWS_SHOWN:,} more kinds", "", "(--json has all)", "", "", "")
    return table
