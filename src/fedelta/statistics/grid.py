"""Public numbers between which values are counted: decimal grids, ladders and steps that people can read.

All are of the form k * 10^e with whole k and e, rounded once to float64, so that 0.3 is the float64 that text "0.3" is.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

SMALLEST, LARGEST = -6, 18  # exponents of the ladder's steps next to 0 and at its ends
_UP = [float(Fraction(10) ** exponent) for exponent in range(SMALLEST, LARGEST + 1)]
LADDER = (*(-step for step in reversed(_UP)), 0.0, *_UP)
DECIMALS = 4  # digits after the point up to which values are recognised as lying on a decimal grid


@dataclass(frozen=True, kw_only=True)
class Step:
    """The numbers k * unit for all whole k."""

    unit: Fraction

    @classmethod
    def decimal(cls, at_least: float) -> "Step":
        """1, 2 or 5 times a power of ten, the smallest that is `at_least` (> 0)."""
        wanted, power = Fraction(at_least), math.floor(math.log10(at_least)) - 1
        while True:
            for times in (1, 2, 5):
                unit = times * Fraction(10) ** power
                if unit >= wanted:
                    return cls(unit=unit)
            power += 1

    @classmethod
    def binary(cls, at_most: float) -> "Step":
        """A power of two, the largest that is `at_most` (> 0): its multiples up to 2^53 are float64 numbers."""
        mantissa, exponent = math.frexp(at_most)
        return cls(unit=Fraction(2) ** (exponent - 1)) if mantissa else cls(unit=Fraction(1))

    def at(self, k: int) -> float:
        return float(k * self.unit)

    def below(self, number: float) -> int:
        """The largest k with at(k) <= number."""
        k = math.floor(Fraction(number) / self.unit)
        return k + 1 if self.at(k + 1) <= number else k  # 0.1 is no tenth, and yet at(1)

    def above(self, number: float) -> int:
        """The smallest k with at(k) >= number."""
        k = math.ceil(Fraction(number) / self.unit)
        return k - 1 if self.at(k - 1) >= number else k


def before(number: float) -> float:
    """The largest float64 below: values <= it are those below `number`."""
    return math.nextafter(number, -math.inf)
