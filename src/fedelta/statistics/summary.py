"""What statistics tell, over all sites together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedelta.core.messages import PartyId, Plain
from fedelta.core.release import Budget
from fedelta.statistics.search import Bins, Quantile


@dataclass(frozen=True, kw_only=True)
class NumberSummary:
    """A column of numbers. Counts are whole unless noise was added.

    Mean, variance (with n - 1), bins and quantiles are of the values from `low` to `high`; `below` and `above` are how
    many are outside. None: not known, since there are too few values, or the run ended before.
    """

    name: str
    missing: float
    below: float = 0
    above: float = 0
    within: float = 0
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    variance: float | None = None
    mean_noise: float = 0.0  # standard deviation of what noise does to the mean, about
    bins: Bins | None = None
    quantiles: Mapping[float, Quantile] = field(default_factory=dict)

    @property
    def deviation(self) -> float | None:
        """The standard deviation."""
        return None if self.variance is None else math.sqrt(self.variance)

    @property
    def values(self) -> Mapping[str, float] | None:
        """The count of each value, where there are few."""
        if self.bins is None or not self.bins.points:
            return None
        return {exact_text(edge): count for edge, count in zip(self.bins.edges, self.bins.counts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class CategorySummary:
    """A column of a few values: the rows of each that was declared, and of all others together."""

    name: str
    missing: float
    counts: Mapping[str, float]
    other: float

    @property
    def shown(self) -> Mapping[str, float]:
        """The declared values and, last, all others, under a name that no declared value has."""
        name = "other"
        while name in self.counts:
            name = f"({name})"
        return {**self.counts, name: self.other}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What all sites' rows are like. With `privacy`, every count has noise of standard deviation `noise`."""

    sites: Sequence[PartyId]
    absent: Mapping[PartyId, str]
    rows: float
    columns: Sequence[NumberSummary | CategorySummary]
    rounds: int
    ended: str | None = None  # why, if before all was known
    privacy: Budget | None = None
    rho: float | None = None
    noise: float = 0.0

    def __getitem__(self, name: str) -> NumberSummary | CategorySummary:
        """The column of this name. Raises KeyError."""
        return {column.name: column for column in self.columns}[name]

    def to_plain(self) -> dict[str, Plain]:
        """As JSON values."""
        plain: dict[str, Plain] = {
            "rows": self.rows,
            "sites": list(self.sites),
            "absent": dict(self.absent),
            "rounds": self.rounds,
            "ended": self.ended,
            "columns": {column.name: _column(column) for column in self.columns},
        }
        if self.privacy is not None:
            plain["privacy"] = {
                "unit": "row",
                "epsilon": self.privacy.epsilon,
                "delta": self.privacy.delta,
                "rho": self.rho,
                "noise": self.noise,
            }
        return plain


def _column(column: NumberSummary | CategorySummary) -> dict[str, Plain]:
    if isinstance(column, CategorySummary):
        return {"missing": column.missing, "counts": dict(column.counts), "other": column.other}
    plain: dict[str, Plain] = {
        name: _finite(getattr(column, name))
        for name in ("missing", "below", "above", "within", "low", "high", "mean", "mean_noise", "variance")
    }
    plain["standard_deviation"] = _finite(column.deviation)
    if column.bins is not None:
        plain["histogram"] = {"edges": list(column.bins.edges), "counts": list(column.bins.counts)}
        if column.values is not None:
            plain["values"] = dict(column.values)
    plain["quantiles"] = {
        exact_text(q): {"above": own.low, "up_to": own.high, "exact": own.exact} for q, own in column.quantiles.items()
    }
    return plain


def exact_text(number: float) -> str:
    """The shortest text that is this float64 and no other: "3", "0.1", "20230101", "1e+17"."""
    return repr(float(number)).removesuffix(".0")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
