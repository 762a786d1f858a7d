"""The guarantee of a federation at work: what is asked of a mechanism, and in which order it is asked.

Before the first round the noise is solved for all rounds; a round whose release would pass the budget is not begun; a
release is in the ledger before anything that depends on it leaves; what is done twice is taken down twice, and with
other noise.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

from fedelta.algorithms.sampling import All, Cyclic, Fixed, Poisson, Sampling
from fedelta.core.digest import digest
from fedelta.core.errors import BudgetSpent, CannotResume, UnsoundCombination
from fedelta.core.messages import PartyId, Plain, Tensors, Update
from fedelta.core.noise import Noise, SeededNoise, SystemNoise
from fedelta.core.program import Site
from fedelta.core.release import Ledger, Relation, Release
from fedelta.core.seeds import Part
from fedelta.learning.dp_sgd import PrivateSteps, number_of_steps, sampling_rate
from fedelta.learning.private_moments import PrivateMoments
from fedelta.learning.training import Training
from fedelta.privacy.accounting import Account, epsilon
from fedelta.privacy.events import gaussian
from fedelta.privacy.guarantee import Guarantee, PrivacyState, budget
from fedelta.privacy.population import Population, Scheme, Work

Entropy = Literal["seed", "system"]
Event = Mapping[str, Plain]
_SCHEMES: Mapping[type, Scheme] = {All: "all", Poisson: "poisson", Fixed: "fixed", Cyclic: "cyclic"}


class Privacy(Guarantee, Protocol):
    """A mechanism: at what place of an update's way it works, and what an accountant has to know of it."""

    @property
    def feature_norm(self) -> float:
        """Bound on the features of a row in round zero."""
        ...

    @property
    def start_clip(self) -> float:
        """Bound on what a site sends for round zero, where the unit is the site."""
        ...

    @property
    def central(self) -> bool:
        """Whether the coordinator adds the noise, to the sum: then it is the sum that is released."""
        ...

    @property
    def numbers(self) -> Sequence[str]:
        """The numbers that an update has to have besides its values and its weight."""
        ...

    def check(self, scheme: Scheme) -> None:
        """Raise UnsoundCombination if it does not hold where sites are chosen like this."""
        ...

    def relation(self, scheme: Scheme) -> Relation:
        """Which data sets its guarantee is about, where the sites of a round are chosen like this."""
        ...

    def begin(self, population: Population, size: int, before: Sequence[Release], start: bool) -> PrivacyState:
        """The state before the first round, with noise for all rounds of updates of `size` numbers.

        `before` are releases that count already, `start` says whether there is a round zero. Raises BadInput where no
        noise keeps the budget, UnsoundCombination for a population that the mechanism has no account of.
        """
        ...

    def shared(self, state: PrivacyState) -> Tensors:
        """What sites are told, under names that begin with privacy/."""
        ...

    def steps(self, work: Work, told: Tensors) -> tuple[float, float] | None:
        """Clip and noise multiplier of every step of a site's training; None: it trains as it would."""
        ...

    def start_noise(self, told: Tensors) -> float:
        """The noise multiplier of round zero."""
        ...

    def on_site(self, update: Update, work: Work, told: Tensors, noise: Noise) -> Update:
        """The update as it may leave."""
        ...

    def on_total(
        self, total: Update, state: PrivacyState, population: Population, noise: Noise
    ) -> tuple[Update, PrivacyState]:
        """The aggregate as it may be used, from the mean of what arrived; and the next round's state."""
        ...

    def event_at_site(self, work: Work, told: Tensors) -> Event:
        """What a site that takes part lets out."""
        ...

    def event(self, state: PrivacyState, population: Population, round: int, again: bool) -> Event:
        """What a round lets out of all sites together, where the mechanism is central.

        `again`: something was taken down for this round before, so that it is not the first time.
        """
        ...


def scheme(sampling: Sampling) -> Scheme:
    """Raises UnsoundCombination for a sampling of which no account is known."""
    for kind, name in _SCHEMES.items():
        if isinstance(sampling, kind):
            return name
    raise UnsoundCombination(f"no account of privacy knows {sampling}; use All(), Poisson(), Fixed() or Cyclic()")


def population(sampling: Sampling, sites: int, rounds: int) -> Population:
    """Raises UnsoundCombination as `scheme` does."""
    share = 1.0
    match sampling:
        case Poisson():
            share = sampling.rate
        case Fixed():
            share = sampling.size / sites
        case Cyclic():
            share = 1 / sampling.groups
    return Population(sites=sites, rounds=rounds, scheme=scheme(sampling), share=share)


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What a run will let out about one site, told before its first round."""

    noise: float  # multiplier of a round, or of each step of training
    start_noise: float | None  # of round zero; None: there is none
    rounds: int  # of those that are planned, how many the budget allows
    epsilon: float  # after these, with what was in the ledger before


@dataclass(frozen=True, kw_only=True)
class Guard:
    """The mechanism of a federation with its ledger, its source of noise and its sampling."""

    privacy: Privacy
    ledger: Ledger
    entropy: Entropy
    seed: int
    job: str
    sampling: Sampling
    training: Training

    def begin(
        self, state: PrivacyState, parties: Sequence[PartyId], size: int, rounds: int, start: bool
    ) -> PrivacyState:
        """The state in which a round may begin: solved before the first one, checked before all others."""
        recorded = self.ledger.releases()
        if not state.sites:
            who = population(self.sampling, len(parties), rounds)
            begun = self.privacy.begin(who, size, recorded, start)
            names = digest(list(parties))
            begun = replace(begun, sites=who.sites, names=names, rounds=rounds, recorded=len(recorded))
            self._check_accountant(begun, parties[0])
            return begun
        if (len(parties), digest(list(parties))) != (state.sites, state.names):
            raise UnsoundCombination(
                f"the guarantee was made for {state.sites} registered sites, and these {len(parties)} are others; "
                "begin anew"
            )
        if len(recorded) < state.recorded:
            raise CannotResume(
                f"the ledger has {len(recorded)} releases, and this run goes on after {state.recorded}; give the "
                "ledger that it was started with"
            )
        return state

    def over(self, state: PrivacyState, round: int) -> str | None:
        """Why `round` cannot be begun, if it cannot."""
        if not state.sites:
            return None
        by_sites = not self.privacy.central and self.privacy.noise is None
        if round > state.rounds and (by_sites or self.population(state).scheme == "cyclic"):
            return f"its noise was made for {state.rounds} rounds"
        limit = budget(self.privacy)
        if limit is None or self._affords(self._next(state, round)):
            return None
        return f"its privacy budget (epsilon {limit.epsilon:g} at delta {limit.delta:g}) is spent"

    def population(self, state: PrivacyState) -> Population:
        return population(self.sampling, state.sites, state.rounds)

    def released(
        self, total: Update, state: PrivacyState, rows: Mapping[PartyId, int], told: Tensors, round: int
    ) -> tuple[Update, PrivacyState, Sequence[Release]]:
        """The aggregate as it may be used, the next round's state, and what the round lets out: it is in the ledger.

        `rows` are those of the sites that answered, as far as that number is public. Raises BudgetSpent, and gives
        nothing away, if another run has spent what was left. What sites have let out by then is in the ledger.
        """
        if self.privacy.central:
            found = [self._of_round(state, round)]
        else:
            found = [self._of_site(party, self._work(own), told, round) for party, own in rows.items()]
        noise = self.noise("total", round, self.times(round))
        self._take_down(found, round)
        total, state = self.privacy.on_total(total, state, self.population(state), noise)
        return total, replace(state, recorded=len(self.ledger.releases())), found

    def training_at(self, site: Site, told: Tensors, round: int) -> tuple[PrivateSteps, Noise] | None:
        """How a site has to train, and with which noise; None: as it would."""
        found = self.privacy.steps(self._work(len(site.data().train)), told)
        return found and (PrivateSteps(clip=found[0], noise=found[1]), self.noise("steps", round, site.id))

    def leaving(self, update: Update, site: Site, told: Tensors, round: int) -> Update:
        """The update as it may leave a site, whose own ledger has it then.

        Raises BudgetSpent if the site's own limit forbids it.
        """
        data = site.data()
        work = self._work(len(data.train))
        update = self.privacy.on_site(update, work, told, self.noise("update", round, site.id))
        if data.ledger is not None:
            data.ledger.record(self._of_site(site.id, work, told, round))
        return update

    def noise(self, *path: Part) -> Noise:
        return SystemNoise() if self.entropy == "system" else SeededNoise(self.seed, "privacy", *path)

    def spent(self) -> float:
        """Epsilon at the guarantee's delta of all that is in the ledger, for the site that has the largest."""
        return self._epsilon(self.ledger.releases())

    def multiplier(self, state: PrivacyState, rows: int) -> float:
        """The noise multiplier at a site with so many rows.

        Where it is solved for each site, that takes seconds, once in a process and those that are forked from it.
        """
        found = self.privacy.steps(self._work(rows), self.privacy.shared(state))
        return state.noise if found is None else found[1]

    def prospect(self, state: PrivacyState, party: PartyId, rows: int) -> Prospect:
        """What a run that has not had its first round will let out about a site that has so many rows."""
        told, who = self.privacy.shared(state), self.population(state)
        central, limit, known = self.privacy.central, budget(self.privacy), self.ledger.releases()
        start = [self._of_start(told, None if central else party)] if state.start else []
        turns = who.rounds if central else who.participations
        first = [self._of_round(state, 1) if central else self._of_site(party, self._work(rows), told, 1)]
        later = [self._of_round(state, 2)] if central else first

        def after(count: int) -> list[Release]:
            return [*start, *(first * min(count, 1)), *(later * (count - 1))]

        if limit is not None:
            account = Account(budget=limit, unit=self.privacy.unit, of=party, releases=known)
            if not account.fits(after(turns)):
                turns = bisect_left(range(1, turns), True, key=lambda count: not account.fits(after(count)))
        return Prospect(
            noise=self.multiplier(state, rows),
            start_noise=self.privacy.start_noise(told) if state.start else None,
            rounds=min(who.rounds, turns if central else turns * who.separation),
            epsilon=self._epsilon([*known, *after(turns)], party),
        )

    def moments(self, told: Tensors) -> PrivateMoments:
        """How the sums of round zero are made private."""
        privacy = self.privacy
        distance = 2.0 if scheme(self.sampling) == "fixed" else 1.0  # where a site is replaced, and not left out
        return PrivateMoments(
            noise=privacy.start_noise(told) * distance,
            unit=privacy.unit,
            feature_norm=privacy.feature_norm,
            site_norm=privacy.start_clip,
        )

    def started(self, answered: Sequence[PartyId], told: Tensors) -> Sequence[Release]:
        """What round zero lets out: it is in the ledger. Raises BudgetSpent as `released`."""
        found = [self._of_start(told, None)] if self.privacy.central else [self._of_start(told, to) for to in answered]
        self._take_down(found, 0)
        return found

    def start_leaves(self, site: Site, told: Tensors) -> None:
        """Take down, in a site's own ledger, what it sends for round zero; raises BudgetSpent as `leaving`."""
        own = site.data().ledger
        if own is not None:
            own.record(self._of_start(told, site.id))

    def _of_start(self, told: Tensors, of: PartyId | None) -> Release:
        return Release(
            event=gaussian(self.privacy.start_noise(told)),
            unit=self.privacy.unit,
            relation=self.privacy.relation(scheme(self.sampling)),
            of=of,
            job=self.job,
        )

    def _work(self, rows: int) -> Work:
        return Work(rows=rows, rate=sampling_rate(rows, self.training), steps=number_of_steps(rows, self.training))

    def _epsilon(self, releases: Sequence[Release], of: PartyId | None = None) -> float:
        own = self.privacy
        return epsilon(releases, delta=own.delta, accountant=own.accountant, unit=own.unit, of=of, coarse=True)

    @cached_property
    def _account(self) -> Account | None:
        limit = budget(self.privacy)
        return None if limit is None else Account(budget=limit, unit=self.privacy.unit)

    def _affords(self, releases: Sequence[Release]) -> bool:
        """Whether the budget, if there is one, is kept with these besides those of the ledger."""
        account = self._account
        if account is None:
            return True
        account.add(self.ledger.releases()[account.recorded :])
        return account.fits(releases)

    def _take_down(self, releases: Sequence[Release], round: int) -> None:
        """Record what a round lets out. What sites have sent is out, and is recorded even if it will not be used."""
        if self.privacy.central:
            self._check_budget(releases, round)
        self.ledger.record(*releases)
        self._check_budget([], round)

    def _check_budget(self, releases: Sequence[Release], round: int) -> None:
        limit = budget(self.privacy)
        if limit is not None and not self._affords(releases):
            raise BudgetSpent(
                f"round {round} would pass epsilon {limit.epsilon:g} at delta {limit.delta:g}, so that nothing of it "
                "is used; raise the limit, or add more noise"
            )

    def _check_accountant(self, state: PrivacyState, party: PartyId) -> None:
        """Raise UnsoundCombination, before the first round, if what will be in the ledger has no account."""
        known = self.ledger.releases()
        if self.privacy.noise is None and not known:
            return  # solving the noise would have shown it
        some = self._work(2 * self.training.batch)
        told = self.privacy.shared(state)
        new = self._of_round(state, 1) if self.privacy.central else self._of_site(party, some, told, 1)
        self._epsilon([*known, new])

    def _next(self, state: PrivacyState, round: int) -> Sequence[Release]:
        """What `round` will let out, as far as it is known: of a site what it last let out in this run."""
        if self.privacy.central:
            return [self._of_round(state, round)]
        own = (release for release in self.ledger.releases() if release.job == self.job and release.round)
        return list({release.of: release for release in own}.values())

    def times(self, round: int) -> int:
        """How often this round of this run is in the ledger already."""
        return sum(release.round == round and release.job == self.job for release in self.ledger.releases())

    def _of_round(self, state: PrivacyState, round: int) -> Release:
        who = self.population(state)
        event = self.privacy.event(state, who, round, again=self.times(round) > 0)
        return Release(
            event=event, unit=self.privacy.unit, relation=self.privacy.relation(who.scheme), job=self.job, round=round
        )

    def _of_site(self, party: PartyId, work: Work, told: Tensors, round: int) -> Release:
        return Release(
            event=self.privacy.event_at_site(work, told),
            unit=self.privacy.unit,
            relation=self.privacy.relation(scheme(self.sampling)),
            of=party,
            job=self.job,
            round=round,
        )
