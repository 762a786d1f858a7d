"""Who is asked in which round, as far as a guarantee depends on it."""

from dataclasses import dataclass
from typing import Literal

from fedelta.core.errors import BadInput

Scheme = Literal["all", "poisson", "fixed", "cyclic"]


@dataclass(frozen=True, kw_only=True)
class Population:
    """The registered sites, and how those of a round are chosen among them.

    `scheme` is "all" (every site, every round), "poisson" (each by itself with probability `share`), "fixed" (a share
    of exactly that size, anew in each round) or "cyclic" (1 / `share` groups in turn). `honest` are the fewest sites
    whose noise is in what a coordinator gets to see of a round.
    """

    sites: int
    rounds: int
    scheme: Scheme
    share: float = 1.0  # in (0, 1]: of the sites that a round is expected to ask
    honest: int = 1

    def __post_init__(self) -> None:
        if self.sites < 1 or self.rounds < 0 or not 0 < self.share <= 1:
            raise BadInput(f"not a population: {self}")

    @property
    def cohort(self) -> float:
        """The expected number of sites in a round; what sums are divided by, since the actual one is data."""
        return self.share * self.sites

    @property
    def participations(self) -> int:
        """How often a site takes part at most."""
        return -(-self.rounds // self.separation)

    @property
    def separation(self) -> int:
        """The least number of rounds from one in which a site takes part to the next."""
        return round(1 / self.share) if self.scheme == "cyclic" else 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a site does in one round, as far as it is public."""

    rows: int
    rate: float  # with which a row is in a step's batch, in (0, 1]
    steps: int
    honest: int = 1  # sites, as `Population.honest`
