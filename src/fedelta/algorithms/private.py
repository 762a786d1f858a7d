"""The guarantee of a federation at work: what is asked of a mechanism, and in which order it is asked.

Before the first round the noise is solved for all rounds; a round whose release would pass the budget is not begun; a
release is in the ledger before anything that depends on it leaves; what is done twice is taken down twice, and with
other noise.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from fedelta.aggregation.mean import Mean
from fedelta.algorithms.mechanism import Entropy, Privacy, population, scheme
from fedelta.algorithms.sampling import Fixed, Sampling
from fedelta.core.content import Contents
from fedelta.core.digest import digest
from fedelta.core.errors import BadInput, BudgetSpent, CannotResume, UnsoundCombination
from fedelta.core.grid import Terms
from fedelta.core.messages import PartyId, Tensors, Update
from fedelta.core.noise import Noise, SeededNoise, SystemNoise
from fedelta.core.program import Site
from fedelta.core.release import Ledger, Limit, Release
from fedelta.core.seeds import Part
from fedelta.learning.dp_sgd import PrivateSteps, number_of_steps, sampling_rate
from fedelta.learning.private_moments import Discrete, PrivateMoments
from fedelta.learning.training import Training
from fedelta.privacy import distributed
from fedelta.privacy.accounting import Account, epsilon
from fedelta.privacy.events import gaussian, repeated
from fedelta.privacy.guarantee import ROUNDS, PrivacyState, budget, told_number
from fedelta.privacy.population import Population, Work
from fedelta.privacy.site_level import NORM


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
    start: bool  # whether there is a round zero
    rounds: int  # of the experiment, as whoever asks knows it
    honest: Callable[[int], int]  # as `Collect.honest`,
    registered: int | None  # and `Collect.registered`

    def begin(
        self, state: PrivacyState, parties: Sequence[PartyId], size: int, rounds: int, start: bool
    ) -> PrivacyState:
        """The state in which a round may begin: solved before the first one, checked before all others."""
        recorded = self.ledger.releases()
        if not state.sites:
            who = self._population(len(parties), rounds)
            begun = self.privacy.begin(who, size, recorded, start)
            names = digest(list(parties))
            prefix = self._prefix(recorded)
            begun = replace(begun, sites=who.sites, names=names, rounds=rounds, recorded=len(recorded), prefix=prefix)
            self._check_accountant(begun, parties[0])
            return begun
        if (len(parties), digest(list(parties))) != (state.sites, state.names):
            raise UnsoundCombination(
                f"the guarantee was made for {state.sites} registered sites, and these {len(parties)} are others; "
                "begin anew"
            )
        if rounds > state.rounds and not self.privacy.central and self.privacy.noise is None:
            raise CannotResume(
                f"sites make their noise for the {state.rounds} rounds that the run began with, and {rounds} are more; "
                f"go on with {state.rounds}, or begin anew"
            )
        if len(recorded) < state.recorded or self._prefix(recorded[: state.recorded]) != state.prefix:
            raise CannotResume(
                f"the ledger does not begin with the {state.recorded} releases after which this run goes on; give the "
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
        return self._population(state.sites, state.rounds)

    def released(
        self, total: Update, state: PrivacyState, rows: Mapping[PartyId, int], told: Tensors, round: int
    ) -> tuple[Update, PrivacyState, Sequence[Release]]:
        """The aggregate as it may be used, the next round's state, and what the round lets out: it is in the ledger.

        `rows` are those of the sites that answered, as far as that number is public. Raises BudgetSpent, and gives
        nothing away, if another run has spent what was left. What sites have let out by then is in the ledger.
        """
        noise = self.noise("total", round, self.times(round))
        found = [self._of_round(state, round)] if self.privacy.central else self.sent(rows, told, round)
        if self.privacy.central:
            self.ledger.record(*found, within=self._limit)
        self._check_budget(round)
        total, state = self.privacy.on_total(total, state, self.population(state), noise)
        recorded = self.ledger.releases()
        return total, replace(state, recorded=len(recorded), prefix=self._prefix(recorded)), found

    def sent(self, rows: Mapping[PartyId, int], told: Tensors, round: int) -> Sequence[Release]:
        """What sites have let out that have answered, where they add the noise: recorded, whether it is used or not."""
        if self.privacy.central:
            return ()
        found = [self._of_site(party, self._work(own, told), told, round) for party, own in rows.items()]
        self.ledger.record(*found)
        return found

    def mean(self, told: Tensors) -> Mean | None:
        """How deltas that are to be noised, or whole numbers, become a sum: on a grid that depends on nobody's data.

        None where it is as the algorithm has it.
        """
        if self.privacy.whole is not None:
            return Mean(bound=2.0**self.privacy.whole, weight_bound=1.0)
        return Mean(bound=max(float(told[NORM]), 2.0**-100), weight_bound=1.0) if self.privacy.central else None

    def terms(self, op: str, told: Tensors) -> Terms | None:
        """Those of a sum whose noise sites add in shares; None where there is no such sum."""
        if self.privacy.whole is None:
            return None
        asked = told_number(told, distributed.SITES if op == "statistics" else distributed.COHORT)
        return Terms(weight_bound=1.0, whole=self.privacy.whole, asked=asked)

    def training_at(self, site: Site, told: Tensors, round: int) -> tuple[PrivateSteps, Noise] | None:
        """How a site has to train, and with which noise; None: as it would.

        Raises BadInput for a request that does not go with the guarantee, BudgetSpent for one beyond it.
        """
        work = self._work(len(site.data().train), told)
        self._check_request(work, told, round)
        found = self.privacy.steps(work, told)
        return found and (PrivateSteps(clip=found[0], noise=found[1]), self.noise_at(site, told, "steps", round))

    def leaving(self, update: Update, site: Site, told: Tensors, round: int) -> Update:
        """The update as it may leave a site, whose own ledger has it then.

        Raises BudgetSpent if the site's own limit forbids it.
        """
        data = site.data()
        work = self._work(len(data.train), told)
        update = self.privacy.on_site(update, work, told, self.noise_at(site, told, "update", round))
        if data.ledger is not None:
            data.ledger.record(self._of_site(site.id, work, told, round))
        return update

    def noise(self, *path: Part) -> Noise:
        return SystemNoise() if self.entropy == "system" else SeededNoise(self.seed, "privacy", self.job, *path)

    def noise_at(self, site: Site, told: Tensors, *path: Part) -> Noise:
        """That of a site: where it is seeded, another one for every message that it may be the answer to.

        Two answers with the same noise would tell how they differ.
        """
        seen = "" if self.entropy == "system" else self._contents.of(told).hex()
        return self.noise(site.id, seen, *path)

    def spent(self) -> float:
        """Epsilon at the guarantee's delta of all that is in the ledger, for the site that has the largest."""
        return self._epsilon(self.ledger.releases())

    def multiplier(self, state: PrivacyState, rows: int) -> float:
        """The noise multiplier at a site with so many rows.

        Where it is solved for each site, that takes seconds, once in a process and those that are forked from it.
        """
        told = self.privacy.shared(state)
        found = self.privacy.steps(self._work(rows, told), told)
        return state.noise if found is None else found[1]

    def prospect(self, state: PrivacyState, party: PartyId, rows: int) -> Prospect:
        """What a run that has not had its first round will let out about a site that has so many rows."""
        told, who = self.privacy.shared(state), self.population(state)
        central, limit, known = self.privacy.central, budget(self.privacy), self.ledger.releases()
        start = [self._of_start(told, None if central else party)] if state.start else []
        turns = who.rounds if central else who.participations
        first = [self._of_round(state, 1) if central else self._of_site(party, self._work(rows, told), told, 1)]
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
        """How the sums of round zero are made private. Raises BadInput as `training_at`."""
        privacy = self.privacy
        self._check_told(told)
        replaced = privacy.unit == "site" and scheme(self.sampling) == "fixed"  # and not left out
        distance = 2.0 if replaced else 1.0
        return PrivateMoments(
            noise=privacy.start_noise(told) * distance,
            unit=privacy.unit,
            feature_norm=privacy.feature_norm,
            site_norm=privacy.start_clip,
            discrete=self._starting(told),
        )

    def _starting(self, told: Tensors) -> Callable[[int], Discrete] | None:
        if self.privacy.whole is None:
            return None
        return self.privacy.starting(told, self.honest(told_number(told, distributed.SITES)))

    def started(self, answered: Sequence[PartyId], told: Tensors) -> Sequence[Release]:
        """What round zero lets out: it is in the ledger. Raises BudgetSpent as `released`."""
        central = self.privacy.central
        found = [self._of_start(told, None)] if central else [self._of_start(told, to) for to in answered]
        self.ledger.record(*found, within=self._limit if central else None)
        self._check_budget(0)
        return found

    def start_leaves(self, site: Site, told: Tensors) -> None:
        """Take down, in a site's own ledger, what it sends for round zero; raises BudgetSpent as `leaving`."""
        own = site.data().ledger
        if own is not None:
            own.record(self._of_start(told, site.id))

    def _of_start(self, told: Tensors, of: PartyId | None) -> Release:
        return Release(
            event=(gaussian if self.privacy.whole is None else distributed.event)(self.privacy.start_noise(told)),
            unit=self.privacy.unit,
            relation=self.privacy.relation(scheme(self.sampling)),
            of=of,
            job=self.job,
        )

    def _population(self, sites: int, rounds: int) -> Population:
        who = population(self.sampling, sites, rounds)
        return who if self.privacy.whole is None else replace(who, honest=self.honest(round(who.cohort)))

    def _work(self, rows: int, told: Tensors) -> Work:
        if rows < 1:
            raise BadInput("this site has no training examples")
        return Work(
            rows=rows,
            rate=sampling_rate(rows, self.training),
            steps=number_of_steps(rows, self.training),
            honest=1 if self.privacy.whole is None else self.honest(told_number(told, distributed.COHORT)),
        )

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

    @property
    def _limit(self) -> Limit | None:
        """For the ledger, which looks and records in one go: runs may share it."""
        limit = budget(self.privacy)
        return None if limit is None else Limit(budget=limit, unit=self.privacy.unit)

    def _check_request(self, work: Work, told: Tensors, round: int) -> None:
        """A site's own look at what it is told, which need not be true: whether this round is within its guarantee.

        That each round is asked for once, only its own ledger can say.
        """
        privacy, limit = self.privacy, budget(self.privacy)
        if privacy.central:
            return
        self._check_told(told)
        if round < 1 or (privacy.noise is None and round > self.rounds):
            raise BadInput(f"it is asked for round {round}, and its experiment has {self.rounds}")
        if privacy.noise is not None and limit is not None:
            before = [self._of_start(told, "")] if self.start else []
            one = self._of_site("", work, told, round)
            if not Account(budget=limit, unit=privacy.unit).fits(
                [*before, replace(one, event=repeated(one.event, round))]
            ):
                raise BudgetSpent(f"round {round} would pass epsilon {limit.epsilon:g} at delta {limit.delta:g}")

    def _check_told(self, told: Tensors) -> None:
        """Raise BadInput where a site would make less noise, from what it is told, than for its experiment."""
        self._check_asked(told)
        if self.privacy.central or self.privacy.noise is not None:
            return
        rounds = told_number(told, ROUNDS)
        if rounds < self.rounds:
            raise BadInput(f"it is told of {rounds} rounds, and its experiment has {self.rounds}")
        if distributed.START in told and bool(told_number(told, distributed.START)) != self.start:
            raise BadInput("what it is told of round zero is not what its experiment says")

    def _check_asked(self, told: Tensors) -> None:
        """Raise BadInput where noise in shares would be made for other numbers of sites than its experiment has."""
        if self.privacy.whole is None:
            return
        sites, cohort = (told_number(told, name) for name in (distributed.SITES, distributed.COHORT))
        if self.registered not in (None, sites):
            raise BadInput(f"it is told of {sites} sites, and its experiment has the identities of {self.registered}")
        asked = self.sampling.size if isinstance(self.sampling, Fixed) else sites
        if cohort != asked:
            raise BadInput(f"it is told that a round asks {cohort} sites, and by its experiment it is {asked}")

    @cached_property
    def _contents(self) -> Contents:
        return Contents()

    def _prefix(self, releases: Sequence[Release]) -> str:
        """A digest of releases in their order, which goes on from the one that was asked for the last time."""
        count, found = self._last.get("prefix", (0, ""))
        if count > len(releases):
            count, found = 0, ""
        for release in releases[count:]:
            plain = [getattr(release, field.name) for field in fields(Release)]
            found = hashlib.blake2b((found + json.dumps(plain, sort_keys=True)).encode(), digest_size=16).hexdigest()
        self._last["prefix"] = (len(releases), found)
        return str(found)

    @cached_property
    def _last(self) -> dict[str, Any]:
        """What was computed the last time."""
        return {}

    def _check_budget(self, round: int) -> None:
        limit = budget(self.privacy)
        if limit is not None and not self._affords([]):
            raise BudgetSpent(
                f"round {round} would pass epsilon {limit.epsilon:g} at delta {limit.delta:g}, so that nothing of it "
                "is used; raise the limit, or add more noise"
            )

    def _check_accountant(self, state: PrivacyState, party: PartyId) -> None:
        """Raise UnsoundCombination, before the first round, if what will be in the ledger has no account."""
        known = self.ledger.releases()
        if self.privacy.noise is None and not known:
            return  # solving the noise would have shown it
        told = self.privacy.shared(state)
        some = self._work(2 * self.training.batch, told)
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
