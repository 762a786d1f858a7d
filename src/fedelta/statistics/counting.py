"""A round of exact statistics: what is asked of all sites, what one answers, and how answers become one.

An answer is a vector of float64: whole numbers of rows, and sums that are divided so that none is larger than the
number of rows. It is added on the grid of core/grid.py, under masks or in the clear with the same bits: whole numbers
exactly, sums to 2^-80.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.examples import Examples
from fedelta.core.grid import Terms
from fedelta.core.messages import MOST, Tensors
from fedelta.secure.ring import Form, Ring
from fedelta.statistics.columns import Category, Column, Number
from fedelta.statistics.grid import DECIMALS
from fedelta.statistics.search import Question, impossible

TERMS = Terms(bound=float(MOST), weight_bound=1.0)
Vector = npt.NDArray[np.float64]
_MOST_ASKED = 2**20  # thresholds
_RING = Ring(bits=64)
_SORTED: "WeakKeyDictionary[Examples, dict[str, Vector]]" = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the first round tells of all rows."""

    rows: int
    missing: tuple[int, ...]  # by column
    categories: Mapping[str, tuple[int, ...]]  # for each value that was declared, and for all others
    finer: Mapping[str, tuple[int, ...]]  # values of a number column with more than d digits after the point


def asked(questions: Sequence[Question], first: bool) -> Tensors:
    """What sites are sent: the questions about the columns of numbers, and whether rows are counted, too."""
    return {
        "thresholds": torch.tensor([t for one in questions for t in one.thresholds], dtype=torch.float64),
        "of": torch.tensor([place for place, one in enumerate(questions) for _ in one.thresholds], dtype=torch.int64),
        "sums": torch.tensor(
            [[one.low, one.high, one.centre, one.width] for one in questions], dtype=torch.float64
        ).reshape(len(questions), 4),
        "first": torch.tensor(first),
    }


def answer(columns: Sequence[Column], rows: Examples, sent: Tensors) -> Tensor:
    """A site's vector. Raises BadInput for rows of other columns, BadTensors for what nobody asks."""
    numbers = [column.name for column in columns if isinstance(column, Number)]
    check_rows(columns, rows)
    _check_sent(sent, len(numbers))
    parts: list[npt.NDArray[Any]] = [*_counted(columns, rows)] if bool(sent["first"]) else []
    thresholds, of = sent["thresholds"].numpy(), sent["of"].numpy()
    for place, name in enumerate(numbers):
        parts.append(np.searchsorted(_present(rows, name), thresholds[of == place], side="right"))
    for place, name in enumerate(numbers):
        parts.append(_sums(_present(rows, name), sent["sums"][place].tolist()))
    return torch.from_numpy(np.concatenate([np.zeros(0), *parts]).astype(np.float64))


def size(columns: Sequence[Column], sent: Tensors) -> int:
    """Of an answer."""
    numbers = sum(isinstance(column, Number) for column in columns)
    categories = sum(len(column.values) + 1 for column in columns if isinstance(column, Category))
    first = 1 + len(columns) + categories + (DECIMALS + 1) * numbers
    return first * bool(sent["first"]) + len(sent["thresholds"]) + 2 * numbers


def body(vector: Tensor, terms: Terms) -> dict[str, Tensor]:
    """An answer as it is sent. Raises BadTensors for numbers that cannot be added."""
    _check_bound(vector, terms)
    one = torch.tensor(1.0, dtype=torch.float64)
    return {"value": vector, "weight": one, "count": one}


class Sum:
    """Answers of `cohort` sites at most, added up: `terms` say on what grid.

    In the clear these are the very integers that are added under masks.
    """

    def __init__(self, length: int, terms: Terms, cohort: int) -> None:
        self._length, self._terms, self._cohort = length, terms, cohort
        self._integers: dict[str, npt.NDArray[Any]] = {}
        self._mean: Tensors | None = None
        self._form: Form | None = None
        self.sites = 0

    def add(self, found: Tensors, senders: int) -> None:
        """The answer of one site, or the mean over several. Raises BadTensors for what is neither."""
        _check_body(found, self._length, senders)
        if senders == 1:
            _check_bound(found["value"], self._terms)
        self.sites += senders
        if senders > 1:
            self._mean = found
            return
        self._form = Form.of(found)
        parts = _RING.integers(found, self._form, self._terms, self._cohort)
        self._integers = {name: self._integers[name] + own if self._integers else own for name, own in parts.items()}

    def total(self) -> Tensor:
        mean = self._mean
        if mean is None:
            assert self._form is not None
            mean = _RING.mean(self._integers, self._form, self._terms, self._cohort)
        return mean["value"] * self.sites


def read_counts(columns: Sequence[Column], total: Tensor) -> tuple[Counts, Tensor]:
    """The counts of the first round, and what is left of the total. Raises BadTensors for counts of no rows."""
    values = iter(total.round().long().tolist())
    rows = next(values)
    missing = tuple(next(values) for _ in columns)
    categories, finer = {}, {}
    for column in columns:
        if isinstance(column, Category):
            categories[column.name] = tuple(next(values) for _ in range(len(column.values) + 1))
        else:
            finer[column.name] = tuple(next(values) for _ in range(DECIMALS + 1))
    rest = len([*values])
    counts = Counts(rows=rows, missing=missing, categories=categories, finer=finer)
    _check_counts(columns, counts)
    return counts, total[len(total) - rest :]


def read_questions(questions: Sequence[Question], total: Tensor) -> list[tuple[list[int], float, float]]:
    """For each question, values up to each threshold, and the two sums."""
    lengths = [len(one.thresholds) for one in questions]
    counts = torch.split(total[: sum(lengths)].round().long(), lengths)
    sums = total[sum(lengths) :].reshape(len(questions), 2).tolist()
    return [(own.tolist(), first, second) for own, (first, second) in zip(counts, sums, strict=True)]


def _counted(columns: Sequence[Column], rows: Examples) -> list[npt.NDArray[np.int64]]:
    missing, others = [], []
    for column in columns:
        values = rows.inputs[column.name].numpy()
        if isinstance(column, Category):
            missing.append(int((values < 0).sum()))
            others.append(np.bincount(values[values >= 0], minlength=len(column.values) + 1))
        else:
            missing.append(int(np.isnan(values).sum()))
            others.append(_finer(_present(rows, column.name)))
    return [np.array([len(rows), *missing], dtype=np.int64), *others]


def _finer(present: Vector) -> npt.NDArray[np.int64]:
    """How many have more than 0, 1, … digits after the point."""
    counts = []
    for digits in range(DECIMALS + 1):
        with np.errstate(over="ignore"):  # what becomes infinite has no digits that are looked for
            scaled = np.rint(present * 10.0**digits)
        counts.append(int(((scaled / 10.0**digits != present) | (np.abs(scaled) > 2.0**53)).sum()))
    return np.array(counts, dtype=np.int64)


def _present(rows: Examples, name: str) -> Vector:
    """The values that are not missing, sorted: once for all rounds."""
    kept = _SORTED.setdefault(rows, {})
    if name not in kept:
        values = rows.inputs[name].numpy()
        kept[name] = np.sort(values[~np.isnan(values)])
    return kept[name]


def _sums(present: Vector, asked: Sequence[float]) -> Vector:
    low, high, centre, width = asked
    if not width:
        return np.zeros(2)
    start, end = np.searchsorted(present, low, side="left"), np.searchsorted(present, high, side="right")
    parts = (present[start:end] - centre) / width
    return np.array([math.fsum(parts), math.fsum(parts * parts)])


def check_rows(columns: Sequence[Column], rows: Examples) -> None:
    if len(rows) > MOST:
        raise BadInput(f"a site counts up to {MOST:,} rows, and this one has {len(rows):,}")
    for column in columns:
        dtype = torch.float64 if isinstance(column, Number) else torch.int64
        found = rows.inputs.get(column.name)
        if found is None or found.dtype != dtype or found.ndim != 1:
            raise BadInput(f"this site's rows have no column {column.name!r} of {dtype}; make them with rows_of")
        outside = bool(found.isinf().any() if isinstance(column, Number) else (found > len(column.values)).any())
        if outside:
            raise BadInput(f"column {column.name!r} has values that rows_of does not make; make them with it")


def _check_sent(sent: Tensors, numbers: int) -> None:
    thresholds, of, sums, first = (sent.get(name) for name in ("thresholds", "of", "sums", "first"))
    if thresholds is None or of is None or sums is None or first is None:
        raise BadTensors("the request lacks a part of its question")
    if (
        (thresholds.dtype, of.dtype, sums.dtype, first.dtype) != (torch.float64, torch.int64, torch.float64, torch.bool)
        or (thresholds.ndim, of.shape, tuple(sums.shape), first.ndim) != (1, thresholds.shape, (numbers, 4), 0)
        or len(thresholds) > _MOST_ASKED
        or not bool(((of >= 0) & (of < numbers)).all() & sums.isfinite().all() & (sums[:, 3] >= 0).all())
    ):
        raise BadTensors("the request is no question about these columns")


def _check_body(found: Tensors, length: int, senders: int) -> None:
    value, weight, count = (found.get(name) for name in ("value", "weight", "count"))
    if value is None or weight is None or count is None or set(found) != {"value", "weight", "count"}:
        raise BadTensors("it is no answer of this program")
    if value.dtype != torch.float64 or tuple(value.shape) != (length,):
        raise BadTensors(f"it is not of the {length} numbers that were asked for")
    if weight.ndim or count.ndim or float(weight) != senders or float(count) != senders:
        raise BadTensors(f"it says that it is of {weight.tolist()} sites")


def _check_bound(value: Tensor, terms: Terms) -> None:
    if not bool((value.abs() <= terms.bound).all()):  # also catches NaN
        raise BadTensors("its sums go beyond what the rows of any site add up to")


def _check_counts(columns: Sequence[Column], counts: Counts) -> None:
    for column, missing in zip(columns, counts.missing, strict=True):
        present = counts.rows - missing
        if isinstance(column, Category):
            own = counts.categories[column.name]
            possible = sum(own) == present
        else:
            own = counts.finer[column.name]
            possible = max(own) <= present
        if min(counts.rows, missing, *own) < 0 or not possible:
            raise impossible(f"the counts of {column.name!r} do not add up to the rows")
