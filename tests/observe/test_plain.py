import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput
from fedelta.core.program import Report
from fedelta.observe.plain import from_plain, to_plain

names = st.text(max_size=10)
numbers = st.dictionaries(names, st.floats(allow_nan=False), max_size=4)
reports = st.builds(
    Report,
    round=st.integers(1, 10**12),
    metrics=numbers,
    cohort=st.lists(names, max_size=4).map(tuple),
    per_site=st.dictionaries(names, numbers, max_size=3),
    absent=st.dictionaries(names, names, max_size=4),
    refused=st.lists(names, max_size=4).map(tuple),
    bytes_down=st.integers(0, 2**70),
    bytes_up=st.integers(0, 2**70),
    seconds=numbers,
    stop=st.none() | names,
)


@given(reports)
def test_a_report_comes_back_exactly(report: Report) -> None:
    assert from_plain(json.loads(json.dumps(to_plain(report), allow_nan=False))) == report


def test_every_field_of_a_report_is_written() -> None:
    assert list(to_plain(Report(round=1))) == [field.name for field in dataclasses.fields(Report)]


def test_nan_comes_back() -> None:
    assert math.isnan(from_plain(to_plain(Report(round=1, metrics={"loss": math.nan}))).metrics["loss"])


@pytest.mark.parametrize(
    "changed",
    [
        {"round": "1"},
        {"round": True},
        {"metrics": {"loss": "0.5"}},
        {"metrics": [1]},
        {"metrics": {"loss": True}},
        {"absent": {"a": 1}},
        {"cohort": "abc"},
        {"cohort": [1]},
        {"per_site": {"a": 1.0}},
        {"stop": 1},
        {"unknown": 1},
    ],
)
def test_anything_else_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="not the report of a round"):
        from_plain({**to_plain(Report(round=1)), **changed})  # type: ignore[dict-item]


@pytest.mark.parametrize("plain", [None, [], "x", {}])
def test_values_that_are_no_report_are_refused(plain: object) -> None:
    with pytest.raises(BadInput, match="not the report of a round"):
        from_plain(plain)  # type: ignore[arg-type]
