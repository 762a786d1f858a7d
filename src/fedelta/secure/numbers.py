"""A number as three integers that can be masked and added over sites without any loss: weights, losses, counts.

Fixed point in units of 2^-60: a number is rounded to the nearest unit (half to even), an error of at most 2^-61, and
of none where it is a multiple of 2^-60, as every float64 of magnitude 2^-8 or more is. The integer is written as low +
2^34 middle + 2^68 high with low and middle in [0, 2^34) and high in [-2^32, 2^32], so that a sum of 2^26 of them keeps
every limb within 2^60: it cannot wrap in 64 bits. Sums are exact: a sum's error is that of its terms' roundings alone.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedelta.core.errors import BadInput, BadTensors

LARGEST = 2.0**40  # of the magnitude of one number
TERMS = 2**26  # of a sum
LIMBS = 3
_UNITS = 60  # a unit is 2^-60
_LIMB = 34  # bits
_LOW = 2**_LIMB - 1
_TOP = 2**32  # of the magnitude of the high limb: 2^(40 + 60 - 2 * 34)


def encode(number: float) -> NDArray[np.int64]:
    """`number`, of magnitude at most 2^40, as three limbs (int64, the low one first).

    Raises BadInput beyond that, or for a number that is not finite.
    """
    number = float(number)
    if not abs(number) <= LARGEST:  # also catches NaN
        raise BadInput(f"a number in a secure sum must be finite and of magnitude at most 2^40, got {number}")
    units = round(math.ldexp(number, _UNITS))  # ldexp is exact here; round takes half to even
    return np.array([units & _LOW, units >> _LIMB & _LOW, units >> 2 * _LIMB], dtype=np.int64)


def decode(limbs: NDArray[Any]) -> Fraction:
    """The exact sum of the numbers, 2^26 at most, whose encodings were added up to `limbs` (3 of int64).

    Raises BadTensors for another shape or dtype, or for limbs that no such sum has (a mask that was not taken off).
    """
    if limbs.shape != (LIMBS,) or limbs.dtype != np.int64:
        raise BadTensors(f"a number in a secure sum has 3 limbs of int64, got {limbs.dtype} of shape {limbs.shape}")
    low, middle, high = values = limbs.tolist()
    if not _possible(values):
        raise BadTensors(f"limbs {values} are of no sum of numbers within 2^40; was every mask taken off?")
    return Fraction(low + (middle << _LIMB) + (high << 2 * _LIMB), 2**_UNITS)


def _possible(limbs: Sequence[int]) -> bool:
    """Whether at most TERMS encodings can add up to these limbs."""
    low, middle, high = limbs
    return 0 <= low <= TERMS * _LOW and 0 <= middle <= TERMS * _LOW and abs(high) <= TERMS * _TOP
