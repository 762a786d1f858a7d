"""Who masks with whom: how many neighbours each site draws, and how many of their shares unmask it.

The graph of SecAgg+ (Bell et al., "Secure single-server aggregation with (poly)logarithmic overhead", CCS 2020) in its
variant against a malicious coordinator: each site draws k outgoing neighbours uniformly from the others once the list
of all keys is fixed, shares its secrets among them with threshold t, and masks with them and with those that drew it.

What k and t are for. A group of honest sites is unmasked apart from the rest if no mask with others stays on it. For
each site i of it, t outgoing neighbours have given their shares of i's own mask. An honest one does that only as a
survivor, and only if i has signed that it was told of the very sites that it was told of itself (protocol_site.py): so
i has a mask with it, which stays, as nobody reveals the masking key of a survivor. Hence t outgoing neighbours of i are
of the group or corrupt. Shapes make that too unlikely for every group of up to a third of the sites.

What differs from the paper: tails of the hypergeometric distribution are summed term by term instead of bounded; the
smallest sum promised is of a third of the sites, there of a share that is chosen; a quorum of all sites signs the
survivors, which every site checks.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedelta.core.errors import BadInput

COMPLETE = 64  # sites up to which everybody is everybody's neighbour
SECURITY = 40  # -log2 of the chance that some group of sites can be cut off and unmasked
FAILURE = 30  # -log2 of the chance that dropouts leave some site with too few shares
_SECRET = -SECURITY * math.log(2)


@dataclass(frozen=True)
class Shape:
    """Each site has `neighbours` outgoing neighbours (k); the shares of `threshold` (t) of them unmask it."""

    neighbours: int
    threshold: int

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= self.neighbours:
            raise BadInput(f"a threshold must be from 1 to the number of neighbours, got {self}")


def quorum(sites: int) -> int:
    """How many of the `sites` that were asked must be in a sum: two sets of so many share more than a third of them."""
    return 2 * sites // 3 + 1


def shape(sites: int, colluding: float, dropouts: float, *, listed: int | None = None) -> Shape:
    """The shape of the graph among the `listed` of `sites` that sent keys (None: all of them did).

    `colluding` is the share of `sites` that act with the coordinator, `dropouts` the share whose loss at random, at any
    step, must not cost the sum; both from 0 to 1, rounded down to a count (0.29 of 100 is 29). Up to `COMPLETE` listed
    sites, and where no sparser graph will do, everybody is everybody's neighbour. Otherwise k is the least that will
    do, and t the most that the dropouts allow. Raises BadInput for numbers out of range or where no graph bears both.
    """
    listed = sites if listed is None else listed
    if not 2 <= listed <= sites:
        raise BadInput(f"a secure sum takes 2 sites at least, and no more than were asked, got {listed} of {sites}")
    corrupt, lost = count("colluding", colluding, sites), count("dropouts", dropouts, sites)
    if corrupt >= 2 * quorum(sites) - sites:  # then two sets could both be signed by a quorum
        most = 2 * quorum(sites) - sites - 1
        raise BadInput(f"a sum of {sites} sites bears {most} that collude at most, got {corrupt}; lower colluding")
    if lost > sites - quorum(sites):
        most = sites - quorum(sites)
        raise BadInput(f"a sum of {sites} sites bears the loss of {most} at most, got {lost}; lower dropouts")
    return _shape(sites, listed, corrupt, max(0, lost - (sites - listed)))


@lru_cache(maxsize=1024)  # every site of a simulation asks the same
def _shape(sites: int, listed: int, corrupt: int, lost: int) -> Shape:
    if listed > COMPLETE:
        tails = _Tails(sites, listed, corrupt, lost)
        threshold = 0
        for neighbours in range(1, listed - 1):
            threshold += tails.correct(neighbours, threshold + 1)  # one neighbour more allows one more at most
            if tails.secret(neighbours, threshold):
                return Shape(neighbours, threshold)
    return _complete(sites, listed, corrupt, lost)


def _complete(sites: int, listed: int, corrupt: int, lost: int) -> Shape:
    """Everybody is everybody's neighbour; what holds, holds for certain.

    Of a quorum of survivors each has all others left: so many have to be enough. t > corrupt: a group that is cut off
    and unmasked makes up, with the corrupt, a quorum.
    """
    neighbours = listed - 1
    threshold = min(neighbours, quorum(sites) - 1)
    if threshold <= corrupt:
        raise BadInput(
            f"no graph among {listed} of {sites} sites bears {corrupt} that collude and the loss of {lost}; "
            "lower colluding or dropouts, or ask more sites"
        )
    return Shape(neighbours, threshold)


class _Tails:
    """What goes wrong by chance for k and t, with logarithms of factorials taken once.

    Tails are sums of all their terms in float64, in the log domain; `slack` is more than the logarithm of one can be
    wrong by, and always counts against the shape.
    """

    def __init__(self, sites: int, listed: int, corrupt: int, lost: int) -> None:
        self.listed, self.corrupt, self.lost = listed, corrupt, lost
        self.largest = min(sites // 3, listed)  # of the groups that must not be cut off
        self.factorials = np.array([math.lgamma(number + 1) for number in range(listed + 1)])
        self.slack = 2.0**-46 * float(self.factorials[-1])

    def correct(self, neighbours: int, threshold: int) -> bool:
        """Whether it is unlikely that dropouts leave some site with fewer than t of its outgoing neighbours.

        n P[Hypergeometric(n - 1 others, `lost` marked, k drawn) >= k - t + 1] <= 2^-30: a union bound over the sites.
        """
        chance = _total(self._terms(np.array([self.lost]), neighbours, neighbours - threshold + 1)[0])
        return chance + math.log(self.listed) + self.slack <= -FAILURE * math.log(2)

    def secret(self, neighbours: int, threshold: int) -> bool:
        """Whether it is unlikely that some group of up to a third of the sites can be cut off and unmasked.

        That takes, for each of the s in the group, t outgoing neighbours that are of the group or corrupt, that is
        among `corrupt` + s - 1 of the n - 1 others. All draw independently. The sum over s of
        C(n, s) P[Hypergeometric(n - 1, corrupt + s - 1, k) >= t]^s, a union bound over the groups, must be <= 2^-40.
        """
        sizes = np.arange(1, self.largest + 1)
        few = sizes[np.geomspace(1, sizes.size, 16).astype(int) - 1]  # most k fail with some of these already
        if threshold < 1 or any(
            _total(self._groups(part, neighbours, threshold)) > _SECRET for part in (few[::-15], np.unique(few))
        ):
            return False
        rows = max(1, 2**18 // neighbours)  # at a time, so that memory does not grow with the sites
        parts = [sizes[start : start + rows] for start in range(0, sizes.size, rows)]
        return _total(np.concatenate([self._groups(part, neighbours, threshold) for part in parts])) <= _SECRET

    def _groups(self, sizes: NDArray[np.int64], neighbours: int, threshold: int) -> NDArray[np.float64]:
        """ln C(n, s) P[...]^s, rounded up, for each size s."""
        factorials = self.factorials
        ways = factorials[self.listed] - factorials[sizes] - factorials[self.listed - sizes]
        marked = np.minimum(self.corrupt + sizes - 1, self.listed - 1)
        tails = np.logaddexp.reduce(self._terms(marked, neighbours, threshold), axis=1)
        return np.asarray(ways + self.slack + sizes * np.minimum(tails + self.slack, 0.0))

    def _terms(self, marked: NDArray[np.int64], neighbours: int, least: int) -> NDArray[np.float64]:
        """ln P[Hypergeometric(n - 1, marked, k) = x] for each of `marked` (rows) and x from `least` to k (columns)."""
        others, factorials = self.listed - 1, self.factorials
        hits, rows = np.arange(least, neighbours + 1)[None, :], marked[:, None]
        misses, spared = neighbours - hits, others - rows
        possible = (hits <= rows) & (misses <= spared)
        ways = factorials[rows] - factorials[hits] - factorials[np.where(possible, rows - hits, 0)]
        ways = ways + factorials[spared] - factorials[misses] - factorials[np.where(possible, spared - misses, 0)]
        every = factorials[others] - factorials[neighbours] - factorials[others - neighbours]
        return np.where(possible, ways - every, -np.inf)


def count(name: str, share: float, sites: int) -> int:
    """`share` of `sites`, rounded down; the share is taken as its decimals say, not as the float below or above."""
    if not 0 <= share <= 1:
        raise BadInput(f"{name} must be from 0 to 1, got {share}")
    return math.floor(Fraction(str(share)) * sites)


def _total(logarithms: NDArray[np.float64]) -> float:
    return float(np.logaddexp.reduce(logarithms))
