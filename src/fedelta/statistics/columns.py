"""What is asked of a table: its columns, of which sort they are, and a site's rows in that form.

Columns are public: all parties agree on them before anything is counted. What a column's values are at a single site
is not. Numbers come with a public range or none; text comes with the values that are told apart, and all others count
as "other".
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples

if TYPE_CHECKING:
    import pandas

MISSING = ("?", "na", "n/a", "nan", "null", "none", "-")  # what stands for no value, beside blank text, in any case
FARTHEST = 1e18  # of either end of a range


@dataclass(frozen=True, kw_only=True)
class Number:
    """A column of numbers. Those outside of `low` .. `high` are counted, and count nowhere else.

    Without a range, one is found from counts over the sites that holds all values up to 10^18 in magnitude.
    """

    name: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise BadInput(f"the range of {self.name!r} has one end; give low and high, or neither")
        if self.low is None or self.high is None:
            return
        if not -FARTHEST <= self.low < self.high <= FARTHEST:  # also catches NaN
            raise BadInput(
                f"the range of {self.name!r} must be from a number to a larger one, within 10^18, got "
                f"{self.low:g} to {self.high:g}"
            )
        if self.high - self.low < 1e-9 * max(abs(self.low), abs(self.high), 1e-9):
            raise BadInput(f"the range of {self.name!r} is too narrow for float64: {self.low!r} to {self.high!r}")


@dataclass(frozen=True, kw_only=True)
class Category:
    """A column of a few values. Without any, its rows are counted as given or missing, and nothing more."""

    name: str
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        canonical = [_canonical(value) for value in self.values]
        if "" in canonical or len(set(canonical)) < len(canonical):
            raise BadInput(f"the values of {self.name!r} must be distinct, and none blank, got {list(self.values)}")


Column = Number | Category


def rows_of(table: "pandas.DataFrame", columns: Sequence[Column], missing: Collection[str] = MISSING) -> Examples:
    """The columns of a site's table in the form in which they are counted.

    Numbers are float64[n], with NaN for what is missing; categories int64[n]: the place of the value, the number of
    values for another one, -1 for what is missing. `missing` is compared in lower case and without blanks around it,
    numbers as numbers; blank text, None and NaN are always missing, and a declared value never is.

    Raises BadInput for a column that is not there, or of lists, and for a number that is none, or is infinite.
    """
    inputs = {}
    marks = marks_of(missing)
    for column in columns:
        if column.name not in table.columns:
            there = ", ".join(repr(str(name)) for name in table.columns[:12])
            raise BadInput(f"there is no column {column.name!r} but {there}; columns are the same at all sites")
        codes, distinct = _distinct(
            column.name, table[column.name]
        )  # what pandas calls missing is the last of what is read
        if isinstance(column, Number):
            read = _numbers(column.name, distinct, marks)[codes]
            _check_finite(column.name, read)
            inputs[column.name] = torch.from_numpy(read)
        else:
            inputs[column.name] = torch.from_numpy(_places(column, distinct, marks)[codes])
    if not inputs:
        raise BadInput("there is no column to look at; name one at least")
    return Examples(inputs, torch.zeros(len(table), dtype=torch.int64))


def marks_of(missing: Collection[str]) -> frozenset[str]:
    """What stands for no value, in the form in which `is_missing` compares it."""
    return frozenset(_canonical(mark).lower() for mark in missing)


def is_missing(text: str, marks: frozenset[str]) -> bool:
    return not text.strip() or _canonical(text).lower() in marks


def number_of(text: str) -> float | None:
    """None for what is no number."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _numbers(name: str, distinct: Sequence[object], marks: frozenset[str]) -> npt.NDArray[np.float64]:
    """The numbers that distinct values are, and NaN at the end. Raises BadInput for a value that is none."""
    found = []
    for value in distinct:
        text = str(value)
        number = math.nan if is_missing(text, marks) else number_of(text)
        if number is None:
            shown = text if len(text) <= 40 else text[:37] + "..."
            raise BadInput(
                f"column {name!r} is of numbers and has {shown!r}; say that it means no value (missing), or declare "
                "the column's values (categories)"
            )
        found.append(number)
    return np.array([*found, math.nan], dtype=np.float64)


def _places(column: Category, distinct: Sequence[object], marks: frozenset[str]) -> npt.NDArray[np.int64]:
    """The place of each distinct value among those that are declared."""
    exact = {value.strip(): place for place, value in enumerate(column.values)}
    alike = {_canonical(value): place for place, value in enumerate(column.values)}
    found = []
    for value in distinct:
        text = str(value).strip()
        place = exact.get(text, alike.get(_canonical(text)))
        found.append(place if place is not None else -1 if is_missing(text, marks) else len(column.values))
    return np.array([*found, -1], dtype=np.int64)


def _canonical(text: str) -> str:
    """One text for 3, 3.0 and "3"."""
    number = number_of(text.strip())
    if number is None or not math.isfinite(number):
        return text.strip()
    return str(int(number)) if number.is_integer() else repr(number)


def _distinct(name: str, column: "pandas.Series[Any]") -> tuple[npt.NDArray[np.int64], Sequence[object]]:
    """Codes[n], with -1 for what pandas calls missing, and the distinct values."""
    import pandas

    try:
        codes, distinct = pandas.factorize(column)
    except TypeError:
        raise BadInput(
            f"column {name!r} has lists in it, and only numbers and text are counted; leave it out"
        ) from None
    return np.asarray(codes, dtype=np.int64), list(distinct)


def _check_finite(name: str, found: npt.NDArray[np.float64]) -> None:
    infinite = np.isinf(found)
    if infinite.any():
        raise BadInput(
            f"column {name!r} has an infinite value in row {int(infinite.argmax())} (counted from 0); drop that row, "
            "or leave the column out"
        )
