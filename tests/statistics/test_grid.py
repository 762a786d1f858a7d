"""Steps and ladders of public numbers."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.statistics.grid import LADDER, Step, before


@given(k=st.integers(-(10**9), 10**9), power=st.integers(-4, 3))
def test_a_step_is_the_number_that_text_is(k: int, power: int) -> None:
    step = Step(unit=Fraction(10) ** power)
    number = float(f"{k}e{power}")
    assert step.at(k) == number
    assert step.below(number) == step.above(number) == k
    assert step.below(before(number)) == k - 1
    assert step.above(math.nextafter(number, math.inf)) == k + 1


@given(number=st.floats(-1e12, 1e12), power=st.integers(-4, 3))
def test_below_and_above_are_next_to_a_number(number: float, power: int) -> None:
    step = Step(unit=Fraction(10) ** power)
    assert step.at(step.below(number)) <= number < step.at(step.below(number) + 1)
    assert step.at(step.above(number) - 1) < number <= step.at(step.above(number))


@given(size=st.floats(1e-12, 1e18))
def test_decimal_and_binary_steps_are_the_next_ones(size: float) -> None:
    decimal, binary = Step.decimal(size).unit, Step.binary(size).unit
    assert size <= decimal < Fraction(size) * Fraction(5, 2)
    assert (decimal * 10**15).numerator in [times * 10**power for times in (1, 2, 5) for power in range(40)]
    assert binary <= size < 2 * binary


@pytest.mark.parametrize(
    ("size", "unit"), [(1, "1"), (1.01, "2"), (0.021, "0.05"), (5, "5"), (5.1, "10"), (0.3, "0.5")]
)
def test_decimal_steps(size: float, unit: str) -> None:
    assert Step.decimal(size).unit == Fraction(unit)


def test_the_ladder_is_of_powers_of_ten() -> None:
    assert list(LADDER) == sorted(LADDER)
    assert [-step for step in reversed(LADDER)] == list(LADDER)
    assert LADDER[-25:] == tuple(float(f"1e{power}") for power in range(-6, 19))
