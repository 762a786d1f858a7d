"""Values of a column as names: the classes of a label, the sites of a natural split.

A whole number has one name, whatever its type: 3, 3.0 and "3" are all "3". None, NaN and blank strings name nothing.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    import pandas

    Column = Sequence[Any] | npt.NDArray[Any] | Tensor | pandas.Series[Any]

_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def name_of(value: object) -> str:
    """The name of one value."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted: as numbers if all of them are, otherwise as strings."""
    everything = list(names)
    if all(_NUMBER.fullmatch(name) for name in everything):
        return sorted(everything, key=lambda name: (float(name), name))
    return sorted(everything)


def grouped(values: "Column") -> tuple[npt.NDArray[np.int64], list[str]]:
    """Codes[n] and names: row i holds names[codes[i]], or nothing where the code is -1. Names come as first met."""
    import pandas

    column = values.numpy(force=True) if isinstance(values, Tensor) else values
    codes, distinct = pandas.factorize(pandas.Series(column))
    names: dict[str, int] = {}
    code_of = np.full(len(distinct) + 1, -1, dtype=np.int64)  # the last one is for pandas' own -1
    for position, value in enumerate(distinct):
        name = name_of(value)
        if name.strip():
            code_of[position] = names.setdefault(name, len(names))
    return code_of[codes], list(names)
