"""What a site allows: the demands of its policy, and the door at which every request and every reply is held to them.

All of it happens at the site. The experiment as a whole is looked at once, before the site joins (`demands`): the site
has all of it, and what it says of itself is `Facts`. Each request is looked at before any work is done (`Door.refuse`),
and each reply before it leaves (`Door.leaving`), with what has left before, by the site's own log (departures.py). The
file is read by policy_file.py; there every key has to be given, and where there is no limit it says so.

What is trusted: this site's own copy of the code, its policy and its log. What is not: anything that comes in. What a
policy cannot see: whether the coordinator adds the noise that it promises (`noise = "site"` does not rely on that), and
what becomes of what has left.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time, tzinfo
from typing import Literal

from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.messages import Reply, Request
from fedelta.core.program import HAND_OVER
from fedelta.core.release import Unit
from fedelta.fleet.departures import Departure, Departures, Spent

log = logging.getLogger(__name__)

Work = Literal["train", "evaluate", "statistics"]  # the kinds of requests
Way = Literal["clear", "masks", "encryption"]  # how an update reaches the coordinator
WORK: tuple[Work, ...] = ("train", "evaluate", "statistics")
WAYS: tuple[Way, ...] = ("clear", "masks", "encryption")
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_ANY = "any"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a policy has to know of an experiment, found by the site in its own copy of it."""

    experiment: str  # its digest, which the coordinator's must equal
    work: frozenset[Work]  # the kinds of requests that it knows,
    steps: frozenset[str]  # and the steps of a secure sum, which come as "train/keys"
    rounds: int
    training: str  # in words
    tuning: str
    tensors: tuple[str, ...]  # names of what is trained and leaves, as one vector or what it is hidden in
    shapes: tuple[tuple[int, ...], ...]  # of these
    parameters: int  # numbers in them
    update_bytes: int | None  # of the reply to "train"; None: not known before
    round_bytes: int | None  # the most that leaves in a round from 1 on, of all requests; None: not known before
    collect: Way
    identities: bool  # whether sites know each other by keys
    least: int  # the fewest sites of which a sum is shown
    unit: Unit | None  # what is protected; None: nothing is,
    epsilon: float  # and this is infinite
    delta: float
    noise: Literal["site", "coordinator"] | None  # who adds it
    secret: bool  # whether noise at the site is drawn from what nobody else knows


@dataclass(frozen=True, kw_only=True)
class Window:
    """Local times from `begin` to before `end`, on these days; `end` <= `begin`: of the next day. None is midnight."""

    days: frozenset[int]  # on which it begins; 0 is Monday
    begin: time
    end: time | None

    def holds(self, local: datetime) -> bool:
        """Of a clock on the wall: an hour that it shows twice counts twice, and one that it skips not at all."""
        now, today = local.time(), local.weekday()
        if self.end is None or self.begin < self.end:
            return today in self.days and self.begin <= now and (self.end is None or now < self.end)
        return (today in self.days and self.begin <= now) or ((today - 1) % 7 in self.days and now < self.end)

    def __str__(self) -> str:
        days = ", ".join(DAYS[day] for day in sorted(self.days))
        return f"{days} {self.begin:%H:%M}-{'24:00' if self.end is None else format(self.end, '%H:%M')}"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What `policy_file.parse` has read; None: any, as the file says in so many words."""

    experiments: frozenset[str] | None  # digests
    requests: frozenset[Work]
    rounds: int | None
    tensors: tuple[str, ...] | None  # names; * stands for any characters
    parameters: int | None
    bytes_per_reply: int | None
    bytes_per_round: int | None
    bytes_per_day: int | None  # within 24 hours
    unit: Unit | None
    epsilon: float | None
    delta: float | None
    noise: Literal["site"] | None
    collect: frozenset[Way] | None
    identities: bool
    least: int
    zone: tzinfo
    hours: tuple[Window, ...] | None

    @property
    def private(self) -> bool:
        """Whether any guarantee is demanded."""
        return any(demand is not None for demand in (self.unit, self.epsilon, self.delta, self.noise))


# Of a site that has none: requests of all kinds that the experiment declares, and nothing else.
NO_POLICY = Policy(
    experiments=None,
    requests=frozenset(WORK),
    rounds=None,
    tensors=None,
    parameters=None,
    bytes_per_reply=None,
    bytes_per_round=None,
    bytes_per_day=None,
    unit=None,
    epsilon=None,
    delta=None,
    noise=None,
    collect=None,
    identities=False,
    least=1,
    zone=UTC,
    hours=None,
)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """One of them, held against an experiment."""

    key: str  # in the file
    asks: str
    found: str
    met: bool


def demands(policy: Policy, facts: Facts) -> list[Demand]:
    """Every demand on the experiment as a whole."""
    found = [*_on_work(policy, facts), *_on_size(policy, facts), *_on_privacy(policy, facts), *_on_sums(policy, facts)]
    return [Demand(key=key, asks=asks, found=said, met=met) for key, asks, said, met in found]


def refusal(policy: Policy, facts: Facts) -> list[str]:
    """Why this site does not take part in the experiment; empty if it does."""
    return [f"{one.key} asks for {one.asks}, and there is {one.found}" for one in demands(policy, facts) if not one.met]


_Row = tuple[str, str, str, bool]


def _on_work(policy: Policy, facts: Facts) -> Iterator[_Row]:
    known = policy.experiments
    asks = _ANY if known is None else f"one of the {len(known)} in the list"
    listed = known is None or facts.experiment in known
    found = "this one" if listed else f"another one, {facts.experiment}"
    yield "experiments.digests", asks, found, listed
    asked = ", ".join(one for one in WORK if one in facts.work)
    allowed = ", ".join(one for one in WORK if one in policy.requests)
    yield "work.requests", f"no more than {allowed}", asked or "none", facts.work <= policy.requests
    yield "work.rounds", _most(policy.rounds), f"{facts.rounds:,}", _within(facts.rounds, policy.rounds)


def _on_size(policy: Policy, facts: Facts) -> Iterator[_Row]:
    patterns = policy.tensors
    other = [] if patterns is None else [name for name in facts.tensors if not _matches(name, patterns)]
    asks = _ANY if patterns is None else f"no other tensors than {', '.join(patterns)}"
    found = f"{len(other)} others ({_some(other)})" if other else f"{len(facts.tensors)} ({_some(facts.tensors)})"
    yield "leaves.tensors", asks, found, not other
    count = facts.parameters
    yield "leaves.parameters", _most(policy.parameters), f"{count:,}", _within(count, policy.parameters)
    for key in ("bytes_per_reply", "bytes_per_round", "bytes_per_day"):
        limit: int | None = getattr(policy, key)
        whole = None if key == "bytes_per_reply" else facts.round_bytes
        size = facts.update_bytes if whole is None else whole
        found = "what is not known before; each reply is held to it" if size is None else f"an update of {size:,}"
        found = found if whole is None else f"{whole:,} in a round"
        yield f"leaves.{key}", _most(limit), found, _within(size or 0, limit)


def _on_privacy(policy: Policy, facts: Facts) -> Iterator[_Row]:
    none = "no guarantee"
    unit = none if facts.unit is None else facts.unit
    yield "privacy.unit", policy.unit or _ANY, unit, policy.unit in (None, facts.unit)
    for key, most, own in (("epsilon", policy.epsilon, facts.epsilon), ("delta", policy.delta, facts.delta)):
        found = none if facts.unit is None else "no limit" if math.isinf(own) else f"{own:g}"
        met = most is None or (facts.unit is not None and own <= most)  # not so for NaN
        yield f"privacy.{key}", _ANY if most is None else f"{most:g} at most", found, met
    noise = none if facts.noise is None else f"noise from the {facts.noise}"
    yield "privacy.noise", "noise from the site" if policy.noise else _ANY, noise, policy.noise in (None, facts.noise)
    if policy.private and facts.noise == "site":
        found = "that of the system" if facts.secret else "a seed that all parties know"
        yield "privacy", "randomness of the system for the noise", found, facts.secret


def _on_sums(policy: Policy, facts: Facts) -> Iterator[_Row]:
    ways = policy.collect
    asks = _ANY if ways is None else " or ".join(way for way in WAYS if way in ways)
    yield "secure.collect", asks, facts.collect, ways is None or facts.collect in ways
    asks, found = "identities of the sites" if policy.identities else _ANY, "some" if facts.identities else "none"
    yield "secure.identities", asks, found, facts.identities or not policy.identities
    shown = "each update by itself" if facts.collect == "clear" else f"a sum over {facts.least} or more"
    met = policy.least == 1 or (facts.collect != "clear" and facts.least >= policy.least)
    yield "secure.least", _ANY if policy.least == 1 else f"a sum over {policy.least} sites at least", shown, met


class Door:
    """What stands between the coordinator and a site's data: for one policy, experiment and log."""

    def __init__(
        self, policy: Policy, facts: Facts, departures: Departures, now: Callable[[], datetime] | None = None
    ) -> None:
        """`now` is the clock, with a time zone. Raises BadInput where the policy refuses the experiment as a whole."""
        reasons = refusal(policy, facts)
        if reasons:
            raise BadInput(f"this site's policy refuses the experiment: {'; '.join(reasons)}")
        self._policy, self._facts, self._departures = policy, facts, departures
        self._now = now or (lambda: datetime.now(UTC))

    def refuse(self, request: Request) -> str | None:
        """Why the site does not work on a request; None if it does."""
        if request.op == HAND_OVER:
            return None
        why = self._unknown(request)
        if why is None:
            now = self._now()
            try:
                spent = self._departures.spent(self._facts.experiment, request.round, now)
            except FedeltaError as error:
                log.error("%s", error)
                return "this site cannot tell what has left it; its own log says why"
            why = self._spent(request.op, spent, now)
        return None if why is None else f"refused by this site's policy: {why}"

    def leaving(self, request: Request, reply: Reply) -> None:
        """Take down a reply, durably, before it leaves.

        Raises BadInput where it must not leave; the failure with this message, which may leave in its place, is taken
        down then. Raises FedeltaError where nothing could be taken down: then nothing may leave.
        """
        departure = Departure.of(self._facts.experiment, request, reply)
        now = self._now()
        why = self._departures.record(departure, now, lambda spent: self._kept_back(request, departure, spent, now))
        if why is not None:
            said = f"kept back by this site's policy: {why}"
            failure = Departure.of(self._facts.experiment, request, Reply.failure(request, said))
            self._departures.record(failure, now)
            raise BadInput(said)

    def _unknown(self, request: Request) -> str | None:
        """Why this is no request of the experiment that is allowed."""
        kind, slash, step = request.op.partition("/")
        if kind not in self._policy.requests or kind not in self._facts.work:
            return f"it takes no {kind[:40]!r} requests"
        if slash and step not in self._facts.steps:
            return f"its experiment has no step {request.op[:40]!r}"
        first, last = (1, math.inf) if kind == "train" else (0, 0 if kind == "statistics" else math.inf)
        last = min(last, self._rounds)
        if not first <= request.round <= last:
            return f"{kind} is asked for in round {request.round}, and may be in rounds {first} to {last}"
        return None

    def _spent(self, op: str, spent: Spent, now: datetime) -> str | None:
        """Why nothing more may leave for such a request now."""
        policy = self._policy
        if policy.hours is not None:
            local = now.astimezone(policy.zone)
            if not any(window.holds(local) for window in policy.hours):
                hours = "; ".join(map(str, policy.hours))
                return f"it is {DAYS[local.weekday()]} {local:%H:%M} in {policy.zone}, and its hours are {hours}"
        for name, size, most in (
            ("this round", spent.round_bytes, policy.bytes_per_round),
            ("24 hours", spent.day_bytes, policy.bytes_per_day),
        ):
            if most is not None and size >= most:
                return f"{size:,} bytes have left in {name}, and at most {most:,} may"
        if "/" in op:  # a sum may have to be begun anew; bytes bound its steps
            return None
        times = self._rounds + (op == "evaluate")  # a model is evaluated after round zero, too
        if spent.answers.get(op, 0) >= times:
            return f"{op} has been answered {times:,} times, as often as it may be"
        return None

    @property
    def _rounds(self) -> float:
        """In which, and how often, the site trains: the noise that it adds covers as many as the experiment has."""
        covered = self._facts.rounds if self._facts.noise == "site" else math.inf
        return min(covered, math.inf if self._policy.rounds is None else self._policy.rounds)

    def _kept_back(self, request: Request, departure: Departure, spent: Spent, now: datetime) -> str | None:
        """Why a reply must not leave; a failure is a sentence without data, and always may."""
        if departure.error is not None:
            return None
        policy, size = self._policy, departure.bytes
        if request.op == HAND_OVER:
            return f"it has {size:,} bytes, and who is handed a model answers with none" if size else None
        for name, sum, most in (
            ("a reply", size, policy.bytes_per_reply),
            ("this round", spent.round_bytes + size, policy.bytes_per_round),
            ("24 hours", spent.day_bytes + size, policy.bytes_per_day),
        ):
            if most is not None and sum > most:
                return f"it has {size:,} bytes, which makes {sum:,} in {name}, and at most {most:,} may leave"
        return self._unknown(request) or self._spent(request.op, spent, now)


def told(facts: Facts) -> list[tuple[str, str]]:
    """What would be computed at this site and what would leave it: each in a word, and in words."""
    size = "of a size that is not known before" if facts.update_bytes is None else f"of {facts.update_bytes:,} bytes"
    how = {
        "clear": "in the clear",
        "masks": f"under masks: the coordinator sees sums over {facts.least} sites or more",
        "encryption": f"encrypted: sums over {facts.least} sites or more are opened",
    }[facts.collect]
    guarantee = "no guarantee of privacy"
    if facts.unit is not None:
        most = "no limit on epsilon" if math.isinf(facts.epsilon) else f"epsilon {facts.epsilon:g}"
        guarantee = f"each {facts.unit} with {most} at delta {facts.delta:g}, by noise from the {facts.noise}"
    return [
        ("experiment", facts.experiment),
        ("computed", f"{', '.join(one for one in WORK if one in facts.work)}; {_rounds(facts)}; {facts.training}"),
        (
            "trained",
            f"{facts.parameters:,} numbers in {len(facts.tensors)} tensors ({_some(facts.tensors)}); {facts.tuning}",
        ),
        ("leaves", f"in a round an update {size}, {how}"),
        ("in all", _whole(facts)),
        ("protected", guarantee),
    ]


def _rounds(facts: Facts) -> str:
    return "1 round" if facts.rounds == 1 else f"{facts.rounds:,} rounds"


def _whole(facts: Facts) -> str:
    """What leaves in a run."""
    if facts.round_bytes is None:
        return "as many bytes as each reply has, which is not known before"
    once = ", and once sums of features" if "statistics" in facts.work else ""
    most = facts.rounds * facts.round_bytes
    return f"at most {facts.round_bytes:,} bytes in a round, {most:,} in {_rounds(facts)}{once}"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of them is the name, where * stands for any characters, and nothing else for anything."""
    return any(re.fullmatch(".*".join(map(re.escape, one.split("*"))), name, re.DOTALL) for one in patterns)


def _within(value: int, most: int | None) -> bool:
    return most is None or value <= most


def _most(limit: int | None) -> str:
    return _ANY if limit is None else f"{limit:,} at most"


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
