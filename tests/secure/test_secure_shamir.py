"""Shamir's sharing: any threshold of shares gives the secret back, fewer say nothing, malformed ones are refused."""

import contextlib
import secrets

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core.errors import BadInput, BadTensors
from fedelta.secure.shamir import PRIME, SHARE_BYTES, Interpolation, split


def combine(shares):
    return Interpolation(tuple(shares)).at_zero(tuple(shares.values()))


SECRETS = st.binary(min_size=32, max_size=32) | st.sampled_from([bytes(32), b"\xff" * 32])
POINTS = st.lists(st.integers(1, 2**32) | st.integers(PRIME - 9, PRIME - 1), min_size=1, max_size=12, unique=True)


@st.composite
def sharings(draw):
    points = draw(POINTS)
    return draw(SECRETS), points, draw(st.integers(1, len(points)))


def test_the_prime_is_the_least_above_all_secrets():
    assert sympy.isprime(PRIME)
    assert sympy.nextprime(2**256) == PRIME
    assert (PRIME - 1).bit_length() <= 8 * SHARE_BYTES


@given(sharings(), st.data())
@settings(max_examples=60, deadline=None)
def test_any_threshold_of_the_shares_gives_the_secret_back(sharing, data):
    secret, points, threshold = sharing
    shares = dict(zip(points, split(secret, points, threshold), strict=True))
    assert all(len(share) == 33 for share in shares.values())
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, len(points)))]
    assert combine({point: shares[point] for point in chosen}) == secret


@given(sharings())
@settings(max_examples=8, deadline=None)
def test_shares_lie_on_a_polynomial_through_the_secret_as_sympy_interpolates_it(sharing):
    secret, points, threshold = sharing
    points = [point % 997 + 1000 * index + 1 for index, point in enumerate(points)]
    shares = [int.from_bytes(share) for share in split(secret, points, threshold)]
    x = sympy.Symbol("x")
    for chosen in (points[:threshold], points[-threshold:]):
        through = [(point, shares[points.index(point)]) for point in chosen]
        value = sympy.Rational(sympy.interpolate(through, x).subs(x, 0))
        assert value.p * pow(value.q, -1, PRIME) % PRIME == int.from_bytes(secret)


@given(SECRETS, SECRETS, st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_fewer_shares_than_the_threshold_fit_every_secret(secret, other, threshold):
    points = list(range(1, threshold + 1))
    shares = split(secret, points, threshold)
    # There is one last share with which the same others are of another secret: Lagrange at 0, solved for it.
    interpolation = Interpolation(points)
    rest = sum(c * int.from_bytes(share) for c, share in zip(interpolation.coefficients, shares[:-1], strict=False))
    last = (int.from_bytes(other) - rest) * pow(interpolation.coefficients[-1], -1, PRIME) % PRIME
    assert interpolation.at_zero([*shares[:-1], last.to_bytes(33)]) == other


def test_shares_of_one_secret_are_spread_over_the_whole_field():
    # The top 3 bits of 2^256-bit values, 8 bins of 4,000: chi-square with 7 degrees of freedom, P[> 70] is 1e-12.
    shares = [split(bytes(32), [1], 1)[0] for _ in range(3)]
    assert set(shares) == {bytes(33)}  # with threshold 1 there is nothing random in them
    counts = [0] * 8
    for _ in range(4000):
        counts[int.from_bytes(split(bytes(32), [5, 9], 2)[1]) >> 253 & 7] += 1
    assert sum((count - 500) ** 2 / 500 for count in counts) < 70


def test_coefficients_come_from_the_operating_system_and_are_drawn_afresh(monkeypatch):
    secret = bytes(range(32))
    assert split(secret, [1, 2, 3], 3) != split(secret, [1, 2, 3], 3)
    drawn = []

    def randbelow(bound):
        drawn.append(bound)
        return len(drawn)

    monkeypatch.setattr(secrets, "randbelow", randbelow)
    value = int.from_bytes(secret)
    assert [int.from_bytes(share) for share in split(secret, [1, 10], 2)] == [value + 1, value + 10]
    assert split(secret, [10], 1) == [value.to_bytes(33)]
    assert [int.from_bytes(share) for share in split(secret, [1, 2, 10], 3)] == [
        value + 2 + 3,
        value + 2 * 2 + 3 * 4,
        value + 2 * 10 + 3 * 100,
    ]
    assert drawn == [PRIME] * 3


@given(st.lists(SECRETS, min_size=1, max_size=4), POINTS)
@settings(max_examples=30, deadline=None)
def test_one_interpolation_serves_many_secrets(several, points):
    interpolation = Interpolation(points)
    for secret in several:
        shares = split(secret, points, len(points))
        assert interpolation.at_zero(shares) == secret == combine(dict(zip(points, shares, strict=True)))


def test_too_few_shares_do_not_give_the_secret():
    secret = secrets.token_bytes(32)
    shares = split(secret, [1, 2, 3, 4], 3)
    with contextlib.suppress(BadTensors):  # that, if the value at 0 is one of the 297 that are none of 32 bytes
        assert combine({1: shares[0], 4: shares[3]}) != secret


def test_shares_whose_value_is_no_secret_of_32_bytes_are_refused():
    with pytest.raises(BadTensors, match="do not belong together"):
        combine({7: (2**256).to_bytes(33)})
    assert combine({7: (2**256 - 1).to_bytes(33)}) == b"\xff" * 32


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), PRIME.to_bytes(33), b"\xff" * 33])
def test_a_malformed_share_is_refused(share):
    with pytest.raises(BadTensors, match="a share has 33 bytes"):
        combine({1: split(bytes(32), [1, 2], 2)[0], 2: share})


def test_as_many_shares_as_points():
    with pytest.raises(BadTensors, match="one share for each of 2 points, got 1"):
        Interpolation([1, 2]).at_zero([bytes(33)])


@pytest.mark.parametrize("points", [[0], [1, 1], [-1, 2], [PRIME], [PRIME + 1, 1], []])
def test_points_that_would_show_the_secret_or_not_give_it_back_are_refused(points):
    for work in (lambda: split(bytes(32), points, 1), lambda: Interpolation(points)):
        with pytest.raises(BadInput, match="point"):
            work()


@pytest.mark.parametrize("threshold", [0, -1, 4])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(BadInput, match=f"from 1 to the number of shares, 3, got {threshold}"):
        split(bytes(32), [1, 2, 3], threshold)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_length_is_refused_and_not_shown(size):
    with pytest.raises(BadInput, match=f"32 bytes, got {size}") as caught:
        split(b"s" * size, [1], 1)
    assert "ss" not in str(caught.value)


def test_nothing_to_combine_is_refused():
    with pytest.raises(BadInput, match="one point at least"):
        combine({})
