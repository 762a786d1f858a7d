import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.observe.text import bytes_text, metric_text, number_text, plural, seconds_text

_UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}


@given(st.integers(0, 10**17))
def test_bytes_are_right_to_half_a_percent(count: int) -> None:
    number, unit = bytes_text(count).split()
    assert float(number) * _UNITS[unit] == pytest.approx(count, rel=0.006)
    assert len(number.replace(".", "")) <= 3


@given(st.floats(1e-3, 1e11))
def test_numbers_are_right_to_four_digits(value: float) -> None:
    assert float(number_text(value).replace(",", "")) == pytest.approx(value, rel=6e-4)


@given(st.floats(0.001, 1e6))
def test_seconds_are_right_to_their_last_digit(seconds: float) -> None:
    text = seconds_text(seconds)
    scales = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
    parts = [(float(number), scales[unit]) for number, unit in re.findall(r"([\d.]+) (ms|min|s|h)", text)]
    assert sum(number * scale for number, scale in parts) == pytest.approx(
        seconds, rel=0.06, abs=60 if "h" in text else 0.51
    )
    assert all(number < 60 for number, scale in parts if scale == 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (metric_text("test_accuracy", 0.8734), "87.3%"),
        (metric_text("validation/accuracy", 1.0), "100.0%"),
        (metric_text("test_loss", 0.41234), "0.4123"),
        (metric_text("train_loss", math.nan), "nan"),
        (metric_text("test_accuracy", math.inf), "inf"),
        (number_text(12345.6), "12,346"),
        (number_text(0.0), "0"),
        (number_text(-0.00001234), "-1.234e-05"),
        (number_text(3.0), "3"),
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(1720000), "1.72 MB"),
        (bytes_text(999_600), "1.00 MB"),
        (seconds_text(0.034), "34 ms"),
        (seconds_text(59.7), "1 min 00 s"),
        (seconds_text(7500), "2 h 05 min"),
        (plural(1, "site"), "1 site"),
        (plural(1200, "site"), "1,200 sites"),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert text == expected
