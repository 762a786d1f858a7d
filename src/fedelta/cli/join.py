"""`fedelta join`: take part in a run as a site."""

from pathlib import Path
from typing import Any

import click

from fedelta.algorithms.federation import Federation
from fedelta.cli.deployment import deployment_options, loaded, log_to_stderr, trusted
from fedelta.cli.facts import facts
from fedelta.core.errors import BadInput
from fedelta.fleet import policy_file
from fedelta.fleet.departures import Departures
from fedelta.fleet.member import Member
from fedelta.fleet.policy import Door


@click.command(short_help="Take part in a run as a site.")
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--at", required=True, metavar="HOST:PORT", help="Where the coordinator listens.")
@click.option("--name", metavar="NAME", show_default="that of the certificate", help="Of this site.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    show_default="joined/NAME",
    help="What this site keeps between rounds and restarts; of this site alone.",
)
@click.option(
    "--policy",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What this site allows, in TOML: every request and reply is held to it, and what leaves is taken down in the "
    "file departures.jsonl of the folder of --keep.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of PyTorch.")
@deployment_options
def command(experiment: Path, at: str, name: str | None, keep: Path | None, **options: Any) -> None:
    """Answer for a site in the run of EXPERIMENT, until it is over. Calls program() and site(NAME) of the file."""
    log_to_stderr()
    known, credentials = trusted(options["certificates"], options["insecure"], "site")
    if known is not None and name not in (None, known):
        raise BadInput(f"the certificate is of {known!r}, and --name says {name!r}; leave --name out")
    own = known or name
    if own is None:
        raise click.UsageError("--insecure needs --name: without a certificate nothing else says which site this is")
    file, federation = loaded(experiment, options["settings"], test=False)
    folder = keep or Path("joined") / own
    member = Member(
        federation,
        file.data,
        own,
        at=at,
        credentials=credentials,
        folder=folder,
        threads=options["threads"],
        guards=None if options["policy"] is None else _door(options["policy"], federation, own, folder),
    )
    over = member.run()
    click.echo(f"{own}: {over or 'stopped'}.")


def _door(policy: Path, federation: Federation[Any], name: str, folder: Path) -> Door:
    """Raises BadInput where the policy refuses the experiment as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    return Door(policy_file.read(policy), facts(federation, name), Departures.open(folder / "departures.jsonl"))
