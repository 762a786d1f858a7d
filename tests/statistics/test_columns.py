"""Columns, and a site's rows in their form."""

import math

import pandas
import pytest
import torch

from fedelta.core.errors import BadInput
from fedelta.statistics.columns import Category, Column, Number, rows_of


def test_numbers_are_read_as_python_reads_them() -> None:
    table = pandas.DataFrame({"x": ["1", " 2.50 ", "?", "", None, "NaN", "-3e2", "0.1", "n/a"]})
    found = rows_of(table, [Number(name="x")]).inputs["x"]
    expected = [1.0, 2.5, math.nan, math.nan, math.nan, math.nan, -300.0, 0.1, math.nan]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)


def test_columns_of_other_types_are_numbers_too() -> None:
    table = pandas.DataFrame({"x": [1, 2, 3], "y": [0.5, math.nan, 2.0]})
    found = rows_of(table, [Number(name="x"), Number(name="y")]).inputs
    assert found["x"].tolist() == [1, 2, 3]
    assert found["y"][1].isnan()
    assert found["y"].dtype == torch.float64


def test_a_declared_value_is_one_in_all_its_forms_and_never_missing() -> None:
    table = pandas.DataFrame({"x": ["1.0", "1", "2", " none ", "NONE", "", "3", "1e0"]})
    found = rows_of(table, [Category(name="x", values=("1", "none"))]).inputs["x"]
    assert found.tolist() == [0, 0, 2, 1, -1, -1, 2, 0]


def test_what_is_missing_can_be_said() -> None:
    table = pandas.DataFrame({"x": ["1", "unknown", "Unknown ", "2"]})
    assert rows_of(table, [Number(name="x")], ["unknown"]).inputs["x"].isnan().tolist() == [False, True, True, False]
    assert (
        rows_of(pandas.DataFrame({"x": ["-9", "-9.0", "9"]}), [Number(name="x")], ["-9"]).inputs["x"].isnan().sum() == 2
    )
    with pytest.raises(BadInput, match=r"'\?'.*missing"):
        rows_of(pandas.DataFrame({"x": ["?"]}), [Number(name="x")], ["unknown"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["1", "tall"], "'tall'"),
        (["1_000"], "'1_000'"),
        (["0", "inf"], "infinite value in row 1"),
        (["x" * 99], r"x\.\.\.'"),
    ],
)
def test_what_is_no_number_is_refused(values: list[str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        rows_of(pandas.DataFrame({"x": values}), [Number(name="x")])


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadInput, match="no column 'y' but 'x'"):
        rows_of(pandas.DataFrame({"x": ["1"]}), [Number(name="y")])
    with pytest.raises(BadInput, match="no column"):
        rows_of(pandas.DataFrame({"x": ["1"]}), [])


@pytest.mark.parametrize(
    "arguments",
    [
        {"low": 1.0},
        {"low": 2.0, "high": 1.0},
        {"low": 0.0, "high": math.nan},
        {"low": 0.0, "high": math.inf},
        {"low": 1.0, "high": 1.0 + 1e-12},
    ],
)
def test_a_range_that_is_none_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="range of 'x'"):
        Number(name="x", **arguments)


@pytest.mark.parametrize("values", [("a", "a"), ("1", "1.0"), ("a", " ")])
def test_values_that_cannot_be_told_apart_are_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match="distinct"):
        Category(name="x", values=values)


@pytest.mark.parametrize("column", [Number(name="x"), Category(name="x", values=("1",))])
def test_lists_are_refused(column: Column) -> None:
    with pytest.raises(BadInput, match="'x' has lists in it"):
        rows_of(pandas.DataFrame({"x": [[1], [2]]}), [column])
