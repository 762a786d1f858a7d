"""Statistics with differential privacy for each row, from one sum with noise of the sites' own.

Every row adds to a vector of whole numbers: 4096 to the number of rows; for each column 4096 to one of the counts of
missing values, of values in each bin, and below and above the range (or in each category); and, for a number within
the range that lies at u in [-1, 1] of it, 2896 u and 2896 (1 - u^2), cut to whole numbers towards 0. As
u^2 + (1 - u^2)^2 is at most 1, and 2 * 2896^2 at most 4096^2, a row moves the vector by at most
4096 sqrt(1 + C + N / 2) with C columns, N of them of numbers (L2 norm). Data sets that differ in having a row or not
(add or remove one) are hidden to that.

Each site adds discrete Gaussian noise to its vector before it leaves: a share, so that the shares of the fewest honest
sites in whatever the coordinator sees are enough (privacy/discrete_gaussian.py). The sum is released once. All that is
told of it is computed from it: mean and variance from the two sums, quantiles from the histogram, linearly within bins.

Why a histogram and not bisection: bisection asks for each quantile some ten counts, and each would cost as much as the
whole histogram does, which has no more than 1 for a row in all of its bins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.grid import Terms
from fedelta.core.noise import Noise
from fedelta.core.release import Budget, Relation, Release
from fedelta.privacy.accounting import noise_multiplier
from fedelta.privacy.discrete_gaussian import MOST_VARIANCE, concentrated, discrete_gaussian, exact_variance
from fedelta.privacy.events import concentrated as event
from fedelta.statistics.columns import Category, Column, Number
from fedelta.statistics.grid import before
from fedelta.statistics.search import Bins, Quantile
from fedelta.statistics.summary import CategorySummary, NumberSummary

RELATION: Relation = "add_or_remove_one"
BOUND = 2.0**50  # of a number in a vector: 2^31 rows of 4096, and noise
_ONE = 4096  # for a row in a count
_PART = 2896  # for sums of u and of 1 - u^2: 4096 / sqrt(2), rounded down
_CLOSER = 1.001  # steps in which noise is enlarged until it hides enough

Whole = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """What rows add to, for these columns, with so many bins each."""

    columns: tuple[Column, ...]
    bins: int

    @property
    def size(self) -> int:
        return 1 + sum(self._length(column) for column in self.columns)

    @property
    def distance(self) -> float:
        """The most that one row adds, as an L2 norm."""
        numbers = sum(isinstance(column, Number) for column in self.columns)
        return math.sqrt(_ONE**2 * (1 + len(self.columns)) + _PART**2 * numbers)

    def of(self, rows: Examples) -> Whole:
        """What all rows of a site add up to."""
        parts = [np.array([_ONE * len(rows)], dtype=np.int64)]
        for column in self.columns:
            values = rows.inputs[column.name].numpy()
            parts.append(self._number(column, values) if isinstance(column, Number) else _category(column, values))
        return np.concatenate(parts)

    def edges(self, column: Number) -> npt.NDArray[np.float64]:
        low, high = _range(column)
        width = (high - low) / self.bins
        return np.array([low, *(low + place * width for place in range(1, self.bins)), high])

    def read(self, total: Tensor, variance: float, quantiles: Sequence[float]) -> "Read":
        """What a sum says of all rows; `variance` is that of the noise in it."""
        values, deviation = total.round().numpy(), math.sqrt(variance) / _ONE
        found: list[NumberSummary | CategorySummary] = []
        start = 1
        for column in self.columns:
            own = values[start : start + self._length(column)]
            start += len(own)
            if isinstance(column, Number):
                known = self._summary(column, values[0] / _ONE, own, deviation)
                edges, counts = self.edges(column), own[2:-3] / _ONE
                found.append(replace(known, quantiles=_quantiles(edges, counts, quantiles)))
            else:
                found.append(_categories(column, own / _ONE))
        return Read(rows=float(values[0] / _ONE), columns=tuple(found), deviation=deviation)

    def _length(self, column: Column) -> int:
        return self.bins + 5 if isinstance(column, Number) else len(column.values) + 2

    def _number(self, column: Number, values: npt.NDArray[np.float64]) -> Whole:
        """Missing, below, each bin, above, and the two sums."""
        low, high = _range(column)
        edges = self.edges(column)
        present = values[~np.isnan(values)]
        upto = np.array([(present <= edge).sum() for edge in (before(low), *map(before, edges[1:-1]), high)])
        within = present[(present >= low) & (present <= high)]
        u = np.clip((within - low) / (high - low) * 2 - 1, -1, 1)
        sums = [int(np.trunc(_PART * part).sum()) for part in (u, 1 - u * u)]
        counts = [len(values) - len(present), upto[0], *np.diff(upto), len(present) - upto[-1]]
        return np.array([*(_ONE * int(count) for count in counts), *sums], dtype=np.int64)

    def _summary(self, column: Number, rows: float, own: npt.NDArray[np.float64], deviation: float) -> NumberSummary:
        low, high = _range(column)
        half = (high - low) / 2
        missing, below, *within, above = (own[:-2] / _ONE).tolist()
        sums = (own[-2:] / _PART).tolist()
        n = rows - missing - below - above
        mean = variance = None
        error = 0.0
        if n >= 1:
            u = min(max(sums[0] / n, -1.0), 1.0)
            mean = low + half * (1 + u)
            error = half / n * math.sqrt((_ONE / _PART) ** 2 + 4 * u * u) * deviation  # n is made of four counts
            spread = max(0.0, 1 - sums[1] / n - u * u)
            variance = half**2 * spread * n / (n - 1) if n > 1 else None
        return NumberSummary(
            name=column.name,
            missing=missing,
            below=below,
            above=above,
            within=n,
            low=low,
            high=high,
            mean=mean,
            variance=variance,
            mean_noise=error,
            bins=Bins(edges=tuple(self.edges(column).tolist()), counts=tuple(within)),
        )


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a noisy sum says; `deviation` is the standard deviation of each count."""

    rows: float
    columns: tuple[NumberSummary | CategorySummary, ...]
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """The noise of one site, where `honest` sites' shares hide a row with `rho`-zero-concentrated privacy."""

    variance: Fraction
    rho: float


def share(vectors: Vectors, honest: int, rho: float) -> Share:
    """The least noise of which that many shares have at most `rho`. Raises BadInput where it is out of range."""
    if honest < 1:
        raise BadInput("no honest site is sure to be in a sum, so that no noise is; ask more sites")
    wanted = max(0.25, vectors.distance**2 / (2 * rho * honest))
    while True:
        if wanted > MOST_VARIANCE:
            raise BadInput(
                f"so small an epsilon needs noise of standard deviation {math.sqrt(wanted) / _ONE:,.0f} at each site "
                f"on each count, and there is room for {math.sqrt(MOST_VARIANCE) / _ONE:,.0f}; raise epsilon, or look "
                "at fewer columns"
            )
        variance = exact_variance(wanted)
        epsilon = concentrated(distance=vectors.distance, size=vectors.size, variance=float(variance), count=honest)
        if epsilon**2 / 2 <= rho:
            return Share(variance=variance, rho=epsilon**2 / 2)
        wanted = float(variance) * _CLOSER


def most(budget: Budget, before: Sequence[Release]) -> float:
    """The rho that the budget has left. Raises BudgetSpent where it has none, BadInput where no noise keeps it."""
    try:
        noise = noise_multiplier(lambda z: event(0.5 / z**2), RELATION, budget, unit="example", before=before)
    except BadInput:  # whose cure is one for training
        raise BadInput(
            f"no noise for which there is room keeps epsilon {budget.epsilon:g} at delta {budget.delta:g}; raise "
            "epsilon"
        ) from None
    return 0.5 / noise**2


def release(found: Share, round: int, job: str, of: str | None = None) -> Release:
    return Release(event=event(found.rho), unit="example", relation=RELATION, of=of, job=job, round=round)


def noisy(vectors: Vectors, rows: Examples, variance: Fraction, noise: Noise) -> Tensor:
    """A site's vector as it may leave."""
    own = torch.from_numpy(vectors.of(rows))
    return (own + discrete_gaussian(noise, len(own), variance)).double()


def terms(asked: int) -> Terms:
    """Of a sum over so many sites, for which the noise was made."""
    return Terms(bound=BOUND, weight_bound=1.0, asked=asked)


def _range(column: Number) -> tuple[float, float]:
    assert column.low is not None
    assert column.high is not None
    return column.low, column.high


def _category(column: Category, values: npt.NDArray[np.int64]) -> Whole:
    """Missing, each value, all others."""
    counts = np.bincount(values + 1, minlength=len(column.values) + 2)
    return _ONE * counts.astype(np.int64)


def _categories(column: Category, counts: npt.NDArray[np.float64]) -> CategorySummary:
    missing, *known, other = counts.tolist()
    return CategorySummary(
        name=column.name, missing=missing, counts=dict(zip(column.values, known, strict=True)), other=other
    )


def _quantiles(
    edges: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], quantiles: Sequence[float]
) -> dict[float, Quantile]:
    """Where the cumulated counts, made to rise by the nearest that does (least squares), pass q of the last one."""
    from scipy.optimize import isotonic_regression

    upto = isotonic_regression(np.concatenate([[0.0], np.cumsum(counts)])).x
    found = {}
    for q in quantiles:
        wanted = upto[0] + q * (upto[-1] - upto[0])
        if not upto[-1] > upto[0]:
            continue
        place = min(max(int(np.searchsorted(upto, wanted, side="left")), 1), len(counts))
        step = upto[place] - upto[place - 1]
        part = (wanted - upto[place - 1]) / step if step > 0 else 1.0
        low, high = float(edges[place - 1]), float(edges[place])
        found[q] = Quantile(low=low, high=low + part * (high - low), exact=False)
    return found
