"""Numbers as limbs: rounding to units of 2^-60, exact sums, no wrap-around at the extremes, and what is refused."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedelta.core.errors import BadInput, BadTensors
from fedelta.secure.masks import add_mask
from fedelta.secure.numbers import decode, encode

UNIT = Fraction(1, 2**60)
BOUND = 2.0**40
NUMBERS = st.floats(-BOUND, BOUND, allow_subnormal=True) | st.floats(-1, 1) | st.floats(-(2.0**-55), 2.0**-55)
EXTREMES = [
    0.0,
    -0.0,
    BOUND,
    -BOUND,
    math.nextafter(BOUND, 0),
    -math.nextafter(BOUND, 0),
    1.0,
    -1.0,
    2.0**-60,
    -(2.0**-60),
    2.0**-26,
    5e-324,
    -5e-324,
    -(2.0**8) - 2.0**-26 + 2.0**-44,
]


def rounded(number):
    """To the nearest unit, half to even: as `Fraction` rounds."""
    return round(Fraction(number) / UNIT) * UNIT


@given(NUMBERS)
@example(2.0**-61)
@example(3 * 2.0**-61)
@example(-(2.0**-61))
@example(math.nextafter(2.0**-61, 1))
@settings(max_examples=300, deadline=None)
def test_a_number_comes_back_rounded_to_the_nearest_unit(number):
    limbs = encode(number)
    assert limbs.dtype == np.int64
    assert limbs.shape == (3,)
    got = decode(limbs)
    assert got == rounded(number)
    assert abs(got - Fraction(number)) <= UNIT / 2
    if abs(number) >= 2.0**-8:
        assert got == Fraction(number)


@given(st.integers(-(2**100), 2**100))
@settings(deadline=None)
def test_every_multiple_of_a_unit_is_exact(units):
    number = float(units * UNIT)
    if Fraction(number) == units * UNIT:
        assert decode(encode(number)) == units * UNIT


@given(st.lists(NUMBERS | st.sampled_from(EXTREMES), min_size=1, max_size=60))
@settings(max_examples=150, deadline=None)
def test_sums_are_exact(numbers):
    total = decode(sum((encode(number) for number in numbers), np.zeros(3, np.int64)))
    assert total == sum((rounded(number) for number in numbers), Fraction())


@pytest.mark.parametrize("number", EXTREMES)
def test_a_sum_of_2_to_the_26_does_not_wrap(number):
    many = encode(number)
    for _ in range(26):  # doubled by the wrapping addition that sums are taken with
        np.add(many, many, out=many)
    assert decode(many) == 2**26 * rounded(number)


@given(st.integers(-(2**100), 2**100))
@settings(deadline=None)
def test_limbs_are_small_enough_for_2_to_the_26_of_them(units):
    low, middle, high = encode(float(units * UNIT)).tolist()
    assert 0 <= low < 2**34
    assert 0 <= middle < 2**34
    assert abs(high) <= 2**32
    assert 2**26 * 2**34 < 2**63


@given(st.lists(NUMBERS, min_size=2, max_size=5), st.binary(min_size=32, max_size=32))
@settings(max_examples=40, deadline=None)
def test_masked_sums_are_exact(numbers, key):
    limbs = [encode(number) for number in numbers]
    add_mask([limbs[0]], key, 1)
    add_mask([limbs[-1]], key, -1)
    assert decode(sum(limbs[1:], limbs[0])) == sum(map(rounded, numbers), Fraction())


def test_numpy_numbers_and_integers():
    assert decode(encode(np.float32(0.1))) == Fraction(float(np.float32(0.1)))
    assert decode(encode(np.float64(-3.25))) == Fraction(-13, 4)
    assert decode(encode(2**40)) == 2**40
    assert decode(encode(True)) == 1


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, math.nextafter(BOUND, math.inf), -2e12, 1e300])
def test_a_number_out_of_bounds_is_refused(number):
    with pytest.raises(BadInput, match="finite and of magnitude at most 2"):
        encode(number)


@pytest.mark.parametrize(
    "limbs", [np.zeros(2, np.int64), np.zeros((3, 1), np.int64), np.zeros(3, np.int32), np.zeros(3), np.zeros(0)]
)
def test_other_than_three_limbs_are_refused(limbs):
    with pytest.raises(BadTensors, match="3 limbs of int64"):
        decode(limbs)


@pytest.mark.parametrize(
    "limbs", [[-1, 0, 0], [0, -1, 0], [2**60, 0, 0], [0, 2**60, 0], [0, 0, 2**58 + 1], [0, 0, -(2**62)]]
)
def test_limbs_of_no_sum_are_refused(limbs):
    with pytest.raises(BadTensors, match="no sum of numbers"):
        decode(np.array(limbs))


def test_a_mask_left_on_is_noticed():
    limbs = encode(1.0)
    add_mask([limbs], bytes(32), 1)  # one key in 8,192 would pass; this one is fixed
    with pytest.raises(BadTensors, match="was every mask taken off"):
        decode(limbs)
