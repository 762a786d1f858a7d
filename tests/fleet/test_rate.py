"""A bucket of tokens, beside one that remembers every token that was taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput
from fedelta.fleet.limits import Limits
from fedelta.fleet.rate import Bucket, Rate


def test_a_burst_then_the_rate() -> None:
    bucket = Bucket(Rate(per_minute=60, burst=3), now=100.0)
    assert [bucket.take(1, 100.0) for _ in range(4)] == [0, 0, 0, 1.0]
    assert bucket.take(1, 100.5) == 0.5
    assert bucket.take(1, 101.0) == 0
    assert bucket.take(4, 1000.0) == 1.0  # more than there can ever be
    assert bucket.take(3, 1000.0) == 0


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 5)), max_size=40), st.integers(1, 8), st.integers(1, 6))
def test_no_stretch_of_time_has_more_than_a_burst_and_the_rate(
    steps: list[tuple[int, int]], burst: int, per_second: int
) -> None:
    bucket = Bucket(Rate(per_minute=60 * per_second, burst=burst), now=0.0)
    now, taken = 0.0, []
    for pause, tokens in steps:
        now += pause / 64  # exact in floating point
        if bucket.take(tokens, now) == 0:
            taken.append((now, tokens))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            stretch = taken[last][0] - taken[first][0]
            assert sum(tokens for _, tokens in taken[first : last + 1]) <= burst + per_second * stretch + 1e-9


@given(st.integers(1, 5), st.integers(1, 20))
def test_after_the_seconds_it_says_there_is_enough(tokens: int, spent: int) -> None:
    bucket = Bucket(Rate(per_minute=60, burst=5), now=0.0)
    for _ in range(spent):
        bucket.take(1, 0.0)
    wait = bucket.take(tokens, 0.0)
    assert wait == 0 or bucket.take(tokens, wait) == 0


def test_a_rate_of_nothing_is_refused() -> None:
    for wrong in ({"per_minute": 0, "burst": 1}, {"per_minute": 1, "burst": float("nan")}):
        with pytest.raises(BadInput, match="per_minute and burst > 0"):
            Rate(**wrong)
    assert Limits().streams == Rate(per_minute=60, burst=20)
