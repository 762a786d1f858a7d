"""The guarantee of a federation at work: what is asked of a mechanism, and in which order it is asked.

Before the first round the noise is solved for all rounds; a round whose release would pass the budget is not begun; a
release is in the ledger before anything that depends on it leaves; what is done twice is taken down twice, and with
other noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from fedelta.privacy.accounting import epsilon, fits
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
            return replace(begun, sites=who.sites, names=names, rounds=rounds, recorded=len(recorded))
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
        if limit is None or not self.privacy.central or self._affords(self._of_round(state, round)):
            return None
        return f"its privacy budget (epsilon {limit.epsilon:g} at delta {limit.delta:g}) is spent"

    def population(self, state: PrivacyState) -> Population:
        return population(self.sampling, state.sites, state.rounds)

    def released(
        self, total: Update, state: PrivacyState, rows: Mapping[PartyId, int], told: Tensors, round: int
    ) -> tuple[Update, PrivacyState, Sequence[Release]]:
        """The aggregate as it may be used, the next round's state, and what the round lets out: it is in the ledger.

        `rows` are those of the sites that answered, as far as that number is public. Raises BudgetSpent, and gives
        nothing away, if another run has spent what was left.
        """
        if self.privacy.central:
            found = [self._of_round(state, round)]
            if not self._affords(found[0]):
                raise BudgetSpent(f"round {round} would pass {budget(self.privacy)}, so that nothing of it is released")
        else:
            found = [self._of_site(party, self._work(own), told, round) for party, own in rows.items()]
        noise = self.noise("total", round, self.times(round))
        self.ledger.record(*found)
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
        """Epsilon at the guarantee's delta of all that is in the ledger."""
        found = self.privacy
        return epsilon(self.ledger.releases(), delta=found.delta, accountant=found.accountant, unit=found.unit)

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
        if self.privacy.central and not self._affords(found[0]):
            raise BudgetSpent(f"round 0 would pass {budget(self.privacy)}, so that nothing of it is released")
        self.ledger.record(*found)
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

    def _affords(self, release: Release) -> bool:
        limit = budget(self.privacy)
        return limit is None or fits(self.ledger.releases(), [release], limit, self.privacy.unit)

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
