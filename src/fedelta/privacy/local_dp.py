"""Local differential privacy: each site adds the noise itself, and need not trust the coordinator.

The delta is scaled down to the L2 norm C, and N(0, (2 z C)^2) is added to each of its numbers before it leaves: any two
data sets of a site give messages that the Gaussian mechanism with the multiplier z makes hard to tell apart. The noise
of a mean of n sites is then sqrt(n) times what a trusted coordinator would add.

Who is asked in a round gives no amplification: the coordinator, from whom this protects, knows it. Every site counts
as one, and no other number of it leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from fedelta.core.messages import Tensors, Update
from fedelta.core.noise import Noise
from fedelta.core.release import Accountant, Relation, Release, Unit
from fedelta.privacy.clipping import check_norm, clipped
from fedelta.privacy.events import Event, gaussian, no_op
from fedelta.privacy.guarantee import ROUNDS, PrivacyState, check, solved, told_number
from fedelta.privacy.population import Population, Scheme, Work


@dataclass(frozen=True, kw_only=True)
class LocalDP:
    """`clip` is C, in parameter units. `epsilon`, that of each site, and `noise` are as in `Guarantee`."""

    unit: ClassVar[Unit] = "site"
    central: ClassVar[bool] = False
    whole: ClassVar[None] = None
    numbers: ClassVar[Sequence[str]] = ()
    start_share: ClassVar[float] = 0.5  # of nothing: there is no closed-form start under it
    start_clip: ClassVar[float] = 1.0
    feature_norm: ClassVar[float] = 1.0

    clip: float
    delta: float = 1e-5
    epsilon: float | None = None
    noise: float | None = None
    accountant: Accountant = "pld"

    def __post_init__(self) -> None:
        check(self)
        check_norm("LocalDP.clip", self.clip)

    def check(self, scheme: Scheme) -> None:
        """Any will do: nothing rests on it."""

    def relation(self, scheme: Scheme) -> Relation:
        return "replace_one"

    def begin(self, population: Population, size: int, before: Sequence[Release], start: bool) -> PrivacyState:
        return PrivacyState(noise=self._multiplier(population.rounds), norm=self.clip)

    def shared(self, state: PrivacyState) -> Tensors:
        return {ROUNDS: torch.tensor(state.rounds, dtype=torch.int64)}

    def steps(self, work: Work, told: Tensors) -> None:
        return None

    def start_noise(self, told: Tensors) -> float:
        return self._multiplier(told_number(told, ROUNDS))

    def starting(self, told: Tensors, honest: int) -> None:
        return None

    def on_site(self, update: Update, work: Work, told: Tensors, noise: Noise) -> Update:
        values, within = clipped(update.values.vector, self.clip)
        values = values.clone() if within else values
        noise.add_normal(values, 2 * self._multiplier(told_number(told, ROUNDS)) * self.clip)
        return replace(update, values=update.values.like(values), weight=1.0, sums={})

    def on_total(
        self, total: Update, state: PrivacyState, population: Population, noise: Noise
    ) -> tuple[Update, PrivacyState]:
        return total, state

    def event_at_site(self, work: Work, told: Tensors) -> Event:
        return gaussian(self._multiplier(told_number(told, ROUNDS)))

    def event(self, state: PrivacyState, population: Population, round: int, again: bool) -> Event:
        """Nothing beyond what the sites let out."""
        return no_op()

    def _multiplier(self, rounds: int) -> float:
        """A site works it out for itself: whom it is protected from does not say how much noise there is."""
        return _solved(self, rounds)


@lru_cache(maxsize=64)
def _solved(guarantee: LocalDP, rounds: int) -> float:
    return solved(guarantee, gaussian, "replace_one", rounds, (), False)[0]
