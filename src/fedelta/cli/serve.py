"""`fedelta serve`: coordinate a run whose sites are elsewhere."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fedelta.cli.coordinator import Coordinator
from fedelta.cli.deployment import deployment_options, end_in_order, loaded, log_to_stderr, trusted, watch_expiry
from fedelta.cli.experiment import Sites
from fedelta.cli.facts import largest_message
from fedelta.cli.options import RunSettings
from fedelta.cli.simulate import Elsewhere, Simulation
from fedelta.core.errors import BadInput
from fedelta.fleet.address import check_address
from fedelta.fleet.limits import Limits
from fedelta.fleet.revocations import Revocations


@click.command(short_help="Coordinate a run whose sites are elsewhere.")
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--listen", metavar="HOST:PORT", default="127.0.0.1:7443", show_default=True, help="Where sites join.")
@click.option("--sites", metavar="A,B,C", show_default="those of sites()", help="Names of the sites that may join.")
@click.option(
    "--min-sites", type=click.IntRange(1), metavar="N", show_default="all", help="Sites that must be here to begin."
)
@click.option(
    "--revoked",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The authority's list of revoked certificates (revoked.crl, beside ca.pem), read anew when it changes.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, min_open=True),
    default=Limits.deadline_s,
    show_default=True,
    metavar="SECONDS",
    help="In which a site has to answer.",
)
@click.option(
    "--absence",
    type=click.FloatRange(0, min_open=True),
    default=Limits.absence_s,
    show_default=True,
    metavar="SECONDS",
    help="That a site may be away before a round goes on without it.",
)
@click.option(
    "--quarantine-after",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    metavar="N",
    help="Failures of a site's own making in a row (a broken protocol, an update that cannot be used) after which it "
    "is shut out until `fedelta sites` readmits it; 0: never.",
)
@click.option(
    "--telemetry",
    is_flag=True,
    help="Send traces and metrics by OpenTelemetry, whither the variables OTEL_… say.",
)
@click.option(
    "--enough",
    type=click.IntRange(1),
    metavar="N",
    help="Sites that answer, with which a round is complete: the others are withdrawn, so that nobody waits for them.",
)
@click.option("--rounds", type=click.IntRange(1), help="Instead of the experiment's own number.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    show_default="runs/EXPERIMENT-served",
    help="Folder of this run.",
)
@click.option("--resume", is_flag=True, help="Continue the run in the folder from its last round.")
@click.option(
    "--no-hand-over",
    is_flag=True,
    help="Do not hand the model to the sites when the run is over; --resume of a run that is over does.",
)
@deployment_options
def command(experiment: Path, out: Path | None, resume: bool, rounds: int | None, **options: Any) -> None:
    """Coordinate EXPERIMENT. Its program() and test() are called here; its site(name) at each site, by `fedelta join`.

    Every round is kept before the next one begins: stopped at any moment, the run goes on with --resume.
    """
    end_in_order()
    log_to_stderr(options["log"])
    _, credentials = trusted(options["certificates"], options["insecure"], "coordinator")
    check_address(options["listen"], credentials)  # before there is a folder
    revoked = None if options["revoked"] is None else Revocations(options["revoked"])
    watch_expiry(options["certificates"], credentials, revoked)
    loaded_experiment, federation = loaded(experiment, options["settings"], test=True, rounds=rounds)
    if options["enough"] is not None:
        federation = replace(federation, enough=options["enough"])
    names = loaded_experiment.names() if options["sites"] is None else _named(options["sites"])
    for option, number in (("--min-sites", options["min_sites"]), ("--enough", options["enough"])):
        if (number or 0) > len(names):
            raise BadInput(f"{option} {number} is more than the {len(names)} sites that may join")
    console = Console(highlight=False)
    coordinator = Coordinator(
        listen=options["listen"],
        names=names,
        least=options["min_sites"],
        credentials=credentials,
        allowed=_allow_all if revoked is None else revoked.refused,
        limits=Limits(
            deadline_s=options["deadline"],
            absence_s=options["absence"],
            message=largest_message(federation, names[0], options["largest_message"]),
        ),
        quarantine_after=options["quarantine_after"],
        telemetry=options["telemetry"],
        hand_over=not options["no_hand_over"],
        console=console,
    )
    Simulation(
        title=experiment.stem,
        federation=federation,
        sites=Sites(load=_never, names=names),
        settings=RunSettings(
            out=out or Path("runs") / f"{experiment.stem}-served",
            resume=resume,
            workers=0,
            plan="plain",
            commit_every_s=0.0,
            again=f"fedelta {shlex.join(argument for argument in sys.argv[1:] if argument != '--resume')} --resume",
        ),
        elsewhere=Elsewhere(fleet=coordinator.fleet, rounds=coordinator.rounds),
        console=console,
    ).run()


def _named(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise click.BadParameter(f"{text!r} is not a list of distinct names with commas between", param_hint="--sites")
    return names


def _allow_all(_name: str, _certificate: bytes) -> str | None:
    return None


def _never(name: str) -> object:
    raise RuntimeError(f"the coordinator asked for the data of {name}")
