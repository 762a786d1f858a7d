"""Updates as digits, against fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.grid import Terms
from fedelta.secure.digits import Digits
from fedelta.secure.ring import Form

WIDE = Terms()
NARROW = Terms(bound=4.0, weight_bound=2.0**10)


def digits(bits: int = 26) -> Digits:
    return Digits(bits=bits, narrow=NARROW, wide=WIDE)


def update(floats: list[float], doubles: list[float], weight: float, loss: float) -> dict[str, torch.Tensor]:
    return {
        "difference": torch.tensor(floats, dtype=torch.float32),
        "moments": torch.tensor(doubles, dtype=torch.float64),
        "weight": torch.tensor(weight, dtype=torch.float64),
        "sum/loss": torch.tensor(loss, dtype=torch.float64),
    }


sites = st.lists(
    st.tuples(
        st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
        st.lists(st.floats(-256, 256), min_size=2, max_size=2),
        st.floats(0, 2**10),
        st.floats(-(2**40), 2**40),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(16, 34), given=sites)
def test_a_mean_is_off_by_no_more_than_is_stated(bits: int, given: list[tuple]) -> None:
    coder = digits(bits)
    updates = [update(*one) for one in given]
    form = Form.of(updates[0])
    whole = [coder.whole(one, form) for one in updates]
    for own in whole:
        assert len(own) == coder.length(form)
        assert np.array_equal(own, np.rint(own))
        assert np.abs(own).max() <= 2**bits
    sums = sum(own.astype(np.int64) for own in whole)
    weight = sum(Fraction(one[2]) for one in given)
    if float(weight) < 2.0**-40:
        return
    found = coder.mean(np.append(sums, np.zeros(5, dtype=np.int64)), form)  # what fills the last ciphertext up
    assert found.keys() == updates[0].keys()
    assert (
        abs(Fraction(float(found["weight"])) - weight) <= len(given) * Fraction(2) ** -61 + weight * Fraction(2) ** -53
    )
    losses = sum(Fraction(one[3]) for one in given)
    assert abs(Fraction(float(found["sum/loss"])) - losses) <= len(given) * Fraction(2) ** -61 + abs(losses) / 2**53
    slack = len(given) * (2.0**-61 + 2.0**-50 * float(weight)) / float(weight)  # of the weights, and of products
    for name, place, bound, largest in (
        ("difference", 0, len(given) * coder.resolution / (2 * float(weight)), 4.0),
        ("moments", 1, len(given) * 2.0 ** (28 - 80) / float(weight), 256.0),
    ):
        exact = [sum(Fraction(one[place][i]) * Fraction(one[2]) for one in given) / weight for i in range(3 - place)]
        rounding = 2.0**-24 * largest if name == "difference" else 0.0
        for value, known in zip(found[name].tolist(), exact, strict=True):
            assert abs(value - float(known)) <= bound + rounding + slack * largest * 4


def test_resolution_is_the_bounds_over_the_bits() -> None:
    assert digits(26).resolution == 4.0 * 2**10 / 2**26
    assert Digits(bits=26, narrow=Terms(bound=1.0, weight_bound=1.0), wide=WIDE).resolution == 2.0**-26


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"difference": torch.tensor([0.0, 4.1, 0.0])}, "its difference goes beyond 4"),
        ({"difference": torch.tensor([0.0, torch.nan, 0.0])}, "its difference goes beyond 4"),
        ({"moments": torch.tensor([0.0, 257.0]).double()}, "its moments goes beyond 256"),
        ({"weight": torch.tensor(2000.0).double()}, "its weight is not within 0 and 1024"),
        ({"weight": torch.tensor(-1.0).double()}, "its weight is not within 0 and 1024"),
        ({"sum/loss": torch.tensor(torch.inf).double()}, "its sum/loss is beyond 2\\^40, or not finite"),
    ],
)
def test_what_is_out_of_bounds_is_refused_and_not_told(changes: dict[str, torch.Tensor], sentence: str) -> None:
    wrong = {**update([1.0, 2.0, 3.0], [4.0, 5.0], 6.0, 7.0), **changes}
    with pytest.raises(BadInput, match=sentence) as caught:
        digits().whole(wrong, Form.of(wrong))
    assert not any(number in str(caught.value) for number in ("4.1", "257", "2000", "nan", "inf,"))


def test_sums_without_a_weight_have_no_mean() -> None:
    nothing = update([0.0] * 3, [0.0] * 2, 0.0, 0.0)
    form = Form.of(nothing)
    with pytest.raises(BadTensors, match=r"add up to 0\.0"):
        digits().mean(digits().whole(nothing, form).astype(np.int64), form)


def test_numbers_alone_are_an_update() -> None:
    numbers = {name: tensor for name, tensor in update([], [], 3.0, 1.1).items() if not tensor.ndim}
    form = Form.of(numbers)
    found = digits().mean(2 * digits().whole(numbers, form).astype(np.int64), form)
    assert {name: float(tensor) for name, tensor in found.items()} == {"weight": 6.0, "sum/loss": 2.2}
