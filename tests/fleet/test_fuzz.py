"""Inputs of the fuzzer (fuzz.py), whole and damaged, without the fuzzer."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fleet.fuzz_targets import at_the_coordinator, one_input, packed, seeds, unpacked

from fedelta.fleet.wire import CHUNK

SEEDS = seeds()


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_what_comes_in_is_taken_or_refused(number: int) -> None:
    one_input(SEEDS[number])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_damaged_is_taken_or_refused(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from([seed for seed in SEEDS if len(seed) > 9])))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    one_input(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


def test_frames_come_out_of_an_input_as_they_went_in() -> None:
    came = [b"", b"x" * 300, b"\x06a" + bytes(CHUNK - 1), b"y"]
    assert list(unpacked(packed(came))) == came
    assert len(packed(came)) < 400


def test_the_replies_among_them_reach_the_coordinator() -> None:
    """Or the fuzzer would begin with what is refused at the door."""
    answered = [asyncio.run(at_the_coordinator(list(unpacked(seed[1:])))) for seed in SEEDS if seed[0] == 0]
    assert sum(bool(one) for one in answered) >= 3
