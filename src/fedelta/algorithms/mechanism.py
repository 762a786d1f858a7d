"""What a federation asks of a mechanism, and the population that its sampling makes of the registered sites."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from fedelta.algorithms.sampling import All, Cyclic, Fixed, Poisson, Sampling
from fedelta.core.errors import BadInput, UnsoundCombination
from fedelta.core.messages import Plain, Tensors, Update
from fedelta.core.noise import Noise
from fedelta.core.release import Relation, Release
from fedelta.privacy.guarantee import Guarantee, PrivacyState
from fedelta.privacy.population import Population, Scheme, Work

if TYPE_CHECKING:
    from fedelta.privacy.discretisation import Discretisation

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
    def whole(self) -> Literal[16, 32] | None:
        """Where a site's noise does no more than its share in a sum: bits of the integers that are added; else None."""
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

    def starting(self, told: Tensors, honest: int) -> Callable[[int], "Discretisation"] | None:
        """Where `whole`: how a vector of so many numbers, of norm 1 at most, leaves in round zero."""
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
            if sampling.size > sites:
                raise BadInput(f"{sampling} asks for more sites than the {sites} that are registered; ask fewer")
            share = sampling.size / sites
        case Cyclic():
            share = 1 / sampling.groups
    return Population(sites=sites, rounds=rounds, scheme=scheme(sampling), share=share)
