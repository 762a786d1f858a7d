"""`fedelta join`: take part in a run as a site."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fedelta.algorithms.federation import Federation
from fedelta.cli import dry_run
from fedelta.cli.deployment import deployment_options, end_in_order, loaded, log_to_stderr, trusted, watch_expiry
from fedelta.cli.experiment import Experiment
from fedelta.cli.facts import facts, largest_message
from fedelta.cli.models import kept_by
from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.messages import PartyId
from fedelta.core.program import SiteData
from fedelta.fleet import policy_file
from fedelta.fleet.address import check_address
from fedelta.fleet.departures import FILE, Departures
from fedelta.fleet.member import Member, Patience
from fedelta.fleet.own_files import IDENTITY, Party
from fedelta.fleet.policy import NO_POLICY, Door, Policy


@click.command(short_help="Take part in a run as a site.")
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--at", metavar="HOST:PORT", help="Where the coordinator listens; needed, but for --dry-run.")
@click.option("--name", metavar="NAME", show_default="that of the certificate", help="Of this site.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    show_default="joined/NAME",
    help="What this site keeps between rounds and restarts; of this site alone. Every reply that leaves is taken down "
    "in the file departures.jsonl there (`fedelta departures`), and the model is there at the end.",
)
@click.option(
    "--policy",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    show_default="all that the experiment declares",
    help="What this site allows, in TOML: every request and reply is held to it.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Tell what would be computed and what would leave, held against the policy, and end: with status 2 where the "
    "policy refuses, as without it. Nothing is sent or written, no data are read, and a --name does for a certificate.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of PyTorch.")
@deployment_options
def command(experiment: Path, at: str | None, name: str | None, keep: Path | None, **options: Any) -> None:
    """Answer for a site in the run of EXPERIMENT, until it is over. Calls its program(), sites() and site(NAME).

    What leaves is taken down in a log of the site's own before it does.
    """
    if options["dry_run"]:
        _tell(experiment, name, options)
        return
    if at is None:
        raise click.UsageError("Missing option '--at'; or give --dry-run to see what would leave this site.")
    end_in_order()
    log_to_stderr(options["log"])
    known, credentials = trusted(options["certificates"], options["insecure"], "site")
    own = _own(name, known)
    check_address(at, credentials, least=1)
    watch_expiry(options["certificates"], credentials)
    file, federation = loaded(experiment, options["settings"], test=False)
    folder, names = keep or Path("joined") / own, _names(file)
    member = Member(
        federation,
        _with_identity(file.data, options["certificates"]),
        own,
        at=at,
        credentials=credentials,
        folder=folder,
        keep=kept_by(own, folder, experiment.stem, federation, names),
        threads=options["threads"],
        patience=Patience(message=largest_message(federation, own, options["largest_message"])),
        guards=_door(_policy(options), federation, own, names, folder),
    )
    over = member.run()
    click.echo(f"{own}: {over or 'stopped'}.")


def _tell(experiment: Path, name: str | None, options: dict[str, Any]) -> None:
    """Exits with status 2 where the policy refuses."""
    folder = options["certificates"]
    own = _own(name, None if folder is None else Party.read(folder, "site").name)
    file, federation = loaded(experiment, options["settings"], test=False)
    names, policy = _names(file), _policy(options)
    if names and own not in names:
        raise BadInput(f"{experiment} has no site {own!r}; it has {', '.join(names)}")
    found = facts(federation, own, names)
    if not dry_run.show(federation, found, policy, own, names, Console(highlight=False)):
        sys.exit(2)


def _own(name: str | None, known: str | None) -> str:
    """This site's name."""
    if known is not None and name not in (None, known):
        raise BadInput(f"the certificate is of {known!r}, and --name says {name!r}; leave --name out")
    own = known or name
    if own is None:
        raise click.UsageError("this needs --name: without a certificate nothing else says which site this is")
    return own


def _policy(options: dict[str, Any]) -> Policy | None:
    return None if options["policy"] is None else policy_file.read(options["policy"])


def _names(file: Experiment) -> Sequence[PartyId]:
    """Of all sites; none where the file finds that out from data that this site does not have."""
    with suppress(FedeltaError):
        return file.names()
    return ()


def _door(
    policy: Policy | None, federation: Federation[Any], name: PartyId, sites: Sequence[PartyId], folder: Path
) -> Door:
    """Raises BadInput where the policy refuses the experiment as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    log = Departures.open(folder / FILE)
    return Door(NO_POLICY if policy is None else policy, facts(federation, name, sites), log)


def _with_identity(load: Callable[[str], Any], certificates: Path | None) -> Callable[[str], SiteData]:
    """The site's data with the key that lies beside its certificate, by which other sites know it."""
    identity = None if certificates is None else certificates / IDENTITY

    def data(name: str) -> SiteData:
        own = SiteData.of(load(name))
        if identity is None or own.identity is not None or not identity.exists():
            return own
        return replace(own, identity=identity)

    return data
