"""`fedelta serve`: coordinate a run whose sites are elsewhere."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fedelta.algorithms.federation import Federation, FederationState
from fedelta.cli.deployment import deployment_options, loaded, log_to_stderr, trusted
from fedelta.cli.experiment import Sites
from fedelta.cli.options import RunSettings
from fedelta.cli.simulate import Elsewhere, Rounds, Simulation
from fedelta.core.errors import BadInput, RoundLost, TooFewSites
from fedelta.core.program import Fleet, run
from fedelta.fleet.remote import Limits, Remote
from fedelta.fleet.revocations import Revocations
from fedelta.fleet.wire import Credentials
from fedelta.observe.folder import RunFolder

_TRIES = 3  # of a round for which too few sites answered, though enough were there
_LOOK_S = 1.0  # between two looks at who is there


@dataclass(kw_only=True)
class _Coordinator:
    """Listens while a run goes on, and waits where too few sites are there."""

    listen: str
    names: list[str]
    least: int
    credentials: Credentials | None
    allowed: Callable[[str, bytes], str | None]
    limits: Limits
    console: Console
    _remote: Remote | None = field(default=None, init=False)

    @contextmanager
    def fleet(self, federation: Federation[Any], folder: RunFolder) -> Iterator[Fleet]:
        remote = Remote(
            federation,
            self.names,
            listen=self.listen,
            credentials=self.credentials,
            allowed=self.allowed,
            run=str(folder.manifest["run"]),
            limits=self.limits,
            spill=folder.path,
        )
        self._remote = remote
        host = self.listen.rpartition(":")[0]
        self._say(f"Listening at {host}:{remote.port} for {', '.join(self.names)}.")
        with remote:
            yield remote
            remote.close(over="the run is over")

    def rounds(self, federation: Federation[Any], fleet: Fleet, state: FederationState[Any]) -> Rounds:
        """As `run`; a round for which too few sites answered is begun again when enough are there."""
        tries = 0
        while federation.finished(state) is None:
            self._gather()
            try:
                for after, report in run(federation, fleet, state):
                    state, tries = after, 0
                    yield state, report
            except RoundLost:
                raise
            except TooFewSites as error:
                tries += 1
                if tries == _TRIES:
                    raise
                self._say(f"Round {state.round + 1} is begun again: {error}.")

    def _gather(self) -> None:
        assert self._remote is not None
        told: tuple[str, ...] | None = None
        while not self._remote.wait_for(self.least, _LOOK_S):
            here = tuple(self._remote.connected())
            if here != told:
                told = here
                who = f" ({', '.join(here)})" if here else ""
                self._say(f"Waiting for sites: {len(here)} of at least {self.least} are here{who}.")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


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
@click.option("--rounds", type=click.IntRange(1), help="Instead of the experiment's own number.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    show_default="runs/EXPERIMENT-served",
    help="Folder of this run.",
)
@click.option("--resume", is_flag=True, help="Continue the run in the folder from its last round.")
@deployment_options
def command(experiment: Path, out: Path | None, resume: bool, rounds: int | None, **options: Any) -> None:
    """Coordinate EXPERIMENT. Its program() and test() are called here; its site(name) at each site, by `fedelta join`.

    Every round is kept before the next one begins: stopped at any moment, the run goes on with --resume.
    """
    log_to_stderr()
    _, credentials = trusted(options["certificates"], options["insecure"], "coordinator")
    loaded_experiment, federation = loaded(experiment, options["settings"], test=True, rounds=rounds)
    if federation.algorithm.personal:
        raise BadInput("a part of this model stays at each site, where `serve` cannot save it; use `fedelta run`")
    names = loaded_experiment.names() if options["sites"] is None else _named(options["sites"])
    least = len(names) if options["min_sites"] is None else options["min_sites"]
    if least > len(names):
        raise BadInput(f"--min-sites {least} is more than the {len(names)} sites that may join")
    coordinator = _Coordinator(
        listen=options["listen"],
        names=names,
        least=least,
        credentials=credentials,
        allowed=_allowed(options["revoked"]),
        limits=Limits(deadline_s=options["deadline"], absence_s=options["absence"]),
        console=Console(highlight=False),
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
    ).run()


def _named(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise click.BadParameter(f"{text!r} is not a list of distinct names with commas between", param_hint="--sites")
    return names


def _allowed(revoked: Path | None) -> Callable[[str, bytes], str | None]:
    if revoked is None:
        return lambda _name, _certificate: None
    return Revocations(revoked).refused


def _never(name: str) -> object:
    raise RuntimeError(f"the coordinator asked for the data of {name}")
