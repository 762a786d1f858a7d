"""Site-level differential privacy with a trusted coordinator: the Gaussian mechanism on the sum of a round's deltas.

McMahan et al., "Learning differentially private recurrent language models" (ICLR 2018, Algorithm 1, flat clipping, the
estimator with a fixed denominator). Each site scales its delta down to the L2 norm C and counts as one; the coordinator
adds N(0, (z s)^2) to each number of the sum and divides by the expected number of sites. It is accounted for as what it
was:

- every site in every round: neighbours differ in one site, whose deltas count, or are zero in all rounds (zero-out: the
  names and the number of registered sites are public), s = C, a Gaussian mechanism a round;
- each site with probability q: the same, amplified by Poisson sampling. The sum is never divided by the actual number;
- a cohort of fixed size: neighbours differ in the data of one site, s = 2 C, sampling without replacement (RDP only);
- in turn: noise that is correlated across rounds (privacy/matrix_noise.py), one Gaussian mechanism for the whole run,
  and no trust in any sampling.

What is hidden is what a site has, from whoever sees the models; not from the coordinator, which gets each delta. Where
sites are sampled, nobody else may know who was asked in which round: the reports say so, and stay at the coordinator.
No other number of a site is released: the losses of training are withheld.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedelta.core.errors import BadInput, UnsoundCombination
from fedelta.core.messages import Tensors, Update
from fedelta.core.noise import Noise
from fedelta.core.release import Accountant, Relation, Release, Unit
from fedelta.privacy.clipping import WITHIN, AdaptiveClip, check_norm, clipped
from fedelta.privacy.events import Event, gaussian, no_op, poisson_gaussian, without_replacement_gaussian
from fedelta.privacy.guarantee import PrivacyState, check, solved
from fedelta.privacy.matrix_noise import Strategy, optimised
from fedelta.privacy.population import Population, Scheme, Work

NORM = "privacy/norm"  # in the broadcast: the present bound
NOISE = "privacy/noise"  # and the multiplier, which the ledgers of sites take down,
START = "privacy/start"  # and that of round zero


@dataclass(frozen=True, kw_only=True)
class SiteLevel:
    """`clip` is C, in parameter units, for the delta as a whole. `epsilon` and `noise` are as in `Guarantee`.

    `bands` is over how many rounds the noise is correlated, at most the number of groups of `Cyclic` sampling; 1: noise
    is fresh in every round. `start_share` is how much of epsilon a closed-form start may spend, `start_clip` and
    `feature_norm` its bounds (site_norm and feature_norm of learning/private_moments.py).
    """

    unit: ClassVar[Unit] = "site"
    central: ClassVar[bool] = True
    whole: ClassVar[None] = None

    clip: float | AdaptiveClip
    delta: float = 1e-5
    epsilon: float | None = None
    noise: float | None = None
    accountant: Accountant = "pld"
    bands: int = 1
    start_share: float = 0.5
    start_clip: float = 0.5
    feature_norm: float = 1.0

    def __post_init__(self) -> None:
        check(self)
        if not isinstance(self.clip, AdaptiveClip):
            check_norm("SiteLevel.clip", self.clip)
        if self.bands < 1:
            raise BadInput(f"SiteLevel.bands must be >= 1, got {self.bands}")

    def check(self, scheme: Scheme) -> None:
        if scheme == "cyclic" and isinstance(self.clip, AdaptiveClip):
            raise UnsoundCombination(
                f"with Cyclic() sampling all rounds are one mechanism with one bound, which {self.clip} changes; give "
                "a number as the clip"
            )
        if scheme != "cyclic" and self.bands > 1:
            raise UnsoundCombination(
                f"noise that is correlated over bands={self.bands} rounds needs sites that take turns; use Cyclic() "
                "sampling, or bands=1"
            )

    @property
    def numbers(self) -> Sequence[str]:
        return (WITHIN,) if isinstance(self.clip, AdaptiveClip) else ()

    def relation(self, scheme: Scheme) -> Relation:
        return "replace_one" if scheme == "fixed" else "replace_special"

    def begin(self, population: Population, size: int, before: Sequence[Release], start: bool) -> PrivacyState:
        """The state before the first round: noise that keeps the budget, for updates of `size` numbers."""
        count = min(1, population.rounds) if population.scheme == "cyclic" else population.rounds
        relation = self.relation(population.scheme)
        noise, zeroth = solved(self, lambda z: self._event(z, population), relation, count, before, start)
        if isinstance(self.clip, AdaptiveClip):
            self.clip.noise_on_values(noise, population.cohort)  # whether it leaves anything
        correlated = self._strategy(population).start(size) if population.scheme == "cyclic" else None
        return PrivacyState(
            noise=noise,
            start=start,
            start_noise=zeroth,
            norm=self.clip.initial if isinstance(self.clip, AdaptiveClip) else self.clip,
            correlated=correlated,
        )

    def shared(self, state: PrivacyState) -> Tensors:
        """What sites are told."""
        told = {NORM: state.norm, NOISE: state.noise, START: state.start_noise}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in told.items()}

    def starting(self, told: Tensors, honest: int) -> None:
        return None

    def on_site(self, update: Update, work: Work, told: Tensors, noise: Noise) -> Update:
        """The clipped update, with weight 1 and without the site's other numbers."""
        values, within = clipped(update.values.vector, float(told[NORM]))
        sums = {WITHIN: 0.5 if within else -0.5} if isinstance(self.clip, AdaptiveClip) else {}
        return replace(update, values=update.values.like(values), weight=1.0, sums=sums)

    def steps(self, work: Work, told: Tensors) -> None:
        return None

    def start_noise(self, told: Tensors) -> float:
        return float(told[START])

    def event_at_site(self, work: Work, told: Tensors) -> Event:
        """A site cannot check that it was chosen at random, and takes nothing off for it."""
        return gaussian(float(told[NOISE]))

    def event(self, state: PrivacyState, population: Population, round: int, again: bool) -> Event:
        if population.scheme == "cyclic" and round > 1 and not again:
            return no_op()  # the first round's event was that of all rounds
        return self._event(state.noise, population)

    def on_total(
        self, total: Update, state: PrivacyState, population: Population, noise: Noise
    ) -> tuple[Update, PrivacyState]:
        """The noised sum over the expected cohort, from the mean of what arrived, and the state of the next round."""
        sensitivity = 2.0 if population.scheme == "fixed" else 1.0
        values = total.values.vector * total.weight
        if state.correlated is not None:
            strategy = state.correlated.strategy
            most = strategy.sensitivity(population.separation, population.participations)
            noised, correlated = strategy.next(state.correlated, values, noise, state.noise * state.norm * most)
            values = noised.to(values)
            after = replace(state, correlated=correlated)
        elif isinstance(self.clip, AdaptiveClip):
            own = self.clip.noise_on_values(state.noise, population.cohort)
            noise.add_normal(values, own * state.norm * sensitivity)
            count = torch.tensor([total.sums.get(WITHIN, 0.0)], dtype=torch.float64)
            noise.add_normal(count, self.clip.deviation(population.cohort) * sensitivity)
            after = replace(state, norm=self.clip.next(state.norm, float(count), population.cohort))
        else:
            noise.add_normal(values, state.noise * state.norm * sensitivity)
            after = state
        return replace(total, values=total.values.like(values.div_(population.cohort)), sums={}), after

    def _event(self, noise: float, population: Population) -> Event:
        if population.scheme == "poisson":
            return poisson_gaussian(population.share, noise)
        if population.scheme == "fixed":
            return without_replacement_gaussian(round(population.cohort), population.sites, noise)
        return gaussian(noise)

    def _strategy(self, population: Population) -> Strategy:
        """How noise is correlated where sites take turns."""
        return optimised(
            rounds=population.rounds,
            bands=self.bands,
            separation=population.separation,
            participations=population.participations,
        )
