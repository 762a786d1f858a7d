"""What a run will cost and show, told before anything is sent.

Bytes are counted as a run counts them (`Report.bytes_down`, `bytes_up`): every request of every round is known, since
cohorts are a function of the seed, and a reply's size is that of one that was really made (see `rehearsal.py`). They
are those of the run to the last byte, with four exceptions: a site that fails sends less (one without usable data is
known to fail), a run that a condition stops ends earlier, after an evaluation, a reply whose size depends on its
values is none that was weighed, and in secure sums of many sites who shares with whom is drawn in the run (see
`forecast_sums.py`). Times are measured on this machine and scaled: estimates.

Not to be confused with the execution plan (`learning/plan.py`), which says how arithmetic is done.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fedelta.algorithms.federation import Federation
from fedelta.algorithms.forecast_sums import EXCHANGES, Bearing, Summed, summed
from fedelta.algorithms.private import Prospect
from fedelta.algorithms.rehearsal import Rehearsal
from fedelta.core.errors import BadInput
from fedelta.core.messages import PartyId
from fedelta.core.program import Sight
from fedelta.secure.aggregation import SecureAggregation
from fedelta.secure.graph import COMPLETE
from fedelta.secure.homomorphic import HomomorphicEncryption

Asked = list[tuple[str, Sequence[PartyId]]]  # kinds of requests in their order, each with the sites that get it


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between each site and the coordinator; the coordinator itself is taken to be as fast as all sites together."""

    down_mbit: float = 20.0  # 10**6 bits a second, towards the site
    up_mbit: float = 20.0
    latency_ms: float = 0.0  # one way

    def __post_init__(self) -> None:
        for name in ("down_mbit", "up_mbit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise BadInput(f"Link.{name} must be a finite number > 0, got {getattr(self, name)}")
        if not 0 <= self.latency_ms < float("inf"):
            raise BadInput(f"Link.latency_ms must be a finite number >= 0, got {self.latency_ms}")

    def seconds(self, down: int, up: int, exchanges: int = 1) -> float:
        """For so many requests, one after the other, of `down` bytes together, and their replies of `up` bytes."""
        return 2 * exchanges * self.latency_ms / 1e3 + 8e-6 * (down / self.down_mbit + up / self.up_mbit)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that travel and belong to modules of the same name but for numbers, which are written as "*"."""

    name: str
    tensors: int
    elements: int  # 4 bytes each, before the encoding
    buffers: bool  # statistics, which are averaged but not trained


@dataclass(frozen=True, kw_only=True)
class SiteForecast:
    """One site. Kinds of requests go by their `op`."""

    name: PartyId
    rows: int
    held_back: int
    steps: int  # of training in a round
    data_bytes: int
    silent: bool  # it answers nothing, as its data cannot be loaded
    failures: Mapping[str, str]  # op -> why this site is known to fail in it
    bytes_down: Mapping[str, int]  # of one request
    bytes_up: Mapping[str, int]  # of its reply
    seconds: Mapping[str, float]  # of its work here


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A site that stands for others of its size, with what came of its rehearsal."""

    called: str  # "smallest", "median" or "largest"
    site: SiteForecast
    rehearsal: Rehearsal
    prospect: Prospect | None = None  # of its privacy; None: there is no guarantee

    @property
    def memory_bytes(self) -> int | None:
        """The most that the site's process needs besides Python and its libraries; None where it is not known."""
        found = self.rehearsal.memory_bytes
        return None if found is None else found + self.site.data_bytes


@dataclass(frozen=True, kw_only=True)
class Check:
    """Whether the parts of a federation hold together."""

    what: str
    found: str
    holds: bool


@dataclass(frozen=True, kw_only=True)
class RoundForecast:
    round: int  # 0: the head in closed form, before the first round of training
    asked: Mapping[str, int]  # op -> number of sites that are asked
    bytes_down: int  # over all sites
    bytes_up: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All sizes are bytes, all times seconds."""

    federation: Federation[Any] = field(repr=False)
    groups: tuple[Group, ...]
    frozen: int  # parameters that never travel: every party has them
    frozen_bytes: int
    sites: tuple[SiteForecast, ...] = field(repr=False)
    tiers: tuple[Tier, ...]
    update_sizes: frozenset[int]  # numbers in a site's update: several where sites work at ranks of their own

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(group.elements for group in self.groups if not group.buffers)

    @cached_property
    def rounds(self) -> tuple[RoundForecast, ...]:
        """Every round of the run, if no condition stops it."""
        return tuple(self._round(number, asked) for number, asked in self._schedule())

    @property
    def bearing(self) -> Bearing | None:
        """What the secure sum of the smallest cohort can bear; None where updates are not summed up securely."""
        collect = self.federation.collect
        cohorts = [each.asked["train"] for each in self.rounds if "train" in each.asked]
        return Bearing.of(collect, min(cohorts)) if isinstance(collect, SecureAggregation) and cohorts else None

    @property
    def bytes_down(self) -> int:
        return sum(each.bytes_down for each in self.rounds)

    @property
    def bytes_up(self) -> int:
        return sum(each.bytes_up for each in self.rounds)

    def seconds(self, link: Link) -> list[float]:
        """Of each round, sites working at the same time: every kind of request takes as long as its slowest site.

        The coordinator's evaluation is in it, what it needs to add updates up is not.
        """
        return [
            self._test_s(number) + sum(self._at_once(op, to, link) for op, to in asked)
            for number, asked in self._schedule()
        ]

    def seconds_here(self) -> list[float]:
        """Of each round, sites working one after the other in one process of this machine, with no network."""
        by_name = self._by_name
        return [
            self._test_s(number) + sum(by_name[name].seconds.get(op, 0.0) for op, to in asked for name in to)
            for number, asked in self._schedule()
        ]

    @cached_property
    def checks(self) -> tuple[Check, ...]:
        """What must hold for the parts to fit. The federation was refused if one of the first two did not."""
        program, sight = self.federation, self.federation.collect.shows
        rule, collect, encoding = (
            type(part).__name__ for part in (program.aggregation, program.collect, program.encoding)
        )
        needs = "each update" if program.aggregation.needs is Sight.EACH else "no more than the sum of the updates"
        found = [
            Check(
                what="the rule sees what it needs",
                found=f"{rule} needs {needs}; {collect} shows {sight.value}",
                holds=program.aggregation.needs is Sight.SUM or sight is Sight.EACH,
            ),
            Check(
                what="what is added up can be added",
                found=f"{encoding} is {'' if program.encoding.linear else 'not '}linear; {collect} shows {sight.value}",
                holds=program.encoding.linear or sight is Sight.EACH,
            ),
            self._enough(),
            *self._hidden(),
        ]
        if program.stop is not None:
            found.append(Check(what="the run can stop earlier", found=f"{program.stop} is measured", holds=True))
        if any(tier.rehearsal.replies != self.tiers[0].rehearsal.replies for tier in self.tiers):
            text = "the rehearsed sites' replies differ in size: bytes are those of the site nearest in rows"
            found.append(Check(what="bytes are exact", found=text, holds=False))
        if self.bearing is not None and self.bearing.sites > COMPLETE:
            text = "who shares with whom is drawn in the run: bytes are exact but for a few of each site"
            found.append(Check(what="bytes are exact", found=text, holds=False))
        if len(self.update_sizes) > 1:
            text = "sites send updates of several sizes: bytes sent are those of the site nearest in rows"
            found.append(Check(what="bytes are exact", found=text, holds=False))
        if not program.algorithm.steady:
            name = type(program.algorithm).__name__
            text = f"{name} sends other messages in later rounds: bytes are those of the first, for all rounds"
            found.append(Check(what="bytes are exact", found=text, holds=False))
        return tuple(found)

    def _enough(self) -> Check:
        """Whether enough sites can answer in every round."""
        least = max(self.federation.min_sites, 1 if self.bearing is not None else self.federation.collect.least)
        for number, asked in self._schedule():
            for op, to in asked:
                lost = self.summed(op, to).lost
                if op != "evaluate" and lost is not None:
                    return Check(what="enough sites answer", found=f"round {number}: {lost}", holds=False)
                able = sum(op not in self._by_name[name].failures for name in to)
                if op != "evaluate" and able < least:
                    text = f"round {number}: {able} of {len(to)} sites can answer and {least} must: the run ends there"
                    return Check(what="enough sites answer", found=text, holds=False)
        failing = [site for site in self.sites if site.failures]
        must = f"the {least} that must" if self.bearing is None else "the quorum of a sum"
        text = f"every cohort has {must}" + (f"; {len(failing)} fail" if failing else "")
        return Check(what="enough sites answer", found=text, holds=True)

    def _hidden(self) -> list[Check]:
        """What hides a single update, in the smallest cohort."""
        found, collect = self.bearing, self.federation.collect
        if isinstance(collect, HomomorphicEncryption):
            text = f"the key party opens one of a round, over {collect.least} to {collect.most} sites"
            return [Check(what="a sum hides single updates", found=text, holds=True)]
        if found is None:
            return []
        text = (
            f"of {found.sites} sites {found.quorum} must answer, {found.colluding} may collude, {found.dropouts} may "
            f"be lost; each has {found.shape.neighbours} that hold its secrets, of whom {found.shape.threshold} give "
            "them away"
        )
        return [Check(what="a sum hides single updates", found=text, holds=True)]

    @cached_property
    def _by_name(self) -> dict[PartyId, SiteForecast]:
        return {site.name: site for site in self.sites}

    def _schedule(self) -> Iterator[tuple[int, Asked]]:
        first = 1 if self.federation.start is None else 0
        names = [site.name for site in self.sites]
        for number in range(first, self.federation.rounds + 1):
            yield number, asked_in(self.federation, names, number)

    def _round(self, number: int, asked: Asked) -> RoundForecast:
        by_name = self._by_name
        sums = [(op, self.summed(op, to)) for op, to in asked]
        return RoundForecast(
            round=number,
            asked={op: len(to) for op, to in asked},
            bytes_down=sum(
                around.bytes_down + sum(by_name[name].bytes_down[op] for name in around.to) for op, around in sums
            ),
            bytes_up=sum(
                around.bytes_up + sum(by_name[name].bytes_up[op] for name in around.to) for op, around in sums
            ),
        )

    def summed(self, op: str, to: Sequence[PartyId]) -> Summed:
        """What goes on around a request: nothing, unless the answers are added up under masks."""
        collect = self.federation.collect
        if not to or not isinstance(collect, SecureAggregation):
            return Summed(to=to)
        silent = {name for name in to if self._by_name[name].silent}
        return summed(collect, to, silent, {name for name in to if op in self._by_name[name].failures})

    def around(self, op: str) -> Summed:
        """The same for the largest cohort that gets such requests."""
        cohorts = [to for _, asked in self._schedule() for other, to in asked if other == op]
        return self.summed(op, max(cohorts, key=len, default=()))

    def line_s(self, op: str, site: SiteForecast, link: Link) -> float:
        """What a site's messages take on its line, in the largest cohort."""
        return self._line_s(op, site, link, self.around(op))

    def _line_s(self, op: str, site: SiteForecast, link: Link, around: Summed) -> float:
        exchanges = EXCHANGES if isinstance(self.federation.collect, SecureAggregation) else 1
        return link.seconds(
            around.each_down + site.bytes_down[op], around.each_up + site.bytes_up[op], exchanges=exchanges
        )

    def _at_once(self, op: str, to: Sequence[PartyId], link: Link) -> float:
        """Of one kind of request: as long as its slowest site takes."""
        around = self.summed(op, to)
        sites = [self._by_name[name] for name in around.to]
        return max((site.seconds.get(op, 0.0) + self._line_s(op, site, link, around) for site in sites), default=0.0)

    def _test_s(self, number: int) -> float:
        test = self.federation.test
        if test is None or not _evaluates(self.federation, number):
            return 0.0
        return len(test) * self.tiers[0].rehearsal.test_row_s


def asked_in(federation: Federation[Any], names: Sequence[PartyId], number: int) -> Asked:
    """Who is asked what in a round, as `Federation.step` does it. Round 0 is that of `start`."""
    asked: Asked = []
    if number == 0:
        asked.append(("statistics", names))
    else:
        cohort = federation.sampling(names, number, federation.seed)
        if len(cohort) >= max(federation.min_sites, federation.collect.least):
            asked.append(("train", cohort))
    if federation.validate_at_sites and _evaluates(federation, number):
        asked.append(("evaluate", names))
    return asked


def _evaluates(federation: Federation[Any], number: int) -> bool:
    return number % federation.evaluate_every == 0 or number >= federation.rounds
