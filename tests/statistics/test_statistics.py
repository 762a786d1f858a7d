"""Statistics over sites against those of the pooled rows."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import mean, variance
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.algorithms.parts import Clear
from fedelta.core.errors import BadInput, TooFewSites, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.messages import Replies, Reply, Request, Requests
from fedelta.core.program import Fleet, run
from fedelta.core.release import Budget
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.secure import ckks
from fedelta.secure.aggregation import SecureAggregation
from fedelta.secure.homomorphic import HomomorphicEncryption
from fedelta.statistics.columns import Category, Column, Number, rows_of
from fedelta.statistics.program import Statistics, StatisticsState, summarise
from fedelta.statistics.summary import CategorySummary, NumberSummary, Summary

HOSPITALS = ["cleveland", "hungarian", "switzerland", "va"]
HEART = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca"]
HEART += ["thal", "num"]
SITES = ["a", "b", "c", "d"]

Values = Sequence[float | None]


def over(program: Statistics, rows: Mapping[str, Examples]) -> Summary:
    return summarise(program, Local(program, rows.__getitem__, list(rows)))


def one_column(*sites: Values, **column: float) -> tuple[list[Column], dict[str, Examples]]:
    columns: list[Column] = [Number(name="x", **column)]
    tables = [pandas.DataFrame({"x": pandas.Series(list(values), dtype="float64")}) for values in sites]
    return columns, {name: rows_of(table, columns) for name, table in zip(SITES, tables, strict=False)}


def number(summary: Summary, name: str = "x") -> NumberSummary:
    found = summary[name]
    assert isinstance(found, NumberSummary)
    return found


def check(found: NumberSummary, pooled: "pandas.Series[float]", quantiles: Sequence[float]) -> None:
    """Against all values, none of which is outside of the range."""
    values = np.sort(pooled.dropna().to_numpy(dtype=np.float64))
    assert (found.missing, found.within, found.below, found.above) == (pooled.isna().sum(), len(values), 0, 0)
    if not len(values):
        assert (found.mean, found.bins, found.quantiles) == (None, None, {})
        return
    assert found.low is not None
    assert found.high is not None
    assert found.bins is not None
    scale, largest = max(found.high - found.low, 1e-300), np.abs(values).max()
    assert found.low <= values[0] <= values[-1] <= found.high
    exact = [Fraction(value) for value in values]
    assert found.mean is not None
    assert abs(Fraction(found.mean) - mean(exact)) <= 1e-15 * largest + 2.0**-80 * scale
    if len(values) == 1:
        assert found.variance is None
    else:
        least = max((2.0**-51 * largest) ** 2, 2.0**-80 * scale**2)
        assert found.variance == pytest.approx(float(variance(exact)), rel=1e-14, abs=least)
    if found.bins.points:
        assert list(found.bins.counts) == [(values == point).sum() for point in found.bins.edges]
    else:
        assert list(found.bins.counts) == np.histogram(values, np.array(found.bins.edges))[0].tolist()
    for q in quantiles:
        true, own = np.quantile(values, q, method="inverted_cdf"), found.quantiles[q]
        assert own.low < true <= own.high
        assert own.high == true if own.exact else own.high - own.low <= 1e-6 * scale


def test_the_heart_disease_hospitals_are_as_pandas_has_them_pooled(shared: Callable[[str], Path]) -> None:
    folder = shared("heart-disease")
    tables = {
        name: pandas.read_csv(folder / f"processed.{name}.data", header=None, names=HEART, dtype=str, na_filter=False)
        for name in HOSPITALS
    }
    columns = [Category(name="sex", values=("0",)), *(Number(name=name) for name in HEART if name != "sex")]
    summary = over(Statistics(columns=columns), {name: rows_of(table, columns) for name, table in tables.items()})
    pooled = pandas.concat(
        pandas.read_csv(folder / f"processed.{name}.data", header=None, names=HEART, na_values="?")
        for name in HOSPITALS
    )
    assert (summary.rows, summary.ended, list(summary.sites)) == (920, None, HOSPITALS)
    assert summary["sex"] == CategorySummary(name="sex", missing=0, counts={"0": 194}, other=726)
    for column in columns[1:]:
        found = number(summary, column.name)
        check(found, pooled[column.name], (0.05, 0.25, 0.5, 0.75, 0.95))
        assert all(own.exact for own in found.quantiles.values())
        assert found.mean == pytest.approx(pooled[column.name].mean(), rel=1e-15)
        assert found.variance == pytest.approx(pooled[column.name].var(), rel=1e-14)
    assert number(summary, "num").values == {"0": 411, "1": 265, "2": 109, "3": 107, "4": 28}


@st.composite
def columns_of_values(draw: st.DrawFn) -> list[Values]:
    """Of three or four sites: whole numbers, prices, any floats, or numbers far from 0 and close to each other."""
    value = draw(
        st.sampled_from(
            [
                st.integers(-5, 5).map(float),
                st.integers(-(10**7), 10**7).map(lambda cents: cents / 100),
                st.floats(-1e17, 1e17),
                st.floats(-1, 1),
                st.floats(0, 1).map(lambda part: 1e6 + part),
                st.just(0.1 + 0.2),
            ]
        )
    )
    site = st.lists(st.one_of(st.none(), value), max_size=12)
    return draw(st.lists(site, min_size=3, max_size=4))


@settings(max_examples=60, deadline=None)
@given(sites=columns_of_values(), bins=st.integers(2, 30))
def test_any_values_are_as_they_are_pooled(sites: list[Values], bins: int) -> None:
    columns, rows = one_column(*sites)
    quantiles = (0.001, 0.1, 0.5, 0.999)
    found = number(over(Statistics(columns=columns, bins=bins, quantiles=quantiles, collect=Clear()), rows))
    pooled = pandas.Series([value for site in sites for value in site], dtype="float64")
    check(found, pooled, quantiles)


@settings(max_examples=40, deadline=None)
@given(sites=columns_of_values(), low=st.floats(-1e3, 1e3), width=st.floats(1e-3, 1e7))
def test_values_outside_of_a_range_are_counted_apart(sites: list[Values], low: float, width: float) -> None:
    columns, rows = one_column(*sites, low=low, high=low + width)
    found = number(over(Statistics(columns=columns, collect=Clear()), rows))
    pooled = pandas.Series([value for site in sites for value in site], dtype="float64")
    assert (found.below, found.above) == ((pooled < low).sum(), (pooled > low + width).sum())
    inside = pooled[pooled.isna() | pooled.between(low, low + width)]
    check(replace(found, below=0, above=0), inside, tuple(found.quantiles))


def test_masks_change_no_bit() -> None:
    generator = np.random.default_rng(0)
    columns: list[Column] = [Number(name="x"), Number(name="y", low=-2, high=2), Category(name="z", values=("a", "b"))]
    rows = {}
    for size, name in zip((30, 41, 7, 0), SITES, strict=True):
        table = {
            "x": generator.lognormal(3, 2, size),
            "y": generator.normal(size=size),
            "z": list("abc?"[: size % 4]) * 0,
        }
        rows[name] = rows_of(pandas.DataFrame({**table, "z": generator.choice(list("abc?"), size)}), columns)
    secure = over(Statistics(columns=columns), rows)
    clear = over(Statistics(columns=columns, collect=Clear()), rows)
    assert secure == clear
    assert secure.rows == 78


def test_encryption_changes_no_bit_either() -> None:
    pytest.importorskip(ckks.LIBRARY)
    columns, rows = one_column([1.25, 2, 1e5], [3, None], [3.141592653589793, -40])
    encrypted = Statistics(columns=columns, collect=HomomorphicEncryption())
    assert over(encrypted, rows) == over(Statistics(columns=columns), rows)
    with pytest.raises(UnsoundCombination, match="how many of them add noise"):
        replace(encrypted, columns=[Category(name="x", values=("1",))], privacy=Budget(epsilon=1.0, delta=1e-5))


def test_the_number_of_sites_in_a_process_changes_nothing() -> None:
    columns, rows = one_column([1, 2, 3.25], [None, 8], [4, 4.5], [0.123456])
    program = Statistics(columns=columns)
    with Workers(program, rows.__getitem__, list(rows), workers=2) as fleet:
        assert summarise(program, fleet) == over(program, rows)


def test_a_rank_is_that_of_the_quantile_as_it_is_written() -> None:
    columns, rows = one_column(range(1, 41), range(41, 81), range(81, 101))
    found = number(over(Statistics(columns=columns, quantiles=(0.07, 0.29, 0.57)), rows))  # 0.07 * 100 > 7 in float64
    assert [own.high for own in found.quantiles.values()] == [7, 29, 57]


def test_the_error_of_a_mean_is_a_share_of_the_largest_value_where_values_cancel() -> None:
    values = [[1e6], [-1e6], [3e-7], [1e5 / 3, -1e5 / 3]]
    columns, rows = one_column(*values)
    found = number(over(Statistics(columns=columns, collect=Clear()), rows))
    check(found, pandas.Series([value for site in values for value in site]), tuple(found.quantiles))


def test_values_next_to_the_largest_float_are_counted() -> None:
    columns, rows = one_column([1e305, 1.5], [-1.7e308, 2.0], [3.0])
    found = number(over(Statistics(columns=columns), rows))
    assert (found.within, found.below, found.above, found.mean) == (3, 1, 1, pytest.approx(6.5 / 3))


@pytest.mark.parametrize("values", [range(20230101, 20230110), [1000 + part / 10000 for part in range(20)]])
def test_values_that_share_six_digits_stay_apart(values: Sequence[float]) -> None:
    columns, rows = one_column(values, values, values)
    summary = over(Statistics(columns=columns, quantiles=(0.1234567, 0.1234568)), rows)
    told = number(summary).values
    assert told is not None
    assert {float(value): count for value, count in told.items() if count} == dict.fromkeys(map(float, values), 3)
    plain: Any = summary.to_plain()["columns"]
    assert list(plain["x"]["quantiles"]) == ["0.1234567", "0.1234568"]
    assert plain["x"]["values"] == told


def test_what_is_called_other_is_told_from_all_others() -> None:
    columns = [Category(name="x", values=("other", "(other)"))]
    rows = {name: rows_of(pandas.DataFrame({"x": ["other", "k", "z"]}), columns) for name in SITES}
    found = over(Statistics(columns=columns), rows)
    told = found["x"]
    assert isinstance(told, CategorySummary)
    assert told.shown == {"other": 4, "(other)": 0, "((other))": 8}
    plain: Any = found.to_plain()["columns"]
    assert plain["x"] == {"missing": 0, "counts": {"other": 4, "(other)": 0}, "other": 8}


def test_variance_does_not_cancel() -> None:
    values = [1e9 + part for part in (0.0, 1.0, 2.0, 1.0)]
    columns, rows = one_column(values, values, [*values, 1e9 + 500])
    pooled = pandas.Series([*values, *values, *values, 1e9 + 500])
    assert number(over(Statistics(columns=columns), rows)).variance == pytest.approx((pooled - 1e9).var(), rel=1e-14)


def test_a_state_goes_on_where_it_was() -> None:
    columns, rows = one_column([1.5, 2, 3], [4, 8.75], [4, 15])
    program = Statistics(columns=columns)
    states = [state for state, _ in run(program, Local(program, rows.__getitem__, list(rows)))]
    assert len(states) > 4
    for state in states[:-1]:
        *_, (last, _) = run(program, Local(program, rows.__getitem__, list(rows)), state)
        assert program.summary(last) == program.summary(states[-1])


# Sites that are lost


class Losing:
    """A fleet in which some sites do not answer requests for some rounds."""

    def __init__(self, fleet: Fleet, lost: Mapping[str, Sequence[int]]) -> None:
        self.fleet, self.lost = fleet, lost
        self.seen: list[Reply | Replies] = []

    def parties(self) -> Sequence[str]:
        return self.fleet.parties()

    def submit(self, request: Request) -> None:
        self.fleet.submit(request)

    def submit_many(self, requests: Requests, together: int) -> None:
        self.fleet.submit_many(requests, together)

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        reply = self.fleet.next_reply(timeout_s)
        if isinstance(reply, Reply):
            if reply.round in self.lost.get(reply.sender, ()):
                reply = replace(reply, body={}, error="gone")
            self.seen.append(reply)
        return reply

    def cancel(self, request_id: str) -> None:
        self.fleet.cancel(request_id)


FIVE = ([1, 2, 3.5], [4, 8], [4, 15, None], [16], [23, 42])


def losing(collect: Any, lost: Mapping[str, Sequence[int]]) -> tuple[Statistics, StatisticsState]:
    columns, _ = one_column()
    rows = {f"s{i}": rows_of(pandas.DataFrame({"x": values}), columns) for i, values in enumerate(FIVE)}
    program = Statistics(columns=columns, collect=collect)
    fleet = Losing(Local(program, rows.__getitem__, list(rows)), lost)
    *_, (state, _) = run(program, fleet)
    return program, state


@pytest.mark.parametrize("collect", [Clear(), SecureAggregation()])
def test_who_is_not_there_at_first_is_not_in_it(collect: Any) -> None:
    program, state = losing(collect, {"s1": [1]})
    summary = program.summary(state)
    assert summary.absent.keys() == {"s1"}
    assert list(summary.sites) == ["s0", "s2", "s3", "s4"]
    pooled = pandas.Series([value for i, values in enumerate(FIVE) if i != 1 for value in values], dtype="float64")
    check(number(summary), pooled, program.quantiles)


@pytest.mark.parametrize("collect", [Clear(), SecureAggregation()])
def test_who_comes_back_is_waited_for(collect: Any) -> None:
    program, state = losing(collect, {"s1": [3, 4], "s2": [6]})
    _, undisturbed = losing(collect, {})
    assert state.round == undisturbed.round + 3
    assert replace(program.summary(state), rounds=0) == replace(program.summary(undisturbed), rounds=0)


@pytest.mark.parametrize("collect", [Clear(), SecureAggregation()])
def test_without_a_site_that_was_there_nothing_more_is_asked(collect: Any) -> None:
    program, state = losing(collect, {"s3": range(5, 99)})
    summary = program.summary(state)
    assert state.ended is not None
    assert summary.ended is not None
    assert "s3: gone" in summary.ended
    pooled = np.array([value for values in FIVE for value in values if value is not None])
    found = number(summary)
    assert (summary.rows, found.mean) == (11, pytest.approx(pooled.mean()))
    assert any(own.high - own.low > 1 for own in found.quantiles.values())
    for q, own in found.quantiles.items():
        assert own.low < np.quantile(pooled, q, method="inverted_cdf") <= own.high


def test_too_few_sites_at_first_are_an_error() -> None:
    with pytest.raises(TooFewSites):
        losing(SecureAggregation(), {"s1": range(9), "s2": range(9), "s3": range(9)})
    columns, rows = one_column([1.0], [2.0])
    with pytest.raises(TooFewSites, match="2 sites were asked"):
        over(Statistics(columns=columns), rows)


class LosingLate(Losing):
    """They are lost with their masked answers: what comes before has reached the others."""

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        reply = self.fleet.next_reply(timeout_s)
        late = isinstance(reply, Reply) and reply.round in self.lost.get(reply.sender, ())
        if isinstance(reply, Reply) and late and reply.answers == f"/{reply.round}/statistics/0/{reply.sender}":
            return replace(reply, body={}, error="gone")
        return reply


@pytest.mark.parametrize("lost", [1, 4])
def test_a_round_that_is_lost_when_answers_are_on_their_way_is_asked_for_again(lost: int) -> None:
    columns, _ = one_column()
    rows = {f"s{i}": rows_of(pandas.DataFrame({"x": values}), columns) for i, values in enumerate(FIVE)}
    program = Statistics(columns=columns)
    late = {"s1": [lost], "s2": [lost]} if lost == 1 else {"s1": [lost]}
    found = summarise(program, LosingLate(Local(program, rows.__getitem__, list(rows)), late))
    undisturbed = over(program, rows)
    assert found.rounds == undisturbed.rounds + 1
    assert replace(found, rounds=0) == replace(undisturbed, rounds=0)


def test_every_answer_is_of_those_of_the_first_round() -> None:
    columns, rows = one_column([1, 2, 3.5], [4, 8], [4, 15], [16, 17])
    program = Statistics(columns=columns, collect=Clear())
    for state, report in run(program, Losing(Local(program, rows.__getitem__, list(rows)), {"b": [1]})):
        assert list(report.cohort) == (SITES if report.round == 1 else ["a", "c", "d"])
        assert state.sites == ("a", "c", "d")


# What a site takes part in


def refused(changes: Mapping[str, torch.Tensor | None], collect: Any = Clear()) -> str:
    columns, rows = one_column([1.0, 2.0], [3.0], [4.0])
    program = Statistics(columns=columns, collect=collect)
    shared = {
        "thresholds": torch.tensor([1.0], dtype=torch.float64),
        "of": torch.tensor([0]),
        "sums": torch.zeros(1, 4, dtype=torch.float64),
        "first": torch.tensor(True),
    }
    sent = {name: tensor for name, tensor in {**shared, **changes}.items() if tensor is not None}
    fleet = Local(program, rows.__getitem__, list(rows))
    fleet.submit(Request(to="a", op="statistics", round=1, shared=sent))
    reply = fleet.next_reply()
    assert isinstance(reply, Reply)
    return reply.error or ""


@pytest.mark.parametrize(
    "changes",
    [
        {"thresholds": None},
        {"thresholds": torch.zeros(1)},
        {"thresholds": torch.zeros(2, dtype=torch.float64)},
        {"of": torch.tensor([1])},
        {"of": torch.tensor([-1])},
        {"sums": torch.zeros(2, 4, dtype=torch.float64)},
        {"sums": torch.full((1, 4), math.nan, dtype=torch.float64)},
        {"first": torch.tensor(1)},
    ],
)
def test_a_question_of_another_form_is_refused(changes: Mapping[str, torch.Tensor | None]) -> None:
    assert refused({}) == ""
    assert "request" in refused(changes)


def test_a_question_whose_sums_are_beyond_all_rows_is_not_answered() -> None:
    assert "beyond what the rows" in refused({"sums": torch.tensor([[0.0, 10.0, 1e17, 1.0]], dtype=torch.float64)})


def test_why_a_site_fails_is_told_only_where_its_answer_would_be() -> None:
    columns, _ = one_column()
    wrong = Examples({"y": torch.zeros(2)}, torch.zeros(2))
    good = rows_of(pandas.DataFrame({"x": [1.0]}), columns)
    rows = {"a": good, "b": good, "c": good, "d": good, "e": wrong}
    for collect, said in ((Clear(), "no column 'x'"), (SecureAggregation(), "in its own log")):
        summary = over(Statistics(columns=columns, collect=collect), rows)
        assert said in summary.absent["e"]


# What is asked for


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": []}, "one column or more"),
        ({"columns": [Number(name="x"), Category(name="x")]}, "each named once"),
        ({"quantiles": (0.0,)}, "above 0 and below 1"),
        ({"quantiles": (0.5, 0.5)}, "distinct"),
        ({"quantiles": (math.nan,)}, "quantiles"),
        ({"bins": 1}, "bins"),
        ({"precision": 0.0}, "precision"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Statistics(**{"columns": [Number(name="x")], **changes})


def test_nothing_is_known_before_the_first_round() -> None:
    program = Statistics(columns=[Number(name="x")])
    with pytest.raises(BadInput, match="nothing is known"):
        program.summary(program.init())


def test_a_summary_is_json() -> None:
    columns, rows = one_column([1, 2], [3, None], [None])
    plain = over(Statistics(columns=[*columns]), rows).to_plain()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["rows"] == 5
