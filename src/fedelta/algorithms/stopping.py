"""When a federation ends before its last round."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedelta.core.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best value of a metric so far (None: none yet), and the round it was reached in."""

    value: float | None = None
    round: int = 0


class Stop(Protocol):
    @property
    def metric(self) -> str: ...

    def update(self, best: Best, round: int, metrics: Mapping[str, float]) -> tuple[Best, str | None]:
        """The best value after `round`, and why the run ends with it (None: it goes on)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Target:
    """Ends when `metric` reaches `value`: from below, or from above for a loss or an error."""

    metric: str  # as in a report: "test_accuracy", "validation_loss", …
    value: float

    def update(self, best: Best, round: int, metrics: Mapping[str, float]) -> tuple[Best, str | None]:
        now = metrics.get(self.metric)
        if now is None:  # not evaluated in this round
            return best, None
        best = _better(self.metric, best, round, now, 0.0)
        sign = _sign(self.metric)
        reached = sign * now >= sign * self.value
        return best, f"{self.metric} reached {now:.4f} (target {self.value:g})" if reached else None


@dataclass(frozen=True, kw_only=True)
class Converged:
    """Ends when `metric` has not improved by more than `delta` in the last `rounds` rounds."""

    metric: str
    delta: float = 0.001  # >= 0
    rounds: int = 10  # >= 1

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.delta >= 0:
            raise BadInput(f"Converged needs rounds >= 1 and delta >= 0, got {self.rounds} and {self.delta}")

    def update(self, best: Best, round: int, metrics: Mapping[str, float]) -> tuple[Best, str | None]:
        now = metrics.get(self.metric)
        if now is None:  # not evaluated in this round
            return best, None
        best = _better(self.metric, best, round, now, self.delta)
        if round - best.round < self.rounds:
            return best, None
        return best, f"{self.metric} has not improved by {self.delta:g} since round {best.round}"


def _sign(metric: str) -> int:
    """+1 if more is better, -1 for losses and errors."""
    return -1 if metric.endswith(("loss", "mae", "perplexity")) else 1


def _better(metric: str, best: Best, round: int, now: float, delta: float) -> Best:
    sign = _sign(metric)
    if not math.isfinite(now):
        return best
    if best.value is None or sign * now > sign * best.value + delta:
        return Best(value=now, round=round)
    return best
