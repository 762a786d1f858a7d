import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedelta.core.errors import BadInput
from fedelta.observe.intervals import interval

values = st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 3)), min_size=2, max_size=20)


@given(values=values, confidence=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_interval_is_that_of_scipy(values: list[float], confidence: float) -> None:
    spread = stats.sem(values)
    result = interval(values, confidence)
    assert result.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    low, high = stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=spread) if spread else (0, 0)
    assert result.half == pytest.approx((high - low) / 2, rel=1e-6, abs=1e-6)


def test_the_published_quantile_for_three_values() -> None:
    """t(0.975, 2) = 4.303 in every table; the standard deviation of 1, 2, 3 is 1."""
    result = interval([1.0, 2.0, 3.0])
    assert result.half is not None
    assert result.half * math.sqrt(3) == pytest.approx(4.303, abs=5e-4)
    assert (result.low + result.high) / 2 == pytest.approx(2.0)


def test_one_value_has_no_interval() -> None:
    assert interval([0.9]).half is None


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([1.0, 2.0], 1.0), ([1.0, 2.0], math.nan)])
def test_what_has_no_interval_is_refused(values: list[float], confidence: float) -> None:
    with pytest.raises(BadInput, match="interval"):
        interval(values, confidence)
