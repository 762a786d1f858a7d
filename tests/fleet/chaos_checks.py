"""What holds after a run to which everything has happened (chaos.py)."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from tests.fleet import chaos_rogues as rogues
from tests.fleet.chaos_experiment import HONEST

from fedelta.cli.deployment import loaded
from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests
from fedelta.core.program import Report
from fedelta.fleet.answer import parts
from fedelta.fleet.departures import Departures
from fedelta.fleet.local import Local
from fedelta.observe.folder import read_run

if TYPE_CHECKING:
    from tests.fleet.chaos import Watched

GROWTH_KB = 8 * 1024  # of a coordinator's memory, from its tenth round on; and for each round
REPORT_KB = 16  # since the reports of all rounds are in memory
ANNOUNCED_KB = 256 * 1024  # its peak above that: 10 GB were announced, and not taken

_LATE = re.compile("^it (did not answer within|has not been connected for) ")


def check(seen: "Watched") -> str:
    """What happened, in a few lines. Raises AssertionError for what must not have."""
    _, reports = read_run(seen.folder / "run")
    _check_exits(seen)
    _check_rounds(seen, reports)
    _check_bits(seen, reports)
    _check_memory(seen)
    for name, given in seen.given.items():
        assert given == sorted(given), f"{name} went back: {given}"
    notes = [json.loads(line) for line in (seen.folder / "rogues.jsonl").read_text().splitlines()]
    _check_rogues(seen, reports, notes)
    _check_refusals(seen, notes)
    _check_departures(seen, reports)
    answered = Counter(len(report.cohort) - len(report.absent) for report in reports)
    return (
        f"{len(reports)} rounds in {seen.seconds:.0f} s, {len(seen.memory)} coordinators, {seen.kills} kills, "
        f"{sum(note['said'] is not None for note in notes)} refusals; sites in a round: "
        + ", ".join(f"{sites} ({rounds} times)" for sites, rounds in sorted(answered.items()))
        + "; memory of the last coordinator in MB: "
        + ", ".join(f"{rss / 1024:.0f}" for _, rss, _ in seen.memory[-1][:: max(1, len(seen.memory[-1]) // 8)])
    )


def _check_exits(seen: "Watched") -> None:
    """Nobody ended but whom we have killed, whose certificate ended, and all when all was done."""
    from tests.fleet.chaos import EXPIRING, REVOKED

    shut_out = {REVOKED: "is revoked since", EXPIRING: "expired"}
    for name, code in seen.exits:
        expected = 2 if name in shut_out else 0
        assert code == expected, f"{name} ended with status {code}\n{seen.said(name)[-3000:]}"
    for name, why in shut_out.items():
        assert why in seen.said(name), f"{name} was not told {why!r}"
        if name == REVOKED:  # an expired one comes no further than TLS, of which gRPC tells us nothing
            assert re.search(f"{name}.*{why}", seen.said("serve")), f"that of {name} {why!r} is not in the log"
    assert {name for name, _ in seen.exits} >= {"serve", *HONEST}, f"{seen.left} did not hear of the end"
    assert "Traceback" not in seen.said("serve"), seen.said("serve")


def _check_rounds(seen: "Watched", reports: Sequence[Report]) -> None:
    assert [report.round for report in reports] == list(range(1, seen.rounds + 1))
    lines = (seen.folder / "run" / "rounds.jsonl").read_bytes().splitlines()
    for round, line in seen.committed.items():
        assert lines[round - 1] == line, f"round {round} was committed, and is another one now"


class _Same:
    """A fleet in this process, in which those sites answer that have answered in a round of the run."""

    def __init__(self, fleet: Local) -> None:
        self._fleet = fleet
        self.absent: Mapping[PartyId, str] = {}
        self._failed: list[Reply] = []

    def parties(self) -> Sequence[PartyId]:
        return self._fleet.parties()

    def submit(self, request: Request) -> None:
        if request.to in self.absent:
            self._failed.append(Reply.failure(request, "as it was"))
        else:
            self._fleet.submit(request)

    def submit_many(self, requests: Requests, together: int) -> None:
        for part in parts(requests, together, self.parties()):
            for request in part:
                self.submit(request)

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        return self._failed.pop() if self._failed else self._fleet.next_reply(timeout_s)

    def cancel(self, request_id: str) -> None:
        self._fleet.cancel(request_id)


def _check_bits(seen: "Watched", reports: Sequence[Report]) -> None:
    """Model and metrics are those of a run in which nothing else happened than that these sites were absent."""
    file, federation = loaded(seen.folder / "experiment.py", (), test=True, rounds=seen.rounds)
    fleet = _Same(Local(federation, file.data, file.names()))
    state = federation.init()
    for report in reports:
        fleet.absent = report.absent
        state, again = federation.step(state, fleet)
        assert again.absent.keys() == report.absent.keys()
        assert again.metrics == report.metrics, f"round {report.round} has other bits"
    there = load_file(seen.folder / "run" / "model.safetensors")
    here = federation.model(state).state_dict()
    assert there.keys() == here.keys()
    assert all(here[name].equal(there[name]) for name in here)


def _check_memory(seen: "Watched") -> None:
    assert len(seen.memory) > 3
    for found in seen.memory:
        settled = found[10:]
        if settled:
            grown = settled[-1][1] - settled[0][1]
            assert grown < GROWTH_KB + REPORT_KB * len(settled), f"a coordinator grew by {grown} kB: {found}"
            assert found[-1][2] - settled[0][1] < ANNOUNCED_KB, f"a coordinator had a peak of {found[-1][2]} kB"


def _check_rogues(seen: "Watched", reports: Sequence[Report], notes: Sequence[dict[str, Any]]) -> None:
    """A trick is refused with its reason, or counts once; each of them, wherever nothing else happened."""
    played: Counter[str] = Counter()
    for note in notes:
        name, round, trick = note["who"], note["round"], note["trick"]
        if trick not in rogues.ALL or note["said"] is not None or round in seen.torn:
            continue
        why = rogues.ALL[trick][1]
        absent = reports[round - 1].absent.get(name, "")
        if _LATE.search(absent):  # the machine was busy, or this was the trick
            played[trick] += trick == rogues.SLOW
            continue
        assert bool(absent) == bool(why), f"round {round}, {name}, {trick}: {absent}"
        assert re.search(why, absent), f"round {round}, {name}, {trick}: {absent}"
        assert absent.isprintable()
        played[trick] += 1
    missing = rogues.ALL.keys() - played.keys()
    assert not missing or seen.rounds < 200, f"never played: {missing}"
    assert not [note for note in notes if note["trick"] == "bug"]
    (last,) = [note for note in notes if note["trick"] == rogues.AGAIN and note["final"]]
    assert re.search("in quarantine|shut out", last["said"]), last
    said = {note["trick"]: note["said"] for note in notes}
    for what, (_, _, why) in (rogues.KNOCKS | rogues.LATE).items():
        assert what in said, f"{what}: nobody knocked"
        told = said[what]
        assert why in (told or ""), f"{what}: {told}"
        assert bool(told) == bool(why), f"{what}: {told}"


def _check_refusals(seen: "Watched", notes: Sequence[dict[str, Any]]) -> None:
    """All that anybody was told is in the coordinator's log, with the name of whom it was told."""
    lines = seen.said("serve").splitlines()
    told = {(note["who"], note["said"]) for note in notes if note["said"] is not None}
    for name in HONEST:
        said = [line.partition("the coordinator ended the stream: ")[2] for line in seen.said(name).splitlines()]
        told |= {(name, reason) for reason in said if reason}
    missing = [(who, said) for who, said in told if not any(said in line and who in line for line in lines)]
    assert not missing, f"not in the coordinator's log: {missing}"


def _check_departures(seen: "Watched", reports: Sequence[Report]) -> None:
    """What counted is in the own log of the site that it came from."""
    for name in HONEST:
        counted = {report.round for report in reports if name not in report.absent}
        log = seen.folder / "joined" / name / "departures.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        left = {json.loads(line)["departure"]["round"] for line in lines}
        assert counted <= left, f"{name}: {sorted(counted - left)} left without a line in its log"
        if log.exists():
            Departures.open(log)
