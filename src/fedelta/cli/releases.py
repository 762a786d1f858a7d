"""Releases as people read them: alike ones together, in words, and what they add up to; and who saw what else."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedelta.algorithms.federation import Federation
from fedelta.algorithms.forecast_sums import Bearing
from fedelta.cli.guarantees import WITHHELD, collected, mechanism, protected, trust
from fedelta.core.errors import UnsoundCombination
from fedelta.core.messages import PartyId, Plain
from fedelta.core.program import Report
from fedelta.core.release import Accountant, Relation, Release, Unit
from fedelta.observe.page import Section, Table
from fedelta.privacy.accounting import epsilon
from fedelta.secure.aggregation import SecureAggregation

ROWS_SHOWN = 50  # of a table
WORDS: Mapping[Unit, str] = {"example": "each row", "site": "each site as a whole"}


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Releases that differ in nothing but their site and round."""

    job: str
    unit: Unit
    relation: Relation
    event: Mapping[str, Plain]
    releases: int
    sites: int  # that they are about; 0: each is about all sites
    first: int  # round
    last: int


def alike(releases: Iterable[Release]) -> list[Alike]:
    """In the order of their first ones."""
    groups: dict[tuple[str, Unit, Relation, str, bool], list[Release]] = {}
    for one in releases:
        key = (one.job, one.unit, one.relation, json.dumps(one.event, sort_keys=True), one.of is None)
        groups.setdefault(key, []).append(one)
    return [
        Alike(
            job=own[0].job,
            unit=own[0].unit,
            relation=own[0].relation,
            event=own[0].event,
            releases=len(own),
            sites=len({one.of for one in own} - {None}),
            first=min(one.round for one in own),
            last=max(one.round for one in own),
        )
        for own in groups.values()
    ]


def event_text(event: Mapping[str, Plain]) -> str:
    """ "12 times: Poisson sample at rate 0.083: Gaussian noise 1.131"."""
    (kind, given), *_ = event.items()
    value = given if isinstance(given, dict) else {}
    inner = value.get("event")
    within = event_text(inner) if isinstance(inner, dict) else ""
    match kind:
        case "no_op":
            return "nothing new"
        case "non_private":
            return "everything: it is not private"
        case "composed" if isinstance(given, list):
            return " and ".join(event_text(one) for one in given if isinstance(one, dict))
        case "tree_aggregation":
            return f"Gaussian noise {_number(value, 'noise_multiplier')} on a tree of {_number(value, 'steps')} steps"
        case "concentrated":
            return f"sum of discrete Gaussian noise: concentrated, rho {_number(value, 'rho')}"
        case "gaussian":
            return f"Gaussian noise {_number(value, 'noise_multiplier')}"
        case "self_composed":
            return f"{_number(value, 'count')} times: {within}"
        case "poisson_sampled":
            return f"Poisson sample at rate {_number(value, 'rate')}: {within}"
        case "sampled_without_replacement":
            return f"{_number(value, 'size')} of {_number(value, 'of')}: {within}"
    return json.dumps(event)


def rounds_text(group: Alike) -> str:
    """ "1-12", "3"."""
    return f"{group.first}" if group.first == group.last else f"{group.first}–{group.last}"


def sites_text(group: Alike) -> str:
    return f"{group.sites:,}" if group.sites else "all together"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What releases add up to for one unit; `epsilon` is None where no accountant knows, for which `why` is given."""

    epsilon: float | None
    accountant: Accountant = "pld"
    why: str = ""

    def text(self) -> str:
        """ "epsilon 3.473", "no guarantee"."""
        if self.epsilon is None:
            return f"not known: {self.why}"
        return f"epsilon {self.epsilon:.4g}" if math.isfinite(self.epsilon) else "no guarantee"


def spent(releases: Sequence[Release], delta: float, unit: Unit, of: PartyId | None = None) -> Spent:
    """By privacy loss distributions; by RDP where these are not known."""
    why = ""
    for accountant in ("pld", "rdp"):
        try:
            found = epsilon(releases, delta=delta, accountant=accountant, unit=unit, of=of)
        except UnsoundCombination as error:
            why = str(error)
        else:
            return Spent(epsilon=found, accountant=accountant)
    return Spent(epsilon=None, why=why)


def privacy_sections(federation: Federation[Any], run: Sequence[Report]) -> list[Section]:
    """Of a report: what was protected, from whom, what was spent, and what was released; empty without a guarantee."""
    privacy, guard = federation.privacy, federation.guard
    if privacy is None or guard is None:
        return []
    found = [release for report in run for release in report.releases]
    of_others = len(federation.ledger.releases()) - len(found)
    used = f"Epsilon {guard.spent():.4g} at delta {privacy.delta:g} is spent"
    used += f", of {privacy.epsilon:g}" if privacy.epsilon is not None else ", and there is no limit"
    text = [
        f"Protected is {protected(privacy)}. {mechanism(privacy)[:1].upper()}{mechanism(privacy)[1:]}.",
        f"{used}, as the accountant {privacy.accountant.upper()} computes it"
        + (f"; in this are {of_others:,} releases that are not of this run's rounds." if of_others > 0 else "."),
        f"Withheld: {WITHHELD}.",
    ]
    return [Section(heading="Privacy", text=text, tables=[_table(alike(found))])]


def sight_section(federation: Federation[Any], run: Sequence[Report]) -> Section:
    """Of a report: how updates reached the coordinator, and what each party can see."""
    collect, bearing = federation.collect, None
    cohorts = [len(report.cohort) for report in run if report.round and len(report.cohort) >= collect.least]
    if isinstance(collect, SecureAggregation) and cohorts:
        bearing = Bearing.of(collect, min(cohorts))
    rows = [[*row] for row in trust(federation, bearing)]
    parties = Table(header=["party", "what it can learn"], rows=rows, align="ll")
    text = f"Updates reach the coordinator {collected(federation)}."
    return Section(heading="Who sees what", text=[text], tables=[parties])


def _table(groups: Sequence[Alike]) -> Table:
    rows = [
        [event_text(one.event), sites_text(one), rounds_text(one), f"{one.releases:,}"] for one in groups[:ROWS_SHOWN]
    ]
    left_out = f"{ROWS_SHOWN} of {len(groups):,} kinds of releases; the ledger has them all."
    return Table(
        header=["what a release was", "sites", "rounds", "releases"],
        rows=rows,
        align="llrr",
        caption=left_out if len(groups) > ROWS_SHOWN else "",
    )


def _number(value: Mapping[str, Plain], name: str) -> str:
    found = value.get(name)
    return f"{found:.4g}" if isinstance(found, float) else str(found)
