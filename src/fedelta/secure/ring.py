"""Updates as integers modulo a power of two, in which masks cancel, and their sums as a mean.

Weight × value is rounded to the grid of core/grid.py, on which no sum over the cohort can wrap around: that is checked
where the integers are made. A float32 vector is one integer an element; one in float64 is two, one for the grid and one
for what is between its points; a number (the weight, a loss) is three, exact to 2^-61 (numbers.py). Vectors of whole
numbers (`Terms.whole`) are taken modulo 2^16 or 2^32 as they are, and their sums are centred at zero.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.grid import Terms, add_products, divide, halves, joined, magnitude
from fedelta.core.messages import Tensors
from fedelta.secure import numbers

_MAX_FORM = 2**20  # bytes
_WHOLE: Mapping[int, type[np.signedinteger[Any]]] = {16: np.int16, 32: np.int32}


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an encoded update consists of; the same at all sites of a sum, and no secret."""

    float32: Mapping[str, int]  # vectors, and how long they are
    float64: Mapping[str, int]
    numbers: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Tensors) -> "Form":
        """Raises BadInput for tensors that cannot be added."""
        vectors: dict[torch.dtype, dict[str, int]] = {torch.float32: {}, torch.float64: {}}
        scalars = []
        for name, tensor in sorted(tensors.items()):
            if tensor.ndim == 1 and tensor.dtype in vectors:
                vectors[tensor.dtype][name] = len(tensor)
            elif tensor.ndim == 0 and tensor.dtype == torch.float64:
                scalars.append(name)
            else:
                raise BadInput(f"{name!r} is {tensor.dtype} with {tensor.ndim} dimensions, which no secure sum can add")
        return cls(float32=vectors[torch.float32], float64=vectors[torch.float64], numbers=tuple(scalars))

    @property
    def text(self) -> str:
        return json.dumps([self.float32, self.float64, self.numbers])

    def to_tensor(self) -> Tensor:
        return torch.frombuffer(bytearray(self.text.encode()), dtype=torch.uint8)

    @classmethod
    def from_tensors(cls, tensors: Tensors, name: str) -> "Form":
        """Read what `to_tensor` wrote, under `name`. Raises BadTensors for anything else."""
        found = tensors.get(name)
        if found is None or found.ndim != 1 or found.dtype != torch.uint8 or len(found) > _MAX_FORM:
            raise BadTensors("it does not say what it consists of")
        try:
            float32, float64, scalars = json.loads(found.numpy().tobytes().decode())
            form = cls(float32=dict(float32), float64=dict(float64), numbers=tuple(scalars))
            same = all(type(each) is str for each in scalars) and bool(torch.equal(form.to_tensor(), found))
        except (ValueError, TypeError, RecursionError):
            same = False
        lengths = [*form.float32.values(), *form.float64.values()] if same else [-1]
        if "weight" not in (form.numbers if same else ()) or not all(
            type(size) is int and size >= 0 for size in lengths
        ):
            raise BadTensors("what it says that it consists of cannot be read")
        return form


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Integers modulo 2^bits for what is float32, and modulo 2^64 for all else; `own` bounds go before a rule's."""

    bits: int
    own: Terms | None = None

    def resolution(self, terms: Terms, cohort: int) -> float:
        """What weight × value of a float32 vector is a multiple of."""
        return 2.0 ** -(self.own or terms).exponent(cohort, self.bits)

    def integers(self, tensors: Tensors, form: Form, terms: Terms, cohort: int) -> dict[str, NDArray[Any]]:
        """An encoded update of this form as vectors of integers. Raises BadInput for what is out of bounds."""
        limbs = np.concatenate([_encoded(name, float(tensors[name])) for name in form.numbers])
        if terms.whole is not None:
            if float(tensors["weight"]) != 1:
                raise BadInput("its weight is not 1, and where whole numbers are added all sites count alike")
            values = _whole([tensors[name] for name in (*form.float32, *form.float64)], terms.whole)
            return {"values": values, "halves": np.zeros(0, dtype=np.int64), "numbers": limbs}
        return {**self._grid(tensors, form, terms, cohort), "numbers": limbs}

    def _grid(self, tensors: Tensors, form: Form, terms: Terms, cohort: int) -> dict[str, NDArray[Any]]:
        """The vectors on the grids of their dtypes."""
        weight, wide, narrow = float(tensors["weight"]), terms, self.own or terms
        limit = min(wide.weight_bound, narrow.weight_bound)
        if not 0 <= weight <= limit:
            raise BadInput(f"its weight is not within 0 and {limit:g}; raise weight_bound, or lower the weight")
        values = np.zeros(sum(form.float32.values()), dtype=np.int32 if self.bits == 32 else np.int64)
        scale = math.ldexp(weight, narrow.exponent(cohort, self.bits))
        _fill(values, {name: tensors[name] for name in form.float32}, scale, narrow.bound)
        coarse, scale = 2.0 ** -wide.exponent(cohort), math.ldexp(weight, wide.exponent(cohort))
        parts = {name: halves(tensors[name], coarse, wide.bound) for name in form.float64}
        pair = np.zeros((2, sum(form.float64.values())), dtype=np.int64)
        for row, place in zip(pair, (0, 1), strict=True):
            _fill(row, {name: both[place] for name, both in parts.items()}, scale, wide.bound)
        return {"values": values, "halves": pair.reshape(-1)}

    def mean(self, sums: Mapping[str, NDArray[Any]], form: Form, terms: Terms, cohort: int) -> dict[str, Tensor]:
        """The encoded mean of the updates of which these are the sums. Raises BadTensors if it is none."""
        sizes = lengths(form, terms)
        if {name: len(vector) for name, vector in sums.items()} != sizes:
            raise BadTensors("its parts are not as long as it was said")
        limbs = sums["numbers"].reshape(-1, numbers.LIMBS)
        found = {name: numbers.decode(limbs[place]) for place, name in enumerate(form.numbers)}
        weight = float(found["weight"])
        if not weight > 0:
            raise BadTensors(f"the weights of its sites add up to {weight}")
        body = {name: torch.tensor(float(number), dtype=torch.float64) for name, number in found.items()}
        if terms.whole is not None:
            narrow, wide = np.split(sums["values"], [sum(form.float32.values())])
            body |= _means(narrow, form.float32, 0, weight, torch.float32)
            return body | _means(wide, form.float64, 0, weight, torch.float64)
        exponent = (self.own or terms).exponent(cohort, self.bits)
        body |= _means(sums["values"], form.float32, exponent, weight, torch.float32)
        exponent = terms.exponent(cohort)
        coarse, fine = (
            _means(row, form.float64, exponent, weight, torch.float64) for row in sums["halves"].reshape(2, -1)
        )
        return body | {name: joined(coarse[name], fine[name], 2.0**-exponent, terms.bound) for name in form.float64}


def lengths(form: Form, terms: Terms) -> dict[str, int]:
    """Of the vectors of integers that an update of this form becomes."""
    narrow, wide = sum(form.float32.values()), sum(form.float64.values())
    whole = terms.whole is not None
    return {
        "values": narrow + wide if whole else narrow,
        "halves": 0 if whole else 2 * wide,
        "numbers": numbers.LIMBS * len(form.numbers),
    }


def _whole(vectors: Sequence[Tensor], bits: int) -> NDArray[Any]:
    """Whole numbers below 2^53, modulo 2^bits. Raises BadInput for others."""
    joined = torch.cat([vector.detach().cpu().double() for vector in vectors]) if vectors else torch.zeros(0).double()
    if not bool((joined.abs() < 2.0**53).all() & (joined == joined.round()).all()):
        raise BadInput("it is not of whole numbers, as it has to be here")
    return joined.numpy().astype(np.int64).astype(_WHOLE[bits])  # wraps


def _encoded(name: str, number: float) -> NDArray[np.int64]:
    try:
        return numbers.encode(number)
    except BadInput:  # whose sentence has the number, and this one goes to the coordinator
        raise BadInput(f"its {name} is beyond 2^40, or not finite") from None


def _fill(integers: NDArray[Any], vectors: Tensors, scale: float, bound: float) -> None:
    """The products with `scale`, rounded, one vector after the other. Raises BadInput for a |value| above `bound`."""
    start = 0
    for name, vector in vectors.items():
        largest = magnitude(vector)
        if not largest <= bound:  # also catches NaN; the sentence goes to the coordinator, and tells no number of it
            raise BadInput(f"its {name} goes beyond {bound:g}; lower the learning rate, clip, or raise the bound")
        add_products(integers[start : start + len(vector)], vector.cpu(), scale, largest)
        start += len(vector)


def _means(
    sums: NDArray[Any], lengths: Mapping[str, int], exponent: int, weight: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    means, start = {}, 0
    for name, size in lengths.items():
        means[name] = torch.empty(size, dtype=dtype)
        divide(means[name], sums[start : start + size], exponent, weight)
        start += size
    return means
