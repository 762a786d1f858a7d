"""The weighted mean, on a fixed-point grid: the order and the grouping of arrivals change no bit.

Every product weight × value is rounded once to a multiple of a power of two and added as a 64-bit integer. Integer
addition is associative, so a stream, the partial sums of workers and a tree of aggregators give the same bits. The
power of two is fixed before the round from declared bounds and the cohort's size, so that the sum cannot wrap around.

Limits: the accumulator takes 8 bytes an element; it and the mean are in the memory of the CPU. Merge
accumulators, not means: a mean of means is rounded in between.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from fedelta.core.codec import short
from fedelta.core.errors import BadInput, TooFewSites
from fedelta.core.grid import Terms, add_products, divide, magnitude
from fedelta.core.messages import Kind, Update, Updates
from fedelta.core.parameters import Entry, Layout, Parameters
from fedelta.core.program import Sight

_INTEGER_BOUND = 2.0**24  # on entries that are integers in the module; float32 holds them exactly up to here
NUMBER_BOUND = 2.0**512  # on `Update.sums`, so that their total is finite


@dataclass(frozen=True, kw_only=True)
class Mean:
    """sum(weight × value) / sum(weight), element by element.

    `bound` limits the |value| of an element, `weight_bound` the weight of one site; an update that is a mean over
    `count` sites may weigh `count` times as much. Entries that are integers in the module (BatchNorm's number of
    batches) may reach 2**24 and have a grid of their own.

    The grid: products are rounded to multiples of r = resolution(cohort) = cohort × bound × weight_bound / 2**62, each
    factor rounded up to a power of two. With n updates added, W = sum(weight) and M = max |value|, an element of the
    result is off the exact mean by at most n r / (2 W) + 2**-50 M, and then by one rounding to the updates' dtype.
    With the default bounds, values far below them and a mean weight of 1, that is 2**-31 for 10 sites and 2**-25 for
    1,000; the larger the weights, the finer.
    """

    needs: ClassVar[Sight] = Sight.SUM

    bound: float = 2.0**8
    weight_bound: float = 2.0**20

    def __post_init__(self) -> None:
        try:
            _ = self.terms
        except BadInput as error:
            raise BadInput(f"Mean.{error}") from None

    @property
    def terms(self) -> Terms:
        """Its bounds, for whoever adds updates in its place."""
        return Terms(bound=self.bound, weight_bound=self.weight_bound)

    def refuse(self, update: Update) -> str | None:
        """Why this update cannot be taken: a number that is not finite, or one beyond its bound."""
        return self._examine(update)[0]

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        """The mean of `updates`, each taken and let go as it arrives; at most `cohort` sites.

        Raises TooFewSites if nothing arrives or all weights are zero, BadInput for an update that cannot be added.
        """
        accumulator = Accumulator(self, cohort)
        for update in updates:
            accumulator.add(update)
            del update  # or it would stay in memory while the next one arrives
        return accumulator.total()

    def refuse_many(self, updates: Updates) -> Mapping[int, str]:
        """The rows of `updates` that `refuse` refuses, with the reason."""
        if not len(updates):
            return {}
        low, high = torch.aminmax(torch.stack([updates.weights, *updates.sums.values()]), dim=1)
        weight, *numbers = zip(low.tolist(), high.tolist(), strict=True)  # NaN if one is
        good = weight[0] >= 0 and weight[1] <= self.weight_bound
        good &= all(max(-least, most) <= NUMBER_BOUND for least, most in numbers)
        largest = magnitude(updates.values) if updates.magnitude is None else updates.magnitude
        if good and largest <= self.bound:
            return {}  # the usual case, and at most one pass over the values
        reasons = ((row, self.refuse(update)) for row, update in enumerate(updates))
        return {row: reason for row, reason in reasons if reason is not None}

    def combine(self, updates: Updates) -> Update:
        """The mean of `updates` by one product, in their order and dtype; its grid comes when it is added to others."""
        weight = math.fsum(updates.weights.tolist())
        shares = updates.weights / weight if weight else updates.weights
        values = shares.to(updates.values.device, updates.values.dtype) @ updates.values
        return Update(
            values=Parameters(updates.layout, values.cpu()),
            kind=updates.kind,
            weight=weight,
            sums={name: math.fsum(numbers.tolist()) for name, numbers in updates.sums.items()},
            count=len(updates),
        )

    def resolution(self, cohort: int) -> float:
        """The distance between two points of the grid for floating-point entries, in weight × parameter units."""
        return 2.0 ** -self._exponent(self.bound, cohort)

    def segments(self, layout: Layout, cohort: int) -> list[tuple[slice, int]]:
        """Runs of elements with one grid, in the order of the vector: where, and the exponent e of the scale 2**e."""
        runs: list[tuple[slice, int]] = []
        exponents = {bound: self._exponent(bound, cohort) for bound in {*map(self._bound, layout.entries)}}
        for entry in layout.entries:
            exponent = exponents[self._bound(entry)]
            end = entry.offset + entry.numel
            if runs and runs[-1][1] == exponent:
                runs[-1] = (slice(runs[-1][0].start, end), exponent)
            else:
                runs.append((slice(entry.offset, end), exponent))
        return runs

    def _examine(self, update: Update) -> tuple[str | None, float]:
        """Why `update` is refused, if it is; and its largest |value|."""
        largest = magnitude(update.values.vector)
        return self._numbers(update) or self._values(update.values, largest), largest

    def _numbers(self, update: Update) -> str | None:
        limit = update.count * self.weight_bound
        if update.count < 1:
            return f"a count of {update.count} sites is not at least 1"
        if not 0 <= update.weight <= limit:
            return f"weight {update.weight} is not within 0 and {limit:g}; raise Mean.weight_bound or lower the weight"
        for name, number in update.sums.items():
            if not abs(number) <= NUMBER_BOUND:
                return f"sum {short(name)} is {number}, which is not a number that can be added"
        return None

    def _values(self, values: Parameters, largest: float) -> str | None:
        if largest <= self.bound:
            return None
        for entry in values.layout.entries:
            bound, found = self._bound(entry), magnitude(values[entry.name])
            if not found <= bound:
                return (
                    f"{entry.name!r} holds {found}, and |value| has to be at most {bound:g}; "
                    "lower the learning rate, clip, or raise Mean.bound"
                )
        return None

    def _bound(self, entry: Entry) -> float:
        return self.bound if entry.dtype.is_floating_point else max(self.bound, _INTEGER_BOUND)

    def _exponent(self, bound: float, cohort: int) -> int:
        return replace(self.terms, bound=bound).exponent(cohort)


@dataclass(frozen=True, slots=True)
class _Form:
    """What updates must have in common to be added."""

    layout: Layout
    dtype: torch.dtype
    kind: Kind

    @classmethod
    def of(cls, update: Update) -> "_Form":
        return cls(update.values.layout, update.values.vector.dtype, update.kind)


@dataclass(frozen=True, slots=True)
class _Sum:
    """What was added so far; weights and sums as exact fractions."""

    form: _Form
    grid: Tensor  # int64, one element for each of the vector
    weight: Fraction
    sums: Mapping[str, Fraction]
    count: int


class Accumulator:
    """A sum of updates on the grid of a `Mean`: the partial result of a worker or of an aggregator.

    Any order of `add` and any tree of `merge` over the same updates give the same `total`, bit for bit.
    """

    def __init__(self, mean: Mean, cohort: int) -> None:
        """`cohort`: the number of sites in the whole round, the same for all accumulators that are to be merged."""
        if not 1 <= cohort < 2**53:
            raise BadInput(f"a mean is over a cohort of at least 1 site, got {cohort}")
        self.mean = mean
        self.cohort = cohort
        self._sum: _Sum | None = None

    @property
    def count(self) -> int:
        """Number of sites added so far."""
        return 0 if self._sum is None else self._sum.count

    def add(self, update: Update) -> None:
        """Add one update. Raises BadInput, and adds nothing, if it cannot be added."""
        refusal, largest = self.mean._examine(update)
        if refusal is not None:
            raise BadInput(refusal)
        form, vector = _Form.of(update), update.values.vector
        grid = self._grid(form, update.count)
        for where, exponent in self.mean.segments(form.layout, self.cohort):
            add_products(grid[where].numpy(), vector[where], math.ldexp(update.weight, exponent), largest)
        sums = {name: Fraction(number) for name, number in update.sums.items()}
        self._note(_Sum(form, grid, Fraction(update.weight), sums, update.count))

    def merge(self, other: "Accumulator") -> None:
        """Add all that `other` holds; `other` stays as it is. Raises BadInput if its grid or form differs."""
        if (other.mean, other.cohort) != (self.mean, self.cohort):
            raise BadInput(
                f"only sums on one grid can be merged: {self.mean} for {self.cohort} sites "
                f"and {other.mean} for {other.cohort} sites differ"
            )
        if other._sum is not None:
            theirs = other._sum
            grid = self._grid(theirs.form, theirs.count)
            grid.add_(theirs.grid)
            self._note(replace(theirs, grid=grid))

    def total(self) -> Update:
        """The mean of what was added; `weight`, `sums` and `count` are totals.

        Raises TooFewSites if nothing was added or all weights are zero.
        """
        if self._sum is None:
            raise TooFewSites("no update arrived, so there is no mean; look at why the sites are absent")
        form, grid, weight = self._sum.form, self._sum.grid, float(self._sum.weight)
        if weight == 0:
            raise TooFewSites(
                f"all weights ({self.count} sites) are zero, so there is no mean; a site needs a weight > 0"
            )
        vector = torch.empty(form.layout.size, dtype=form.dtype)
        for where, exponent in self.mean.segments(form.layout, self.cohort):
            divide(vector[where], grid[where].numpy(), exponent, weight)
        return Update(
            values=Parameters(form.layout, vector),
            kind=form.kind,
            weight=weight,
            sums={name: float(number) for name, number in sorted(self._sum.sums.items())},
            count=self.count,
        )

    def _grid(self, form: _Form, count: int) -> Tensor:
        """The integers to add to, once it is sure that `count` sites of this form may be added."""
        if self.count + count > self.cohort:
            raise BadInput(
                f"{self.count + count} sites in a mean over a cohort of {self.cohort}; a larger sum might wrap"
            )
        if self._sum is None:
            return torch.zeros(form.layout.size, dtype=torch.int64)
        own = self._sum.form
        if (form.kind, form.dtype) != (own.kind, own.dtype):
            raise BadInput(f"a {form.kind} in {form.dtype} cannot be added to a {own.kind} in {own.dtype}")
        if form.layout is not own.layout and form.layout != own.layout:
            raise BadInput(
                f"updates of different layouts cannot be added: {len(form.layout.entries)} tensors with "
                f"{form.layout.size} elements and {len(own.layout.entries)} with {own.layout.size} differ"
            )
        return self._sum.grid

    def _note(self, part: _Sum) -> None:
        """Take over the numbers of `part`, whose products are in the grid already."""
        if self._sum is None:
            self._sum = part
            return
        own = self._sum
        names = own.sums.keys() | part.sums.keys()
        sums = {name: own.sums.get(name, Fraction()) + part.sums.get(name, Fraction()) for name in names}
        self._sum = replace(own, weight=own.weight + part.weight, sums=sums, count=own.count + part.count)
