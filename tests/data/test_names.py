"""Values as names."""

from decimal import Decimal

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.data.names import grouped, in_order, name_of


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (3, "3"),
        (3.0, "3"),
        (np.float32(3), "3"),
        (np.int8(-3), "-3"),
        (0.5, "0.5"),
        (True, "True"),
        ("3.0", "3.0"),
        (Decimal("1.5"), "1.5"),
        (float("inf"), "inf"),
    ],
)
def test_name_of(value: object, name: str) -> None:
    assert name_of(value) == name


@given(st.lists(st.integers()))
def test_integers_are_in_the_order_of_numbers(values: list[int]) -> None:
    assert in_order(map(str, values)) == [str(value) for value in sorted(values)]


@given(st.lists(st.text()))
def test_words_are_in_the_order_of_strings(values: list[str]) -> None:
    assert in_order([*values, "word"]) == sorted([*values, "word"])


@given(st.lists(st.one_of(st.none(), st.integers(-3, 3), st.floats(), st.sampled_from(["a", "2", " ", ""]))))
def test_grouped_is_name_of_for_every_value(values: list[object]) -> None:
    codes, names = grouped(pandas.Series(values, dtype=object))
    assert len(codes) == len(values)
    assert len(set(names)) == len(names)
    for code, value in zip(codes, values, strict=True):
        blank = value is None or value != value or not str(value).strip()
        assert (None if code < 0 else names[code]) == (None if blank else name_of(value))
