"""Distributed differential privacy: each site adds a share of the noise, and only sums over sites are ever seen.

Kairouz, Liu & Steinke, "The distributed discrete Gaussian mechanism for federated learning with secure aggregation"
(ICML 2021, Algorithms 1 and 2). A site scales its delta down to the L2 norm C, rotates it by a public random rotation,
rounds it to whole multiples of a granularity, adds discrete Gaussian noise, and takes all modulo a power of two, as
secure aggregation adds. A share hides nothing by itself: the sum does, and it hides a site's part from the coordinator,
too, which never sees one without noise (privacy/discretisation.py).

What is assumed of the sum is what the collect promises (`Collect.honest`): of the sites that were asked so many have
their noise in whatever the coordinator gets to see; those that collude with it do not count, and know their own. The
noise is made for the fewest, so that with more of them there is more than was asked for: of 100 sites with 10 that may
collude, the standard deviation of a sum over all of them is 1.32 times as large.

The guarantee is that of zero-out: neighbours differ in one site, whose deltas count or are zero in all rounds. Nothing
is taken off for who is asked in a round, as all who are asked know each other. Every site counts as one, and no other
number of it leaves. It rests on a bound on the sum of discrete Gaussians in concentrated differential privacy, which
nothing but Renyi accounting can add up with other releases.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from fedelta.core.errors import BadInput, UnsoundCombination
from fedelta.core.messages import Tensors, Update
from fedelta.core.noise import Noise
from fedelta.core.release import Accountant, Relation, Release, Unit
from fedelta.privacy.clipping import check_norm, clipped
from fedelta.privacy.discretisation import Discretisation, discretisation
from fedelta.privacy.events import Event, concentrated, no_op
from fedelta.privacy.guarantee import ROUNDS, PrivacyState, check, solved, told_number
from fedelta.privacy.population import Population, Scheme, Work

SITES = "privacy/sites"  # in the broadcast: how many are registered, and all of them asked in round zero;
COHORT = "privacy/cohort"  # how many a round asks,
START = "privacy/start"  # whether there is a round zero,
TURN = "privacy/turn"  # and which of the public rotations is used


@dataclass(frozen=True, kw_only=True)
class DistributedDP:
    """`clip` is C, in parameter units. `epsilon`, that of each site, and `noise` are as in `Guarantee`.

    Integers have `bits`, and some element of a round's sum wraps around with a probability of at most `overflow`: that
    costs accuracy, and nothing of the guarantee. `start_share` is how much of epsilon a closed-form start may spend,
    `start_clip` and `feature_norm` its bounds (site_norm and feature_norm of learning/private_moments.py).
    """

    unit: ClassVar[Unit] = "site"
    central: ClassVar[bool] = False
    numbers: ClassVar[Sequence[str]] = ()
    accountant: ClassVar[Accountant] = "rdp"

    clip: float
    delta: float = 1e-5
    epsilon: float | None = None
    noise: float | None = None
    bits: Literal[16, 32] = 16
    overflow: float = 1e-6
    start_share: float = 0.5
    start_clip: float = 0.5
    feature_norm: float = 1.0

    def __post_init__(self) -> None:
        check(self)
        check_norm("DistributedDP.clip", self.clip)
        if self.bits not in (16, 32):
            raise BadInput(f"DistributedDP.bits must be 16 or 32, got {self.bits}")
        if not 1e-15 <= self.overflow <= 0.5:
            raise BadInput(f"DistributedDP.overflow must be from 1e-15 to 0.5, got {self.overflow}")

    @property
    def whole(self) -> Literal[16, 32]:
        return self.bits

    def check(self, scheme: Scheme) -> None:
        if scheme not in ("all", "fixed"):
            raise UnsoundCombination(
                "a share of the noise of DistributedDP is made for a sum over a number of sites that is known before; "
                "use All() or Fixed() sampling"
            )

    def relation(self, scheme: Scheme) -> Relation:
        return "replace_special"

    def begin(self, population: Population, size: int, before: Sequence[Release], start: bool) -> PrivacyState:
        noise, zeroth = _multipliers(self, population.rounds, start)
        cohort = round(population.cohort)
        self._form(size, self.clip, noise, cohort, population.honest)  # whether there is one
        return PrivacyState(noise=noise, norm=self.clip, start=start, start_noise=zeroth, cohort=cohort, turn=1)

    def shared(self, state: PrivacyState) -> Tensors:
        """What sites are told: nothing of it says how much noise they add but how many rounds and sites it is for."""
        told = {SITES: state.sites, COHORT: state.cohort, ROUNDS: state.rounds, START: state.start, TURN: state.turn}
        return {name: torch.tensor(int(value), dtype=torch.int64) for name, value in told.items()}

    def steps(self, work: Work, told: Tensors) -> None:
        return None

    def start_noise(self, told: Tensors) -> float:
        return self._told(told)[1]

    def starting(self, told: Tensors, honest: int) -> Callable[[int], Discretisation]:
        return lambda size: self._form(size, 1.0, self.start_noise(told), told_number(told, SITES), honest)

    def on_site(self, update: Update, work: Work, told: Tensors, noise: Noise) -> Update:
        """Whole numbers in float64, with weight 1 and without the site's other numbers."""
        values, _ = clipped(update.values.vector, self.clip)
        form = self._form(len(values), self.clip, self._told(told)[0], told_number(told, COHORT), work.honest)
        whole = form.at_site(values, noise, told_number(told, TURN))
        return replace(update, values=update.values.like(whole), weight=1.0, sums={})

    def on_total(
        self, total: Update, state: PrivacyState, population: Population, noise: Noise
    ) -> tuple[Update, PrivacyState]:
        """The mean over the sites that are in the sum, and the state of the next round."""
        whole = (total.values.vector * total.weight).round()
        form = self._form(len(whole), self.clip, state.noise, state.cohort, population.honest)
        mean = form.decoded(whole, state.turn).div_(total.weight).float()
        return replace(total, values=total.values.like(mean)), replace(state, turn=state.turn + 1)

    def event_at_site(self, work: Work, told: Tensors) -> Event:
        return event(self._told(told)[0])

    def event(self, state: PrivacyState, population: Population, round: int, again: bool) -> Event:
        """Nothing beyond what the sites let out."""
        return no_op()

    def _told(self, told: Tensors) -> tuple[float, float]:
        """The multipliers, which a site works out for itself."""
        return _multipliers(self, told_number(told, ROUNDS), bool(told_number(told, START)))

    def _form(self, size: int, norm: float, noise: float, cohort: int, honest: int) -> Discretisation:
        return _discretisation(size, norm, noise, cohort, honest, self.bits, self.overflow)


def event(noise: float) -> Event:
    """That of a sum whose noise is worth that of a Gaussian mechanism with this multiplier: rho = 1 / (2 noise^2)."""
    return concentrated(1 / (2 * noise**2))


@lru_cache(maxsize=64)
def _multipliers(guarantee: DistributedDP, rounds: int, start: bool) -> tuple[float, float]:
    return solved(guarantee, event, "replace_special", rounds, (), start)


@lru_cache(maxsize=64)  # all sites of a round have the same
def _discretisation(
    size: int, norm: float, noise: float, cohort: int, honest: int, bits: Literal[16, 32], overflow: float
) -> Discretisation:
    return discretisation(
        size=size, norm=norm, multiplier=noise, cohort=cohort, honest=honest, bits=bits, overflow=overflow
    )
