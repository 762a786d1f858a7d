"""`fedelta sites`: the sites of a run of `fedelta serve`, and who of them is in quarantine."""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedelta.cli.tables import new_table, show_table
from fedelta.core.errors import BadInput
from fedelta.fleet.known_sites import Event, KnownSite, minute
from fedelta.fleet.registry import DATABASE, Registry
from fedelta.observe.folder import LOCK

_SOON = timedelta(days=14)  # before a certificate expires


@click.command(short_help="The sites of a run of `serve`, and who is in quarantine.")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option("--readmit", metavar="NAME", help="End the quarantine of this site: it may join again.")
@click.option("--quarantine", metavar="NAME", help="Shut this site out until it is readmitted.")
@click.option("--because", metavar="TEXT", help="Why, for --quarantine: the site's owner reads it.")
@click.option(
    "--events",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=20,
    metavar="[N]",
    help="The last N events of all sites, 20 if no number is given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(
    run: Path, readmit: str | None, quarantine: str | None, because: str | None, events: int | None, as_json: bool
) -> None:
    """List the sites of the run in the folder RUN, while its coordinator runs or afterwards.

    A coordinator that runs follows what is changed here within some seconds.
    """
    if (quarantine is None) != (because is None) or (because is not None and not because.strip()):
        raise click.UsageError("--quarantine NAME and --because TEXT go together: the site's owner is told why")
    path = run / DATABASE
    if not path.exists():
        raise BadInput(f"there is no {DATABASE} in {run}; only the folder of a run of `fedelta serve` has one")
    console = Console(highlight=False)
    with Registry(path) as registry:
        if quarantine is not None and because is not None:
            registry.quarantine(quarantine, f"By the operator: {because.strip()}")
            _say(console, f"{quarantine} is in quarantine; what it is asked fails until it is readmitted.", as_json)
        if readmit is not None:
            registry.readmit(readmit)
            _say(console, f"{readmit} is readmitted; its owner has to join again.", as_json)
        running, sites = _is_held(run / LOCK), registry.sites()
        found = [] if events is None else registry.events(events)
    if as_json:
        click.echo(json.dumps(_plain(running, sites, found), indent=1, default=datetime.isoformat))
    elif events is not None:
        show_table(console, _events(found))
    elif quarantine is None and readmit is None:
        show_table(console, _table(sites, running))
        _say(console, "A coordinator runs." if running else "No coordinator runs: nobody is here.")
        for site in sites:
            if site.quarantine is not None:
                _say(console, f"\n{site.name} is in quarantine since {minute(site.quarantine.since)}.")
                _say(console, site.quarantine.why)


def _say(console: Console, text: str, quiet: bool = False) -> None:
    if not quiet:
        console.print(text, markup=False, soft_wrap=True)


def _is_held(lock: Path) -> bool:
    """Whether a process has the run; a folder's lock is let go again at once."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _table(sites: Sequence[KnownSite], running: bool) -> Table:
    names = ("last seen (UTC)", "rounds", "failures", "quarantine since", "certificate until")
    table = new_table("site", *names, texts=6)
    now = datetime.now(UTC)
    for site in sites:
        expires = "–" if site.expires is None else f"{site.expires:%Y-%m-%d}"
        if site.expires is not None and site.expires - now < _SOON:
            expires += "\n(expired)" if site.expires < now else "\n(soon)"
        table.add_row(
            escape(site.name),
            "never"
            if site.last_seen is None
            else "here now"
            if site.here and running
            else f"{site.last_seen:%Y-%m-%d %H:%M}",
            f"{site.counted:,}",
            f"{site.failures:,}",
            "–" if site.quarantine is None else f"{site.quarantine.since:%Y-%m-%d}",
            expires,
        )
    return table


def _events(events: Sequence[Event]) -> Table:
    table = new_table("time (UTC)", "site", "what", "why", texts=4)
    for event in events:
        times = f" ({event.times} times)" if event.times > 1 else ""
        table.add_row(
            f"{event.time:%Y-%m-%d %H:%M:%S}", escape(event.site or "–"), f"{event.what}{times}", escape(event.why)
        )
    return table


def _plain(running: bool, sites: Sequence[KnownSite], events: Sequence[Event]) -> dict[str, object]:
    """Times are ISO 8601, in UTC."""
    return {
        "running": running,
        "sites": [{**asdict(site), "here": site.here and running} for site in sites],
        "events": [asdict(event) for event in events],
    }
