"""Releases, taken apart and counted, and the epsilon of what was counted.

For whom a release counts, and how, is told in privacy/accounting.py. dp-accounting's two accountants disagree about
what a noise multiplier is under replace_one: its RDP takes it relative to the distance of the sums, 2 C, its PLD
relative to C. A ledger has the former (privacy/events.py); it is converted here.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from fedelta.core.errors import BadInput, UnsoundCombination
from fedelta.core.messages import PartyId
from fedelta.core.release import Accountant, Relation, Release, Unit
from fedelta.privacy.events import MOST, from_plain

if TYPE_CHECKING:
    from dp_accounting import DpEvent
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

GRID = 1e-4  # step in which privacy losses are rounded up, dp-accounting's own
WIDEST_ONE = 25.0  # range of losses, of one release and of all, up to which that step is kept; beyond, it grows with
WIDEST_ALL = 100.0  # the range, so that time and memory do not: the bound is looser, and still one
COARSE = 8  # how much wider the step is for a first look
BEYOND = 1e4  # no distribution is computed where RDP's epsilon is above this
MOST_AT_ONCE = 100_000
FEW_ORDERS = (2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)
UNKNOWN = {
    "fixed": "sampling without replacement",
    "tree": "tree aggregation",
    "concentrated": "concentrated differential privacy (sums of discrete Gaussian noise)",
}


class _Atom(NamedTuple):
    """A mechanism that is no composition. `noise` is relative to the sensitivity under the release's relation.

    That of a concentrated one is the noise of the Gaussian mechanism with the same rho.
    """

    kind: Literal["gaussian", "poisson", "fixed", "tree", "concentrated", "non_private"]
    noise: float = 0.0
    share: float = 1.0  # poisson, fixed: the probability of a unit to be in the sample
    steps: int = 1  # tree


class _Key(NamedTuple):
    atom: _Atom
    unit: Unit
    relation: Relation


Counts = Counter[_Key]  # of what one unit may be in


class Seen:
    """Releases, counted: those about all sites, and those about one."""

    def __init__(self, releases: Iterable[Release] = ()) -> None:
        self._all: Counts = Counter()
        self._one: dict[PartyId, Counts] = {}
        self.add(releases)

    @property
    def sites(self) -> Iterable[PartyId]:
        return self._one.keys()

    def add(self, releases: Iterable[Release]) -> None:
        for release in releases:
            counts = self._all if release.of is None else self._one.setdefault(release.of, Counter())
            counts.update(counted(release))

    def at(self, site: PartyId | None) -> Counts:
        """What concerns a site; None: one that nothing is about in particular."""
        return self._all + self._one[site] if site in self._one else self._all

    def of(self, site: PartyId | None) -> list[Counts]:
        """What concerns this site, or, if None, each of those that differ."""
        if site is not None:
            return [self.at(site)]
        return list({frozenset(counts.items()): counts for counts in map(self.at, [None, *self._one])}.values())


def counted(release: Release, times: int = 1) -> Counts:
    try:
        text = json.dumps(release.event, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(
            "a release's event must be plain values, not nested too deeply; see privacy/events.py"
        ) from error
    atoms = _atoms(text)
    return Counter({_Key(atom, release.unit, release.relation): n * times for atom, n in atoms.items()})


@lru_cache(maxsize=10_000)
def _atoms(event: str) -> Mapping[_Atom, int]:
    found: Counter[_Atom] = Counter()
    _take_apart(from_plain(json.loads(event)), 1, found)
    return found


def _take_apart(event: "DpEvent", times: int, found: Counter[_Atom]) -> None:
    import dp_accounting as dp

    match event:
        case dp.NonPrivateDpEvent():
            found[_Atom("non_private")] += times
        case dp.SelfComposedDpEvent(event=inner, count=count):
            _take_apart(inner, times * count, found)
        case dp.ComposedDpEvent(events=events):
            for inner in events:
                _take_apart(inner, times, found)
        case dp.SingleEpochTreeAggregationDpEvent(noise_multiplier=noise, step_counts=int(count)):
            found[_Atom("tree", noise, steps=count)] += times
        case dp.ZCDpEvent(rho=rho):
            found[_Atom("concentrated", (2 * rho) ** -0.5)] += times
        case dp.PoissonSampledDpEvent(sampling_probability=rate, event=inner):
            if rate > 0:
                found[_sampled("poisson", rate, inner)] += times
        case dp.SampledWithoutReplacementDpEvent(source_dataset_size=of, sample_size=size, event=inner):
            found[_sampled("fixed", size / of, inner)] += times
        case dp.GaussianDpEvent(noise_multiplier=noise):
            found[_Atom("gaussian", noise)] += times


def _sampled(kind: Literal["poisson", "fixed"], share: float, event: "DpEvent") -> _Atom:
    """Gaussian mechanisms on one sample are one, with the sum of their precisions (McMahan et al., 2018)."""
    inner: Counter[_Atom] = Counter()
    _take_apart(event, 1, inner)
    noise = sum(n / atom.noise**2 for atom, n in inner.items()) ** -0.5
    return _Atom(kind if share < 1 else "gaussian", noise, share)


class _Pair(NamedTuple):
    """The outputs on two neighbours; `noise` is relative to the distance of the sums, 2 C where units are replaced."""

    atom: _Atom
    replaced: bool  # only told apart where it matters: for samples


def _pairs(counts: Counts, unit: Unit) -> Counter[_Pair]:
    replaced = any(key.unit == unit and key.relation == "replace_one" for key in counts)
    found: Counter[_Pair] = Counter()
    for key, n in counts.items():
        _check_relation(key)
        atom = key.atom
        if unit == "site" and key.unit == "example":
            atom = _Atom("non_private")
        elif (replaced or key.unit != unit) and key.relation != "replace_one":
            atom = atom._replace(noise=atom.noise / 2)
        sampled = atom.kind in ("poisson", "fixed")
        found[_Pair(atom, sampled and (replaced or key.unit != unit))] += n
    return found


def _check_relation(key: _Key) -> None:
    if key.relation not in ("add_or_remove_one", "replace_one", "replace_special"):
        raise BadInput(f"a release's relation must be one of those of core/release.py, got {key.relation!r}")
    if key.atom.kind == "fixed" and key.relation != "replace_one":
        raise UnsoundCombination(
            f"sampling without replacement is accounted for under replace_one, not {key.relation}: state that "
            "relation, with noise relative to 2 C, or draw Poisson samples"
        )
    if key.atom.kind == "tree" and key.relation != "replace_special":
        raise UnsoundCombination(
            f"tree aggregation is accounted for under replace_special, not {key.relation}: state that relation"
        )


def epsilon_of(counts: Counts, delta: float, accountant: Accountant, unit: Unit, coarse: bool = False) -> float:
    """Epsilon of all that one unit may be in. `coarse`: a little more than that, sooner."""
    pairs = _pairs(counts, unit)
    if not pairs:
        return 0.0
    if any(pair.atom.kind == "non_private" for pair in pairs):
        return math.inf
    return _rdp_epsilon(pairs, delta) if accountant == "rdp" else _pld_epsilon(pairs, delta, coarse)


def _rdp_epsilon(pairs: Counter[_Pair], delta: float) -> float:
    from dp_accounting import rdp

    for pair in pairs:
        if pair.atom.kind == "poisson" and pair.replaced:
            raise UnsoundCombination(
                "RDP has no bound for Poisson samples where units are replaced, as they are beside sampling without "
                "replacement, and for examples beside releases for sites; use accountant 'pld', or the same sampling "
                "and unit throughout"
            )
    orders = rdp.RdpAccountant().orders
    total = sum(n * _renyi(pair) for pair, n in pairs.items())
    return float(rdp.compute_epsilon(orders, total, delta)[0])


@lru_cache(maxsize=10_000)
def _renyi(pair: _Pair, orders: tuple[float, ...] | None = None) -> Any:
    """The Renyi divergences of the pair, one for each of the accountant's orders."""
    import dp_accounting as dp
    from absl import logging
    from dp_accounting import rdp

    event = dp.GaussianDpEvent(pair.atom.noise)
    relation = dp.NeighboringRelation.REPLACE_ONE if pair.replaced else dp.NeighboringRelation.REPLACE_SPECIAL
    if pair.atom.kind == "poisson":
        event = dp.PoissonSampledDpEvent(pair.atom.share, event)
    elif pair.atom.kind == "fixed":
        share = Fraction(pair.atom.share).limit_denominator(MOST)
        event = dp.SampledWithoutReplacementDpEvent(share.denominator, share.numerator, event)
    elif pair.atom.kind == "tree":
        event = dp.SingleEpochTreeAggregationDpEvent(pair.atom.noise, pair.atom.steps)
    elif pair.atom.kind == "concentrated":
        event = dp.ZCDpEvent(0.5 / pair.atom.noise**2)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it says which orders it leaves out, which is no concern of a user
    try:
        # Where a divergence is next to nothing, it may come out as less.
        return rdp.RdpAccountant(orders=orders, neighboring_relation=relation).compose(event).rdp.clip(min=0)
    finally:
        logging.set_verbosity(verbosity)


def _pld_epsilon(pairs: Counter[_Pair], delta: float, coarse: bool) -> float:
    """Gaussian mechanisms are one, with the sum of their precisions; samples are composed on a grid with it."""
    from dp_accounting import get_epsilon_gaussian

    for pair in pairs:
        if pair.atom.kind not in ("gaussian", "poisson"):
            raise UnsoundCombination(
                f"privacy loss distributions are not known for {UNKNOWN[pair.atom.kind]}; use accountant 'rdp'"
                + (", or draw Poisson samples" if pair.atom.kind == "fixed" else "")
            )
    precision = sum(n / pair.atom.noise**2 for pair, n in pairs.items() if pair.atom.kind == "gaussian")
    sampled = {pair: n for pair, n in pairs.items() if pair.atom.kind == "poisson"}
    width = _width(pairs)
    if width > BEYOND:
        return math.inf if any(pair.replaced for pair in sampled) else _rdp_epsilon(pairs, delta)
    if not sampled:
        with np.errstate(divide="ignore"):  # the library takes the logarithm of 0 on the way to a small epsilon
            return float(get_epsilon_gaussian(precision**-0.5, delta))
    single = max(0.5 / pair.atom.noise**2 + 10 / pair.atom.noise for pair in sampled)
    grid = GRID * 2.0 ** math.ceil(math.log2(max(1.0, width / WIDEST_ALL, single / WIDEST_ONE)))
    if coarse:
        grid *= COARSE
    total = _loss(_Pair(_Atom("gaussian", precision**-0.5), False), grid) if precision else None
    for pair, n in sampled.items():
        loss = _repeated(_loss(pair, grid), n)
        total = loss if total is None else total.compose(loss)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))


def _width(pairs: Counter[_Pair]) -> float:
    """About the largest loss that matters: epsilon at delta 1e-15, by RDP, as if nobody was replaced."""
    curve = sum(n * _renyi(pair._replace(replaced=False), FEW_ORDERS) for pair, n in pairs.items())
    return min(float(loss) + 35 / (order - 1) for loss, order in zip(curve, FEW_ORDERS, strict=True))


def _repeated(loss: "PrivacyLossDistribution", n: int) -> "PrivacyLossDistribution":
    """Composed with itself, in parts: the library raises a size to the n-th power, which a large n makes endless."""
    if n <= MOST_AT_ONCE:
        return loss.self_compose(n)
    whole, rest = divmod(n, MOST_AT_ONCE)
    total = _repeated(loss.self_compose(MOST_AT_ONCE), whole)
    return total.compose(loss.self_compose(rest)) if rest else total


@lru_cache(maxsize=64)
def _loss(pair: _Pair, grid: float) -> "PrivacyLossDistribution":
    import dp_accounting as dp
    from dp_accounting.pld import privacy_loss_distribution

    relation = dp.NeighboringRelation.REPLACE_ONE if pair.replaced else dp.NeighboringRelation.REPLACE_SPECIAL
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=pair.atom.noise * (2 if pair.replaced else 1),  # here it is relative to C
        value_discretization_interval=grid,
        sampling_prob=pair.atom.share,
        neighboring_relation=relation,
    )
