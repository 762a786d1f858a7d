import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput
from fedelta.core.program import Report
from fedelta.observe.intervals import interval
from fedelta.observe.series import Method, final, mean_curve, metric_names, rounds_to, series

accuracies = st.lists(st.none() | st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=12)


def run_of(values: list[float | None], bytes_up: int = 0) -> list[Report]:
    """A run with one accuracy a round; None: that round was not evaluated."""
    return [
        Report(round=round, metrics={} if value is None else {"test_accuracy": value}, bytes_up=bytes_up * round)
        for round, value in enumerate(values, start=1)
    ]


@given(accuracies, st.floats(0, 1))
def test_rounds_to_a_target(values: list[float | None], target: float) -> None:
    expected = None
    for round, value in enumerate(values, start=1):
        if expected is None and value is not None and value >= target:
            expected = round
    assert rounds_to(run_of(values), "test_accuracy", target) == expected


@given(accuracies)
def test_a_series_has_what_was_measured(values: list[float | None]) -> None:
    run = run_of(values)
    measured = [value for value in values if value is not None]
    assert list(series(run, "test_accuracy").values()) == [value for value in measured if not math.isnan(value)]
    assert final(run, "test_accuracy") is (measured[-1] if measured else None)
    assert metric_names(run) == (["test_accuracy"] if measured else [])


@given(st.lists(accuracies, min_size=1, max_size=3))
def test_a_mean_curve_has_the_rounds_that_every_seed_has(values: list[list[float | None]]) -> None:
    runs = [run_of(one, bytes_up=3) for one in values]
    curve = mean_curve(Method(name="m", scores=[0.5] * len(runs), runs=runs, sites=2), "test_accuracy")
    rounds = []
    for round in range(1, 13):
        here = [one[round - 1] if round <= len(one) else None for one in values]
        present = [value for value in here if value is not None and not math.isnan(value)]
        if len(present) == len(runs):
            rounds.append(round)
            position = len(rounds) - 1
            assert curve.values[position] == interval(present)
            assert curve.sent[position] == pytest.approx(3 * round * (round + 1) / 2 / 2)
    assert curve.rounds == rounds


def test_a_method_of_runs_has_their_last_values() -> None:
    method = Method.of_runs("m", [run_of([0.1, 0.5]), run_of([0.7, None], 8)], metric="test_accuracy", sites=4)
    assert method.scores == [0.5, 0.7]
    assert method.sent == interval([0.0, 6.0])
    assert Method(name="pooled", scores=[0.9]).sent is None


def test_a_method_that_cannot_be_compared_is_refused() -> None:
    with pytest.raises(BadInput, match="no 'test_loss'"):
        Method.of_runs("m", [run_of([0.1])], metric="test_loss", sites=1)
    with pytest.raises(BadInput, match="needs a score"):
        Method(name="m", scores=[])
    with pytest.raises(BadInput, match="2 scores and 1 runs"):
        Method(name="m", scores=[0.1, 0.2], runs=[run_of([0.1])])
