"""What releases add up to: (epsilon, delta) of a ledger, the noise that keeps a budget, and whether more still fits.

The arithmetic is dp-accounting's: privacy loss distributions (pld: Koskela et al., AISTATS 2020; Doroshenko et al.,
PoPETs 2022; an upper bound, tight to about 1e-4) and Renyi differential privacy (rdp: Mironov 2017; Mironov, Talwar and
Zhang 2019; Wang, Balle and Kasiviswanathan 2019; looser). Gaussian mechanisms alone are composed exactly (Balle and
Wang, ICML 2018). Composition is fully adaptive in what is released, but not in how: noise and sampling are what the
ledger says, whatever came out before.

What is ours is the question for whom it is computed:

- A guarantee is about one unit: a site, or one example of a site. Releases about other sites do not concern it, so that
  a guarantee for all units is the largest over the sites (parallel composition).
- Two data sets differ either in that the unit counts in one of them and not in the other (add_or_remove_one,
  replace_special: for mechanisms with a Poisson sample or none, both have the same pair of worst outputs, and a release
  that hides the one hides the other), or in that it is replaced (replace_one). In a mixture, all are counted as
  replaced: what moves a sum by C when it vanishes moves it by up to 2 C when it is replaced.
- A release that hides a site also hides each example: the site's contribution is replaced by another one. It is counted
  as such, hence at 2 C, whatever relation it was made for.
- A release that hides examples says nothing of their site: it counts as not private where the unit is a site.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache

from fedelta.core.errors import BadInput, BudgetSpent, UnsoundCombination
from fedelta.core.messages import PartyId
from fedelta.core.release import Accountant, Budget, Relation, Release, Unit
from fedelta.privacy.composition import Counts, Seen, counted, epsilon_of
from fedelta.privacy.events import NOISE, Event

CLOSE = 1e-3  # how far above the least noise that keeps a budget `noise_multiplier` may be, relatively


def epsilon(
    releases: Iterable[Release],
    *,
    delta: float,
    accountant: Accountant = "pld",
    unit: Unit,
    of: PartyId | None = None,
    coarse: bool = False,
) -> float:
    """Epsilon, at this delta, of all releases together for a unit: the site `of`, or an example there.

    Without `of`, the largest over all sites. 0 for no release; infinite if one is not private, or is for examples where
    the unit is a site. For examples, releases for sites are counted as if the site was replaced (see above). `coarse`
    is a little more than that, some ten times sooner.

    Raises UnsoundCombination where `accountant` has no bound: "pld" for sampling without replacement, for trees and
    for what is concentrated, "rdp" for Poisson samples of units that are replaced.
    """
    _check_delta(delta)
    _check_accountant(accountant)
    seen = Seen(releases)
    return max(epsilon_of(counts, delta, accountant, unit, coarse) for counts in seen.of(of))


def noise_multiplier(
    event: Callable[[float], Event],
    relation: Relation,
    budget: Budget,
    *,
    unit: Unit,
    count: int = 1,
    before: Sequence[Release] = (),
    of: PartyId | None = None,
) -> float:
    """The least noise multiplier z with which `count` releases of event(z) after `before` keep the budget.

    Rounded up, by a factor of 1 + 2e-3 at most. The new releases are about `of`, or about all sites.

    Raises BudgetSpent if nothing is left after `before`, BadInput if no noise up to 10^6 is enough, and
    UnsoundCombination as `epsilon`.
    """
    if count < 1:
        raise BadInput(f"noise is solved for 1 or more releases, got {count}")
    spent = epsilon(before, delta=budget.delta, accountant=budget.accountant, unit=unit, of=of)
    if spent >= budget.epsilon:
        raise BudgetSpent(
            f"what was released before has epsilon {spent:.4g} at delta {budget.delta:g}, and the limit is "
            f"{budget.epsilon:g}: no noise makes room for more; raise the limit, or leave these data out"
        )
    past = Seen(before)

    def added(noise: float) -> list[Counts]:
        new = Release(event=event(noise), unit=unit, relation=relation, of=of)
        return [counts + counted(new, count) for counts in past.of(of)]

    def spends(noise: float, accountant: Accountant, coarse: bool = False) -> float:
        return max(epsilon_of(counts, budget.delta, accountant, unit, coarse) for counts in added(noise))

    guess, step = 1.0, 0.25
    if budget.accountant == "pld":
        # What keeps the budget by a looser bound keeps it, so the search ends next to where those that are quick end.
        # They do not get below some epsilon, whatever the noise (RDP: about log(1 / delta) / 1000).
        with suppress(UnsoundCombination, BadInput):
            guess = _least_noise(lambda noise: spends(noise, "rdp"), budget, guess, step)
        with suppress(BadInput):
            guess = _least_noise(lambda noise: spends(noise, "pld", coarse=True), budget, guess, step)
            step = 2 * CLOSE
    found = _least_noise(lambda noise: spends(noise, budget.accountant), budget, guess, step)
    for counts in added(found):
        _memory(budget, unit).holds(counts)
    return found


class Account:
    """What has been released under a budget, and whether more still fits: for every unit, or for those of one site.

    Epsilon grows with every release, so a collection of releases that is part of one that fits, fits. When it is not
    known, it is computed for as many again as well; over a run of n equal rounds, that is done about 2 log n times.
    What is known is shared by the accounts of a process that have the same budget.
    """

    def __init__(
        self, *, budget: Budget, unit: Unit, of: PartyId | None = None, releases: Iterable[Release] = ()
    ) -> None:
        self.budget = budget
        self.unit: Unit = unit
        self.of = of
        self._seen = Seen()
        self.recorded = 0  # releases up to now
        self.add(list(releases))

    def add(self, releases: Sequence[Release]) -> None:
        """These were recorded. Not checked: what was released is counted, whether it fits or not."""
        self._seen.add(releases)
        self.recorded += len(releases)

    def fits(self, more: Iterable[Release]) -> bool:
        """Whether recording `more` keeps the budget. Raises UnsoundCombination as `epsilon`."""
        new = Seen(more)
        memory = _memory(self.budget, self.unit)
        sites = {self.of} if self.of is not None else {None, *self._seen.sites, *new.sites}
        return all(memory.fits(self._seen.at(site) + new.at(site), new.at(site)) for site in sites)

    def epsilon(self) -> float:
        """What has been spent, at the budget's delta."""
        budget = self.budget
        return max(epsilon_of(counts, budget.delta, budget.accountant, self.unit) for counts in self._seen.of(self.of))


class _Memory:
    """Which counts are known to keep a budget, and which are known not to."""

    def __init__(self, budget: Budget, unit: Unit) -> None:
        self._budget = budget
        self._unit: Unit = unit
        # By what is counted: the most of it that keeps the budget (or several such), and the least that does not.
        self._kept: dict[frozenset[object], list[Counts]] = {}
        self._broken: dict[frozenset[object], list[Counts]] = {}

    def fits(self, counts: Counts, last: Counts) -> bool:
        """Whether `counts`, of which `last` came last, keep the budget."""
        if self._is_kept(counts):
            return True
        if self._is_broken(counts):
            return False
        more = min((counts[key] // n for key, n in last.items()), default=0)
        while more:
            ahead = counts + _times(last, more)
            more //= 2
            if not self._is_broken(ahead):
                if self._computed(ahead):
                    return True
                break
        return self._computed(counts)

    def holds(self, counts: Counts) -> None:
        """It was computed elsewhere that these keep the budget."""
        kept = self._kept.setdefault(frozenset(counts), [])
        kept[:] = [*(other for other in kept if not other <= counts), counts]

    def _computed(self, counts: Counts) -> bool:
        looks = (True, False) if self._budget.accountant == "pld" else (False,)  # what keeps it by a first look, does
        if any(self._epsilon(counts, coarse) <= self._budget.epsilon for coarse in looks):
            self.holds(counts)
            return True
        broken = self._broken.setdefault(frozenset(counts), [])
        broken[:] = [*(other for other in broken if not other >= counts), counts]
        return False

    def _epsilon(self, counts: Counts, coarse: bool) -> float:
        return epsilon_of(counts, self._budget.delta, self._budget.accountant, self._unit, coarse)

    def _is_kept(self, counts: Counts) -> bool:
        return any(counts <= kept for kept in self._kept.get(frozenset(counts), ()))

    def _is_broken(self, counts: Counts) -> bool:
        return any(counts >= broken for broken in self._broken.get(frozenset(counts), ()))


@lru_cache(maxsize=64)
def _memory(budget: Budget, unit: Unit) -> _Memory:
    return _Memory(budget, unit)


def _times(counts: Counts, n: int) -> Counts:
    return Counter({key: n * count for key, count in counts.items()})


def _least_noise(spent: Callable[[float], float], budget: Budget, guess: float, step: float) -> float:
    """The least noise, to CLOSE, with which spent(noise), a falling function, keeps the budget.

    `step` is about how far the guess is off, in the logarithm.
    """
    from scipy.optimize import brentq

    known: dict[float, float] = {}

    def over(log_noise: float) -> float:
        """Log of epsilon over the limit, kept finite: close to a straight line."""
        if log_noise not in known:
            known[log_noise] = spent(math.exp(log_noise))
        return min(50.0, max(-50.0, math.log(max(known[log_noise], 1e-30) / budget.epsilon)))

    lowest, highest = math.log(NOISE[0] * 2), math.log(NOISE[1] / 2)
    high, wide = math.log(guess), step
    while over(high) > 0:
        if high >= highest:
            raise BadInput(
                f"no noise up to {NOISE[1]:g} times the sensitivity keeps epsilon {budget.epsilon:g} at delta "
                f"{budget.delta:g}; allow more, or plan fewer rounds or less sampling"
            )
        high, wide = min(high + wide, highest), 2 * wide
    low, wide = high, step
    while over(low) <= 0:
        if low <= lowest:
            return math.exp(low)
        high, low, wide = low, max(low - wide, lowest), 2 * wide
    root = brentq(over, low, high, xtol=CLOSE / 4)
    while over(root) > 0:
        root += CLOSE / 2
    return math.exp(root)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise BadInput(f"delta must be above 0 and below 1, got {delta}")


def _check_accountant(accountant: Accountant) -> None:
    if accountant not in ("pld", "rdp"):
        raise BadInput(f"an accountant is 'pld' or 'rdp', got {accountant!r}")
