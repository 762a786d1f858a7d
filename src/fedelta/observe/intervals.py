"""Student-t confidence intervals of a mean over seeds.

Holds for values that are independent and roughly normal. The seeds of one comparison are few, so the intervals are
wide, and a metric near its limit (an accuracy near 100%) can have an interval that goes past it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedelta.core.errors import BadInput


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """`mean` plus or minus `half`; `half` is None for a single value, which says nothing about its own spread."""

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of `values` and its interval: half-width t(confidence, n - 1) * s / sqrt(n).

    Raises BadInput without values or for a confidence outside (0, 1).
    """
    if not values or not 0 < confidence < 1:
        raise BadInput(f"an interval needs values and a confidence in (0, 1), got {len(values)} and {confidence}")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean=mean, half=None, count=1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean=mean, half=_quantile(count - 1, confidence) * math.sqrt(variance / count), count=count)


@lru_cache
def _quantile(freedom: int, confidence: float) -> float:
    """t with P(|T| <= t) = confidence, for T of Student's distribution with `freedom` degrees of freedom."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(freedom, 0.5 + confidence / 2))
