"""What is known of a column of numbers, and what to ask next: its range, its histogram, its mean, its quantiles.

All questions are of one form: how many values are at most t, for public thresholds t, and with a public centre c the
sums of x - c and of (x - c)^2 over the values within the range. A search is a value: `after` gives the next one.

1. range: where none is given, thresholds are the powers of ten; then decimal steps within what was found, a few times,
   until the range is that of the values to a few of its steps. The smallest and the largest value stay between two
   steps.
2. histogram: about as many bins as asked, [a, b) as numpy.histogram has them, the last one with its upper end; where
   all values lie on a decimal grid with few points in the range, a count for each point. Sums around the middle of the
   range give the mean.
3. quantiles: bisection between the edges of the bin where each lies. With the first thresholds go sums around the mean,
   which give the variance, and the mean to the last digit.

A quantile q of n values is the smallest value whose rank is at least q n ("inverted_cdf" in numpy). It is found exactly
where all values have at most 4 digits after the point (and the range no more than 2^32 such numbers); otherwise up to a
step which is at most `precision` times the range.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Literal

from fedelta.core.errors import BadTensors
from fedelta.statistics.columns import Number
from fedelta.statistics.grid import DECIMALS, LADDER, Step, before

_ZOOMS = 6  # at most: each takes a range to a 40th of itself, if need be
_STEPS = 40  # within a range that is looked for
_POINTS = 32  # of a decimal grid, for a histogram with a bin for each
_MOST_POINTS = 2**32  # of a decimal grid, for quantiles to be looked for on it
_SLACK = 1e-9  # of sums, for what rounding adds to them


@dataclass(frozen=True, kw_only=True)
class Question:
    thresholds: tuple[float, ...] = ()
    low: float = 0.0  # of the values that are summed
    high: float = 0.0
    centre: float = 0.0
    width: float = 0.0  # a power of two, by which sums are divided; 0: none are asked for


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Values from edges[i] to below edges[i + 1], or to the last edge itself; with `points` they are the edges."""

    edges: tuple[float, ...]  # one more than counts, unless they are points
    counts: tuple[float, ...]  # whole, unless noised
    points: bool = False


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """A quantile is above `low` and at most `high`, which is the value itself where it is `exact`."""

    low: float
    high: float
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How finely columns are looked at."""

    bins: int
    quantiles: tuple[float, ...]
    precision: float


@dataclass(frozen=True, kw_only=True)
class Search:
    """`decimals` is None before it is known, and where values have more digits than are looked for."""

    column: Number
    plan: Plan
    stage: Literal["first", "zoom", "histogram", "quantiles", "done"] = "first"
    present: int = 0
    decimals: int | None = None
    zooms: int = 0
    low: float = 0.0
    high: float = 0.0
    below: int = 0  # values outside of the range
    above: int = 0
    bins: Bins | None = None
    mean: float | None = None
    variance: float | None = None  # with n - 1
    brackets: tuple[tuple[int, int], ...] = ()  # for each quantile: above at(first), at most at(second)

    @cached_property
    def question(self) -> Question:
        """What to ask next."""
        match self.stage:
            case "first":
                return Question(thresholds=self._ends(self._first))
            case "zoom":
                return Question(thresholds=self._ends(self._zoomed))
            case "histogram":
                return self._sums(self._cuts, (self.low + self.high) / 2)
            case "quantiles" if self.variance is None:
                return self._sums(self._middles, self.mean or 0.0)
            case "quantiles":
                return Question(thresholds=self._middles)
        return Question()

    def after(self, counts: Sequence[int], total: float, squares: float) -> "Search":
        """With the answer: values up to each threshold, and the sums of (x - centre) / width and of its square.

        Raises BadTensors for numbers that no rows with what is known of them have.
        """
        self._check_counts(counts)
        self._check_sums(total, squares)
        match self.stage:
            case "first":
                return self._ranged(counts) if self.present else replace(self, stage="done")
            case "zoom":
                return self._narrowed(counts)
            case "histogram":
                return self._counted(counts, total)
            case "quantiles":
                return self._bisected(counts)._spread(total, squares)
        return self

    @property
    def within(self) -> int:
        """Values within the range."""
        return self.present - self.below - self.above

    @property
    def open(self) -> int:
        """Quantiles that are not found yet."""
        return sum(high - low > 1 for low, high in self.brackets)

    def found(self) -> Mapping[float, Quantile]:
        """What is known of the quantiles."""
        known = zip(self.plan.quantiles, self.brackets, strict=False)  # there may be no brackets yet
        if self.low == self.high:
            return {q: Quantile(low=before(self.low), high=self.low, exact=True) for q, _ in known}
        exact = self._on_points
        return {
            q: Quantile(low=self._grid.at(low), high=self._grid.at(high), exact=exact and high - low == 1)
            for q, (low, high) in known
        }

    # What cannot be

    def _check_counts(self, counts: Sequence[int]) -> None:
        if any(a > b for a, b in pairwise((0, *counts, self.present))):
            raise impossible(f"{self.column.name!r} has fewer values up to a number than up to a smaller one")
        last = self.present - self.above
        if (self.stage == "zoom" and not (counts[0] <= self.below and counts[-1] >= last)) or (
            self.stage == "histogram" and (counts[0], counts[-1]) != (self.below, last)
        ):
            raise impossible(f"values of {self.column.name!r} are outside of the range that held them")

    def _check_sums(self, total: float, squares: float) -> None:
        asked, n = self.question, self.within
        if not asked.width:
            return
        least, most = (n * (end - asked.centre) / asked.width for end in (asked.low, asked.high))
        slack = _SLACK * (n + 1)
        if not (least - slack <= total <= most + slack and -slack <= squares <= n + slack):
            raise impossible(f"the sum of {self.column.name!r} is beyond that of its largest values")

    # The range

    @property
    def _first(self) -> Sequence[float]:
        given = (self.column.low, self.column.high)
        return LADDER if given[0] is None or given[1] is None else (given[0], given[1])

    @staticmethod
    def _ends(points: Sequence[float]) -> tuple[float, ...]:
        """Thresholds that tell how many values are below each point, and how many are at most it."""
        return tuple(threshold for point in points for threshold in (before(point), point))

    def _ranged(self, counts: Sequence[int]) -> "Search":
        if self._first is not LADDER:
            low, high = self._first
            known = replace(self, low=low, high=high, below=counts[0], above=self.present - counts[-1])
            return replace(known, stage="histogram" if known.within else "done")
        outside = replace(self, below=counts[0], above=self.present - counts[-1])
        if not outside.within:
            return replace(outside, low=LADDER[0], high=LADDER[-1], stage="done")
        low, high = outside._hull(LADDER, counts)
        return replace(outside, low=low, high=high, stage="zoom" if low < high else "histogram")

    def _hull(self, points: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
        """The last point that no value is below, and the first that none is above; outside values left out."""
        low = max(point for point, under in zip(points, counts[::2], strict=True) if under <= self.below)
        most = self.present - self.above
        high = min(point for point, upto in zip(points, counts[1::2], strict=True) if upto >= most)
        return low, high

    @cached_property
    def _zoomed(self) -> tuple[float, ...]:
        step = self._step((self.high - self.low) / _STEPS)
        return tuple(step.at(k) for k in range(step.below(self.low), step.above(self.high) + 1))

    def _step(self, at_least: float) -> Step:
        """A decimal one, no finer than the grid of the values, nor than what float64 tells apart there."""
        finest = 1e-12 * max(abs(self.low), abs(self.high))
        if self.decimals is not None:
            finest = max(finest, float(Fraction(10) ** -self.decimals))
        return Step.decimal(max(at_least, finest))

    def _narrowed(self, counts: Sequence[int]) -> "Search":
        low, high = self._hull(self._zoomed, counts)
        zooms = self.zooms + 1
        width, finest = self.high - self.low, len(self._zoomed) <= _STEPS // 3
        goes_on = low < high < low + width / 3 and zooms < _ZOOMS and not finest
        return replace(self, low=low, high=high, zooms=zooms, stage="zoom" if goes_on else "histogram")

    # The histogram

    @cached_property
    def _edges(self) -> tuple[tuple[float, ...], bool]:
        """Of the bins, or the points that there may be, and whether they are that."""
        if self.low == self.high:
            return (self.low,), True
        if self.decimals is not None:
            unit = self._unit
            first, last = unit.above(self.low), unit.below(self.high)
            if last - first < _POINTS:
                return tuple(unit.at(k) for k in range(first, last + 1)), True
        if self.column.low is not None:
            width = (self.high - self.low) / self.plan.bins
            inner = [self.low + place * width for place in range(1, self.plan.bins)]
            return (self.low, *inner, self.high), False
        step = self._step((self.high - self.low) / self.plan.bins)
        return tuple(step.at(k) for k in range(step.below(self.low), step.above(self.high) + 1)), False

    @property
    def _cuts(self) -> tuple[float, ...]:
        """Thresholds, from below the range to its end, between which bins are."""
        edges, points = self._edges
        inner = edges[:-1] if points else [before(edge) for edge in edges[1:-1]]
        return (before(self.low), *inner, self.high)

    def _counted(self, counts: Sequence[int], total: float) -> "Search":
        edges, points = self._edges
        known = replace(
            self,
            bins=Bins(
                edges=edges,
                counts=tuple(b - a for a, b in pairwise(counts)),
                points=points,
            ),
            mean=self.question.centre + self.question.width * total / self.within,
            stage="quantiles",
        )
        if self.low == self.high:
            return replace(known, brackets=((0, 1),) * len(self.plan.quantiles))  # there is but one value
        return replace(known, brackets=tuple(known._bracket(q, counts) for q in self.plan.quantiles))

    # Sums

    def _sums(self, thresholds: tuple[float, ...], centre: float) -> Question:
        width = 2.0 ** (math.frexp(max(self.high - self.low, 1e-300))[1])
        return Question(thresholds=thresholds, low=self.low, high=self.high, centre=centre, width=width)

    def _spread(self, total: float, squares: float) -> "Search":
        """With the variance, if it was asked for; done if there is nothing left to ask."""
        known, asked = self, Question() if self.variance is not None else self._sums((), self.mean or 0.0)
        if asked.width:
            n, mean = self.within, asked.centre + asked.width * total / self.within
            variance = asked.width**2 * max(0.0, squares - total**2 / n) / (n - 1) if n > 1 else math.nan
            known = replace(self, mean=min(max(mean, self.low), self.high), variance=variance)
        return known if known.open else replace(known, stage="done")

    # The quantiles

    @cached_property
    def _unit(self) -> Step:
        return Step(unit=Fraction(10) ** -(self.decimals or 0))

    @property
    def _on_points(self) -> bool:
        """Whether all values are points of a decimal grid, with few enough in the range to find one of them."""
        return self.decimals is not None and (self.high - self.low) / float(self._unit.unit) <= _MOST_POINTS

    @cached_property
    def _grid(self) -> Step:
        """On which quantiles are looked for."""
        if self._on_points:
            return self._unit
        wide = max(abs(self.low), abs(self.high))
        return Step.binary(max(self.plan.precision * (self.high - self.low), 2.0**-50 * wide, 1e-300))

    def rank(self, q: float) -> int:
        """From 1 to the number of values within the range: ceil(q n), for q as it is written."""
        return max(1, math.ceil(Fraction(repr(q)) * self.within))

    def _bracket(self, q: float, counts: Sequence[int]) -> tuple[int, int]:
        rank = self.below + self.rank(q)
        place = next(place for place, count in enumerate(counts) if count >= rank)
        low, high = self._cuts[place - 1], self._cuts[place]
        grid = self._grid
        return grid.below(low), grid.below(high) if self._on_points else grid.above(high)

    @cached_property
    def _between(self) -> tuple[int, ...]:
        """Where on the grid the next thresholds are: the middles of what is open."""
        return tuple(sorted({(low + high) // 2 for low, high in self.brackets if high - low > 1}))

    @property
    def _middles(self) -> tuple[float, ...]:
        return tuple(self._grid.at(place) for place in self._between)

    def _bisected(self, counts: Sequence[int]) -> "Search":
        found = dict(zip(self._between, counts, strict=True))
        brackets = []
        for q, (low, high) in zip(self.plan.quantiles, self.brackets, strict=True):
            rank = self.below + self.rank(q)
            most = min([high, *(place for place, count in found.items() if count >= rank)])
            least = max([low, *(place for place, count in found.items() if count < rank)])
            if least >= most:
                raise impossible(f"a quantile of {self.column.name!r} is outside of where it was found")
            brackets.append((least, most))
        return replace(self, brackets=tuple(brackets))


def impossible(what: str) -> BadTensors:
    return BadTensors(
        f"the sums over the sites are of no rows ({what}): a site lies, or its rows changed meanwhile; see to the "
        "sites' tables and run it again"
    )


def searching(column: Number, plan: Plan, present: int, finer: Sequence[int]) -> Search:
    """A search that begins, of a column with so many values, of which finer[d] have more than d digits after the point.

    d goes from 0 to 4.
    """
    assert len(finer) == DECIMALS + 1
    decimals = next((digits for digits, count in enumerate(finer) if not count), None)
    return Search(column=column, plan=plan, present=present, decimals=decimals)
