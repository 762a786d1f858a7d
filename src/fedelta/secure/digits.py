"""Updates as whole numbers of few bits, which can be added up encrypted, and their sums as a mean.

With b bits for a number of one site (ckks.py): weight × value of a float32 vector is rounded to a multiple of 2^-b of
the largest that it may be; one of float64 takes as many digits of b bits as give it 80; a number (the weight, a loss)
is written in units of 2^-60, and its sum is exact. Digits are signed, the first one the largest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.grid import Terms, add_products, divide, magnitude
from fedelta.core.messages import Tensors
from fedelta.secure.ring import Form

LARGEST = 2.0**40  # of the magnitude of one number
_WIDE = 80  # bits of a float64
_UNITS = 60  # a unit of a number is 2^-60
_NUMBER = 102  # bits of a number in these units, with its sign and what rounding may carry


@dataclass(frozen=True, kw_only=True)
class Digits:
    """`narrow` are the bounds of float32 vectors, `wide` those of float64."""

    bits: int
    narrow: Terms
    wide: Terms

    @property
    def resolution(self) -> float:
        """What weight × value of a float32 vector is rounded to a multiple of."""
        return 2.0 ** -self._exponent(self.narrow)

    def length(self, form: Form) -> int:
        """How many whole numbers an update of this form becomes."""
        narrow, wide = sum(form.float32.values()), sum(form.float64.values())
        return narrow + self._of_wide * wide + self._of_number * len(form.numbers)

    def whole(self, tensors: Tensors, form: Form) -> NDArray[np.float64]:
        """An encoded update of this form. Raises BadInput for what is out of bounds, with no number of it."""
        weight = float(tensors["weight"])
        limit = (self.narrow if form.float32 else self.wide).weight_bound
        if not 0 <= weight <= limit:
            raise BadInput(f"its weight is not within 0 and {limit:g}; raise weight_bound, or lower the weight")
        parts = []
        scale = math.ldexp(weight, self._exponent(self.narrow))
        for name in form.float32:
            total = np.zeros(len(tensors[name]), dtype=np.int64)
            add_products(total, tensors[name].detach().cpu(), scale, _within(name, tensors[name], self.narrow.bound))
            parts.append(total.astype(np.float64))
        scale = math.ldexp(weight, self._exponent(self.wide))
        for name in form.float64:
            _within(name, tensors[name], self.wide.bound)
            parts.extend(self._wide(tensors[name].detach().cpu().numpy() * scale))
        parts.extend(self._number(name, float(tensors[name])) for name in form.numbers)
        return np.concatenate([np.zeros(0), *parts])

    def mean(self, sums: NDArray[np.int64], form: Form) -> dict[str, Tensor]:
        """The encoded mean of the updates of which these are the sums. Raises BadTensors if it is none."""
        narrow, wide = sum(form.float32.values()), self._of_wide * sum(form.float64.values())
        vectors, digits, limbs = np.split(sums[: self.length(form)], [narrow, narrow + wide])
        totals = [self._total(found) for found in limbs.reshape(-1, self._of_number)]
        numbers = dict(zip(form.numbers, map(float, totals), strict=True))
        weight = numbers["weight"]
        if not weight > 0:
            raise BadTensors(f"the weights of its sites add up to {weight}")
        body: dict[str, Tensor] = {}
        for name, part in _cut(vectors, form.float32, 1).items():
            body[name] = torch.empty(len(part), dtype=torch.float32)
            divide(body[name], part, self._exponent(self.narrow), weight)
        for name, part in _cut(digits, form.float64, self._of_wide).items():
            total = np.zeros(form.float64[name])
            for row in reversed(part.reshape(self._of_wide, -1)):  # the small ones first
                total = np.ldexp(total, -self.bits) + row
            body[name] = torch.from_numpy(np.ldexp(total, -self._exponent(self.wide)) / weight)
        return body | {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}

    def _exponent(self, terms: Terms) -> int:
        """Binary digits behind the point, with which one site's numbers take `bits`."""
        return terms.exponent(1, self.bits + 2)

    @property
    def _of_wide(self) -> int:
        return -(-_WIDE // self.bits)

    @property
    def _of_number(self) -> int:
        return -(-_NUMBER // self.bits)

    def _wide(self, products: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """The digits of numbers of magnitude up to 2^bits; all steps but the last rounding are exact."""
        found = []
        for _ in range(self._of_wide):
            found.append(np.rint(products))
            products = np.ldexp(products - found[-1], self.bits)
        return found

    def _number(self, name: str, number: float) -> NDArray[np.float64]:
        if not abs(number) <= LARGEST:  # also catches NaN
            raise BadInput(f"its {name} is beyond 2^40, or not finite")
        units, base = round(math.ldexp(number, _UNITS)), 2**self.bits
        found = []
        for _ in range(self._of_number - 1):
            low = (units + base // 2) % base - base // 2
            found.append(low)
            units = (units - low) // base
        return np.array([units, *reversed(found)], dtype=np.float64)

    def _total(self, digits: NDArray[np.int64]) -> Fraction:
        """The exact sum of numbers."""
        units = 0
        for digit in digits.tolist():
            units = units * 2**self.bits + digit
        return Fraction(units, 2**_UNITS)


def _within(name: str, vector: Tensor, bound: float) -> float:
    largest = magnitude(vector)
    if not largest <= bound:  # also catches NaN; the sentence goes to the coordinator, and tells no number of it
        raise BadInput(f"its {name} goes beyond {bound:g}; lower the learning rate, clip, or raise the bound")
    return largest


def _cut(vector: NDArray[np.int64], lengths: Mapping[str, int], times: int) -> dict[str, NDArray[np.int64]]:
    """The parts of the single vectors, one after the other."""
    ends = np.cumsum([times * length for length in lengths.values()])[:-1]
    return dict(zip(lengths, np.split(vector, ends), strict=True)) if lengths else {}
