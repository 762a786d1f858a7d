"""Numbers by round, out of reports: of one run, and of several runs of one method with different seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from fedelta.core.errors import BadInput
from fedelta.core.program import Report
from fedelta.observe.intervals import Interval, interval

Run = Sequence[Report]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of a comparison: a name, the final score for each seed, and the runs behind them.

    A method without rounds (local only, pooled) has scores and no runs. `sites` is the number of sites over which a
    round's bytes are shared out.
    """

    name: str
    scores: Sequence[float]
    runs: Sequence[Run] = ()
    sites: int = 1
    reference: bool = True  # if it has no runs: whether it is a line in plots by round

    def __post_init__(self) -> None:
        if not self.scores or self.sites < 1:
            raise BadInput(f"method {self.name!r} needs a score and a site, got {len(self.scores)} and {self.sites}")
        if self.runs and len(self.runs) != len(self.scores):
            raise BadInput(f"method {self.name!r} has {len(self.scores)} scores and {len(self.runs)} runs")

    @classmethod
    def of_runs(cls, name: str, runs: Sequence[Run], *, metric: str, sites: int) -> "Method":
        """A method whose scores are the last values of `metric` in its runs. Raises BadInput where a run has none."""
        finals = [final(run, metric) for run in runs]
        scores = [score for score in finals if score is not None]
        if len(scores) < len(finals):
            raise BadInput(f"a run of {name!r} has no {metric!r}; use one of the metrics that its reports have")
        return cls(name=name, scores=scores, runs=runs, sites=sites)

    @property
    def sent(self) -> Interval | None:
        """Bytes that a site sent over the whole run, over the seeds."""
        return interval([sum(r.bytes_up for r in run) / self.sites for run in self.runs]) if self.runs else None

    @property
    def received(self) -> Interval | None:
        """Bytes that a site received over the whole run, over the seeds."""
        return interval([sum(r.bytes_down for r in run) / self.sites for run in self.runs]) if self.runs else None


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What a site gains by one method over another: the difference of their scores, for each seed.

    Where less is better, as of a loss, it is how much less.
    """

    site: str
    values: Sequence[float]

    @property
    def mean(self) -> Interval:
        return interval(self.values)

    @property
    def clear(self) -> bool:
        """Whether the 95% interval leaves zero out; of one seed it never does."""
        mean = self.mean
        return mean.half is not None and (mean.low > 0 or mean.high < 0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric by round over the seeds: the rounds in which every run has it."""

    rounds: Sequence[int]
    values: Sequence[Interval]
    sent: Sequence[float]  # bytes per site up to and including that round, mean over the seeds


def metric_names(run: Run) -> list[str]:
    """The metrics of a run, in order of appearance."""
    return list(dict.fromkeys(name for report in run for name in report.metrics))


def series(run: Run, metric: str) -> dict[int, float]:
    """Round -> value, for the rounds that have a finite one."""
    return {r.round: r.metrics[metric] for r in run if math.isfinite(r.metrics.get(metric, math.nan))}


def final(run: Run, metric: str) -> float | None:
    """The last value of a metric; None if there is none."""
    return next((report.metrics[metric] for report in reversed(run) if metric in report.metrics), None)


def rounds_to(run: Run, metric: str, target: float) -> int | None:
    """The first round in which `metric` is at least `target`; None if it never is."""
    return next((round for round, value in series(run, metric).items() if value >= target), None)


def mean_curve(method: Method, metric: str) -> Curve:
    """The curve of a method; empty if its runs share no round with that metric."""
    by_seed = [series(run, metric) for run in method.runs]
    rounds = sorted(set.intersection(*(set(values) for values in by_seed))) if by_seed else []
    sent = [dict(zip([r.round for r in run], accumulate(r.bytes_up for r in run), strict=True)) for run in method.runs]
    return Curve(
        rounds=rounds,
        values=[interval([values[round] for values in by_seed]) for round in rounds],
        sent=[sum(total[round] for total in sent) / len(sent) / method.sites for round in rounds],
    )
