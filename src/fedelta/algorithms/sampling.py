"""Who takes part in a round.

Every choice is a function of (seed, round), so a run that is resumed asks the same sites. Limits: where a privacy
guarantee relies on nobody knowing who was chosen, the choice must not be reproducible, and needs the randomness of the
operating system instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedelta.core.errors import BadInput
from fedelta.core.messages import PartyId
from fedelta.core.seeds import generator


class Sampling(Protocol):
    """The cohort of a round, as a subset of the registered sites."""

    def __call__(self, parties: Sequence[PartyId], round: int, seed: int) -> list[PartyId]:
        """Some of `parties`, in their order."""
        ...


@dataclass(frozen=True, kw_only=True)
class All:
    """Every site, every round."""

    def __call__(self, parties: Sequence[PartyId], round: int, seed: int) -> list[PartyId]:
        return list(parties)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """`size` sites, uniformly and without replacement."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"Fixed.size must be at least 1, got {self.size}")

    def __call__(self, parties: Sequence[PartyId], round: int, seed: int) -> list[PartyId]:
        if self.size > len(parties):
            raise BadInput(
                f"{self.size} sites a round were asked for and only {len(parties)} are registered; ask fewer"
            )
        if self.size == len(parties):
            return list(parties)
        chosen = torch.randperm(len(parties), generator=generator(seed, "sampling", round))[: self.size]
        return [parties[i] for i in sorted(chosen.tolist())]


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Each site by itself with probability `rate`, in (0, 1]; the cohort may be empty."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise BadInput(f"Poisson.rate must be in (0, 1], got {self.rate}")

    def __call__(self, parties: Sequence[PartyId], round: int, seed: int) -> list[PartyId]:
        draws = torch.rand(len(parties), generator=generator(seed, "sampling", round), dtype=torch.float64)
        return [party for party, draw in zip(parties, draws.tolist(), strict=True) if draw < self.rate]


@dataclass(frozen=True, kw_only=True)
class Cyclic:
    """Sites in turn: the seed deals them into `groups` groups, as equal as can be, and round r asks group r mod groups.

    A site is asked every `groups` rounds, so at most ceil(rounds / groups) times. That is what noise that is correlated
    across rounds needs (`privacy/matrix_noise.py`). It amplifies no guarantee: whoever knows the seed knows who is
    asked when. Limits: the groups are those of one seed and one set of sites. With another seed, or when a site joins
    or leaves, all are dealt anew, and two turns of a site may be closer to each other.
    """

    groups: int

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise BadInput(f"Cyclic.groups must be at least 1, got {self.groups}")

    def __call__(self, parties: Sequence[PartyId], round: int, seed: int) -> list[PartyId]:
        if self.groups > len(parties):
            raise BadInput(
                f"{self.groups} groups were asked for and only {len(parties)} sites are registered; ask for fewer"
            )
        places = torch.randperm(len(parties), generator=generator(seed, "sampling", "groups")).tolist()
        # by name, so that it does not matter in which order they registered
        group = {party: place % self.groups for party, place in zip(sorted(parties), places, strict=True)}
        return [party for party in parties if group[party] == round % self.groups]
