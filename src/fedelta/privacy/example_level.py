"""Example-level differential privacy: DP-SGD at each site, so that no row of a site shows in what leaves it.

Each site trains by DP-SGD (learning/dp_sgd.py) on batches that it draws itself, with noise of its own; nobody is
trusted with less. The guarantee of a site is the composition of all its steps in all rounds. Neighbours differ in one
row, which is there or counts as nothing (zero-out): the number of a site's rows is public, and so are the steps and the
sampling rate that follow from it. A row lies at one site, so that a row of the pooled data has the largest epsilon of
all sites.

Batches and noise have to be unknown to the coordinator: in a simulation they follow from the seed, and whoever knows
it has no noise to look through.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from fedelta.core.messages import Tensors, Update
from fedelta.core.noise import Noise
from fedelta.core.release import Accountant, Relation, Release, Unit
from fedelta.privacy.clipping import check_norm
from fedelta.privacy.events import Event, no_op, steps
from fedelta.privacy.guarantee import ROUNDS, PrivacyState, check, solved, start_multiplier, told_number
from fedelta.privacy.population import Population, Scheme, Work

START = "privacy/start"  # in the broadcast: whether there is a round zero besides
ROWS = "privacy/rows"  # the number of an update that says of how many rows it is


@dataclass(frozen=True, kw_only=True)
class ExampleLevel:
    """`clip` bounds the gradient of one example (L2). `epsilon`, that of each site, and `noise` are as in `Guarantee`.

    `start_share` is how much of epsilon a closed-form start may spend, `feature_norm` its bound (see
    learning/private_moments.py).

    Where noise is solved from epsilon, every site has its own: one with more rows needs less.
    """

    unit: ClassVar[Unit] = "example"
    central: ClassVar[bool] = False
    whole: ClassVar[None] = None
    start_clip: ClassVar[float] = 1.0  # cuts nothing
    numbers: ClassVar[Sequence[str]] = (ROWS,)

    clip: float
    delta: float = 1e-5
    epsilon: float | None = None
    noise: float | None = None
    accountant: Accountant = "pld"
    start_share: float = 0.5
    feature_norm: float = 1.0

    def __post_init__(self) -> None:
        check(self)
        check_norm("ExampleLevel.clip", self.clip)

    def check(self, scheme: Scheme) -> None:
        """Any will do: nothing rests on it."""

    def relation(self, scheme: Scheme) -> Relation:
        return "replace_special"

    def begin(self, population: Population, size: int, before: Sequence[Release], start: bool) -> PrivacyState:
        return PrivacyState(norm=self.clip, start=start)

    def shared(self, state: PrivacyState) -> Tensors:
        told = {ROUNDS: state.rounds, START: int(state.start)}
        return {name: torch.tensor(value, dtype=torch.int64) for name, value in told.items()}

    def steps(self, work: Work, told: Tensors) -> tuple[float, float]:
        return self.clip, _multipliers(
            self, work.rate, work.steps, told_number(told, ROUNDS), bool(told_number(told, START))
        )[0]

    def starting(self, told: Tensors, honest: int) -> None:
        return None

    def on_site(self, update: Update, work: Work, told: Tensors, noise: Noise) -> Update:
        return replace(update, sums={**update.sums, ROWS: float(work.rows)})  # the noise is in it

    def on_total(
        self, total: Update, state: PrivacyState, population: Population, noise: Noise
    ) -> tuple[Update, PrivacyState]:
        return total, state

    def event_at_site(self, work: Work, told: Tensors) -> Event:
        return steps(work.rate, self.steps(work, told)[1], work.steps)

    def event(self, state: PrivacyState, population: Population, round: int, again: bool) -> Event:
        """Nothing beyond what the sites let out."""
        return no_op()

    def start_noise(self, told: Tensors) -> float:
        return start_multiplier(self, "replace_special", told_number(told, ROUNDS), ())


@lru_cache(maxsize=4096)
def _multipliers(guarantee: ExampleLevel, rate: float, count: int, rounds: int, start: bool) -> tuple[float, float]:
    """Those of a round of `count` steps, and of round zero; sites that differ in nothing else share them."""

    def event(noise: float) -> Event:
        return steps(rate, noise, count)

    return solved(guarantee, event, "replace_special", rounds, (), start)
