"""A coordinator while it runs: its fleet, its registry, what it tells the operator, and when it waits."""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from fedelta.algorithms.federation import Federation
from fedelta.algorithms.state import FederationState
from fedelta.cli.simulate import Rounds
from fedelta.core.errors import RoundLost, TooFewSites
from fedelta.core.program import Fleet, Report, run
from fedelta.fleet.attendance import Attendance
from fedelta.fleet.known_sites import Turns
from fedelta.fleet.limits import Limits
from fedelta.fleet.registry import DATABASE, Registry
from fedelta.fleet.remote import Remote
from fedelta.fleet.wire import Credentials
from fedelta.observe.folder import STATE, RunFolder, read_run
from fedelta.observe.logs import ROUND
from fedelta.observe.plain import to_plain
from fedelta.observe.telemetry import Telemetry
from fedelta.observe.text import plural

log = logging.getLogger(__name__)
_TRIES = 3  # of a round for which too few sites answered, though enough were there
_LOOK_S = 1.0  # between two looks at who is there


@dataclass(kw_only=True)
class Coordinator:
    """Listens while a run goes on, waits where too few sites are there, and takes down who took part."""

    listen: str
    names: Sequence[str]
    least: int | None  # None: all that are not in quarantine
    credentials: Credentials | None
    allowed: Callable[[str, bytes], str | None]
    limits: Limits
    quarantine_after: int  # failures of a site's own making, in a row; 0: never
    telemetry: bool
    hand_over: bool  # whether sites get the model when the run is over
    console: Console
    _remote: Remote = field(init=False)
    _attendance: Attendance = field(init=False)
    _traced: Telemetry | None = field(default=None, init=False)
    _folder: RunFolder = field(init=False)

    @contextmanager
    def fleet(self, federation: Federation[Any], folder: RunFolder) -> Iterator[Fleet]:
        """For `Elsewhere.fleet`, when the folder is ready for the next round."""
        self._folder = folder
        with ExitStack() as stack:
            name = str(folder.manifest["run"])
            if self.telemetry:
                self._traced = Telemetry.from_environment(job=name, told=federation.privacy is None)
                stack.callback(self._traced.close)
            self._attendance = stack.enter_context(Attendance(self._registry(folder)))
            self._remote = stack.enter_context(
                Remote(
                    federation,
                    self.names,
                    listen=self.listen,
                    credentials=self.credentials,
                    allowed=self.allowed,
                    run=name,
                    # the registry counts faults, and not the fleet, which an operator cannot reach
                    limits=replace(self.limits, faults=sys.maxsize),
                    spill=folder.path,
                    receipts=folder.path,
                    register=self._attendance,
                )
            )
            host = self.listen.rpartition(":")[0]
            self._say(f"Listening at {host}:{self._remote.port} for {', '.join(self.names)}.")
            yield self._remote
            self._remote.close(over="the run is over")

    def rounds(self, federation: Federation[Any], fleet: Fleet, state: FederationState[Any]) -> Rounds:
        """As `run`; a round for which too few sites answered is begun again when enough are there.

        Whoever takes a round from here has committed it when asking for the next one.
        """
        traced = fleet if self._traced is None else self._traced.watch(fleet)
        tries = 0
        while federation.finished(state) is None:
            self._gather()
            try:
                for after, report in run(federation, traced, state):
                    state, tries = after, 0
                    if self._traced is not None:
                        self._traced.show(report)
                    yield state, report
                    self._committed(report)
            except RoundLost:
                raise
            except TooFewSites as error:
                if self._traced is not None:
                    self._traced.failed(str(error) if federation.privacy is None else "too few sites answered")
                tries += 1
                if tries == _TRIES:
                    raise
                self._say(f"Round {state.round + 1} is begun again: {error}.")
        if self.hand_over and state.started:
            self._hand_over(federation, fleet, state)

    def _hand_over(self, federation: Federation[Any], fleet: Fleet, state: FederationState[Any]) -> None:
        """Give the sites their models; one that is away is waited for, as in a round."""
        away = sorted(set(self.names) - {*self._remote.connected(), *self._out()})
        waits = f" Not here: {', '.join(away)}; who is away for {self.limits.absence_s:g} s gets none." if away else ""
        self._say(f"The model goes out to the sites.{waits}")
        without = federation.hand_over(state, fleet)
        for site, why in without.items():
            log.warning("%s has no model: %s", site, why, extra={"event": "no model", "site": site})
        there = [name for name in self.names if name not in without]
        lacking = f"; not at {', '.join(without)}: --resume hands it over again" if without else ""
        self._say(f"The model is at {', '.join(there) or 'no site'}{lacking}.")

    def _registry(self, folder: RunFolder) -> Registry:
        """That of the folder, in agreement with the rounds that are committed there."""
        registry, lost = Registry.beside(folder.path, quarantine_after=self.quarantine_after)
        _, reports = read_run(folder.path)
        if registry.fresh and reports and lost is None:
            lost = f"there is no {DATABASE} in {folder.path}, so that another one is begun"
        registry.begin(self.names)
        rounds = [_turns(report) for report in reports]
        if rounds:
            rounds[-1] = replace(rounds[-1], state=self._digest())
        over, added = registry.follow(rounds)
        if lost is not None:
            gone = "events, certificates, and whom the operator has put in quarantine"
            what = f"{lost}; rounds are taken from the folder, and lost are {gone}"
            log.warning("%s", what, extra={"event": "registry lost"})
        elif over or added:
            log.info("%s follows the folder: %s added, %d cut off", DATABASE, plural(added, "round"), over)
        return registry

    def _committed(self, report: Report) -> None:
        turns = replace(_turns(report), state=self._digest())
        self._attendance.committed(turns)
        told = {
            "event": ROUND,
            "job": str(self._folder.manifest["run"]),
            "round": report.round,
            "answered": list(turns.counted),
            "absent": dict(report.absent),
            "metrics": to_plain(report)["metrics"],
        }
        what = f"round {report.round} is over: {len(turns.counted)} of {len(report.cohort)} sites counted"
        log.info("%s", what, extra=told)

    def _digest(self) -> str:
        """SHA-256 of the state that was committed last."""
        with (self._folder.path / STATE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _gather(self) -> None:
        told: tuple[tuple[str, ...], str] | None = None
        while not self._remote.wait_for(self._needed(), _LOOK_S):
            here, out = tuple(self._remote.connected()), ", ".join(self._out())
            if (here, out) != told:
                told = here, out
                who = f" ({', '.join(here)})" if here else ""
                away = [name for name in self.names if name not in {*here, *self._out()}]
                missing = f"; not here: {', '.join(away[:10])}{', …' if len(away) > 10 else ''}" if away else ""
                missing += f"; in quarantine: {out}" if out else ""
                self._say(f"Waiting for sites: {len(here)} of at least {self._needed()} are here{who}{missing}.")

    def _needed(self) -> int:
        return max(1, len(self.names) - len(self._out())) if self.least is None else self.least

    def _out(self) -> list[str]:
        """The sites that are in quarantine."""
        return [name for name in self.names if self._attendance.barred(name) is not None]

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def _turns(report: Report) -> Turns:
    return Turns(
        number=report.round,
        counted=[site for site in report.cohort if site not in report.absent],
        absent=report.absent,
        refused=report.refused,
    )
