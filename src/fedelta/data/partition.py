"""Partitioners: which rows of a pooled data set each site gets in a simulation.

Sources: IID and label shards after McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data" (AISTATS 2017, section 3); label skew by Dirichlet as in Yurochkin et al., "Bayesian Nonparametric
Federated Learning of Neural Networks" (ICML 2019, section 4), an idea that Hsu et al. 2019 (arXiv:1909.06335) share.

Limits: Hsu et al. draw one mixture of classes per site, all sites of one size; here each class is spread over the
sites, so that sizes differ too and every row is used exactly once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fedelta.core.errors import BadInput
from fedelta.core.seeds import derive
from fedelta.data.names import grouped

if TYPE_CHECKING:
    from fedelta.data.names import Column

Rows = npt.NDArray[np.int64]

_DRAWS = 1000  # of a random partition, before a minimum counts as out of reach
_LARGEST_ALPHA = 1e9  # beyond it NumPy's gamma variates may overflow; the shares are equal long before


class Partitioner(Protocol):
    """Deals n rows to sites."""

    def __call__(self, labels: npt.ArrayLike, sites: int, seed: int) -> list[Rows]:
        """Sorted row indices, one array per site; every row of 0..n-1 is in exactly one, and no site is empty.

        `labels[n]` are the rows' classes, integers or strings; partitioners that ignore classes use only their number.
        Equal arguments give equal rows. Raises BadInput if there are fewer rows than sites, or a label is missing.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IID:
    """Rows at random; sizes differ by at most one."""

    def __call__(self, labels: npt.ArrayLike, sites: int, seed: int) -> list[Rows]:
        count = len(_checked(labels, sites))
        order = _random(seed, "iid").permutation(count)
        return [_sorted(part) for part in np.array_split(order, sites)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dirichlet:
    """Label skew: the rows of each class are spread over the sites in proportions drawn from Dirichlet(alpha).

    alpha in (0, 1e9]: near 0 a class is at one site, large values tend to IID. The whole draw is repeated until every
    site has at least `minimum` rows (>= 1).
    """

    alpha: float
    minimum: int = 1

    def __post_init__(self) -> None:
        _check_alpha_and_minimum(self)

    def __call__(self, labels: npt.ArrayLike, sites: int, seed: int) -> list[Rows]:
        values = _checked(labels, sites)
        if values.dtype.kind == "f" and not (values == np.floor(values)).all():
            raise BadInput(
                "Dirichlet deals out classes, and these labels have fractions; use Quantity(), Shards() or IID()"
            )
        _check_enough(self, len(values), sites)
        classes, sizes = np.unique(values, return_inverse=True, return_counts=True)[1:]
        random = _random(seed, "dirichlet")
        best = 0
        for _ in range(_DRAWS):
            counts = np.stack([_spread(int(size), self.alpha, sites, random) for size in sizes])
            best = max(best, smallest := int(counts.sum(axis=0).min()))
            if smallest >= self.minimum:
                return _deal(classes, counts, random)
        raise _out_of_reach(self, sites, best)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Label skew: sort by label, cut into sites * per_site equal shards, deal `per_site` (>= 1) of them to each site.

    Shard sizes differ by at most one. A shard that lies across the border of two classes holds both, so a site may see
    more than `per_site` classes.
    """

    per_site: int = 2

    def __post_init__(self) -> None:
        if self.per_site < 1:
            raise BadInput(f"Shards.per_site must be >= 1, got {self.per_site}")

    def __call__(self, labels: npt.ArrayLike, sites: int, seed: int) -> list[Rows]:
        values = _checked(labels, sites)
        shards = sites * self.per_site
        if shards > len(values):
            raise BadInput(
                f"{sites} sites with {self.per_site} shards each need at least {shards} rows, got {len(values)}; "
                "use fewer sites or shards"
            )
        random = _random(seed, "shards")
        shuffled = random.permutation(len(values))
        by_label = shuffled[np.argsort(values[shuffled], kind="stable")]
        pieces = np.array_split(by_label, shards)
        dealt = random.permutation(shards).reshape(sites, self.per_site)
        return [_sorted(np.concatenate([pieces[shard] for shard in own])) for own in dealt]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """Quantity skew: the sites' shares of all rows are drawn from Dirichlet(alpha), and their rows are IID.

    alpha in (0, 1e9]; redrawn until every site has at least `minimum` rows (>= 1).
    """

    alpha: float
    minimum: int = 1

    def __post_init__(self) -> None:
        _check_alpha_and_minimum(self)

    def __call__(self, labels: npt.ArrayLike, sites: int, seed: int) -> list[Rows]:
        count = len(_checked(labels, sites))
        _check_enough(self, count, sites)
        random = _random(seed, "quantity")
        best = 0
        for _ in range(_DRAWS):
            sizes = _spread(count, self.alpha, sites, random)
            best = max(best, smallest := int(sizes.min()))
            if smallest >= self.minimum:
                return _deal(np.zeros(count, dtype=np.int64), sizes[None], random)
        raise _out_of_reach(self, sites, best)


def by_column(values: "Column") -> dict[str, Rows]:
    """Natural sites: the sorted rows of each distinct value, under its name, names in sorted order.

    `values` is a column: a list, an array, a tensor or a pandas series; 3 and 3.0 are both named "3". Raises BadInput
    if it is empty or a value is missing (None, NaN or blank).
    """
    codes, names = grouped(values)
    if not len(codes):
        raise BadInput("there are no rows to split into sites")
    missing = np.flatnonzero(codes < 0)
    if len(missing):
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        rows = "row" if len(missing) == 1 else "rows"
        raise BadInput(
            f"{len(missing)} of {len(codes)} rows name no site ({rows} {shown}, counted from 0); "
            "fill them in or drop them"
        )
    order = np.argsort(codes, kind="stable")
    pieces = np.split(order, np.cumsum(np.bincount(codes, minlength=len(names)))[:-1])
    return {name: _sorted(piece) for name, piece in sorted(zip(names, pieces, strict=True))}


def _checked(labels: npt.ArrayLike, sites: int) -> npt.NDArray[Any]:
    """`labels` as a 1-D array that np.unique can sort, with at least one row per site."""
    values = np.asarray(labels)
    if values.ndim != 1:
        raise BadInput(f"labels have one dimension, got shape {values.shape}")
    if sites < 1:
        raise BadInput(f"the number of sites must be >= 1, got {sites}")
    if len(values) == 0:
        raise BadInput("there are no rows to split among sites")
    if sites > len(values):
        raise BadInput(f"{sites} sites cannot share {len(values)} rows; use at most {len(values)} sites")
    if values.dtype.kind in "Of":
        import pandas

        missing = np.flatnonzero(pandas.isna(values))
        if len(missing):
            raise BadInput(f"{len(missing)} labels are missing, the first in row {missing[0]} (counted from 0)")
    return values.astype(str) if values.dtype.kind == "O" else values


def _check_alpha_and_minimum(part: Dirichlet | Quantity) -> None:
    name = type(part).__name__
    if not 0 < part.alpha <= _LARGEST_ALPHA:
        raise BadInput(f"{name}.alpha must be > 0 and <= {_LARGEST_ALPHA:g}, got {part.alpha}")
    if part.minimum < 1:
        raise BadInput(f"{name}.minimum must be >= 1, got {part.minimum}")


def _check_enough(part: Dirichlet | Quantity, count: int, sites: int) -> None:
    if part.minimum * sites > count:
        raise BadInput(
            f"{sites} sites with at least {part.minimum} rows each need {part.minimum * sites} rows, got {count}; "
            "use fewer sites or a smaller minimum"
        )


def _out_of_reach(part: Dirichlet | Quantity, sites: int, best: int) -> BadInput:
    return BadInput(
        f"{_DRAWS} draws of {part} gave no partition with {part.minimum} rows at each of {sites} sites "
        f"(the best left one with {best}); use a larger alpha, a smaller minimum or fewer sites"
    )


def _spread(count: int, alpha: float, sites: int, random: np.random.Generator) -> Rows:
    """`count` rows over the sites in Dirichlet(alpha) proportions, as integers that add up to `count`."""
    shares = random.dirichlet(np.full(sites, alpha))
    # The running sum is rounded in a random order of the sites: in a fixed one, rounding favours the same sites for
    # every class.
    order = random.permutation(sites)
    ends = np.rint(np.cumsum(shares[order]) * count).astype(np.int64)
    ends[-1] = count
    counts = np.empty(sites, dtype=np.int64)
    counts[order] = np.diff(np.minimum(ends, count), prepend=0)
    return counts


def _deal(classes: Rows, counts: Rows, random: np.random.Generator) -> list[Rows]:
    """Random rows of each class: `counts[c, k]` of class c to site k."""
    piles: list[list[Rows]] = [[] for _ in range(counts.shape[1])]
    for label, per_site in enumerate(counts):
        rows = random.permutation(np.flatnonzero(classes == label))
        for pile, piece in zip(piles, np.split(rows, np.cumsum(per_site)[:-1]), strict=True):
            pile.append(piece)
    return [_sorted(np.concatenate(pile)) for pile in piles]


def _sorted(rows: npt.NDArray[Any]) -> Rows:
    return np.sort(rows).astype(np.int64, copy=False)


def _random(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(derive(seed, "partition", purpose))
