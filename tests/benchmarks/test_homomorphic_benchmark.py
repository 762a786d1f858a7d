"""The benchmark of encrypted sums measures what it says."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.homomorphic import cost, table

from fedelta.secure.ckks import WIDTH
from fedelta.secure.homomorphic import HomomorphicEncryption
from fedelta.secure.key_party import KeyParty

pytest.importorskip("tenseal")


def test_costs_are_of_a_sum_that_is_right() -> None:
    party = KeyParty(most=4, once=False)
    collect = HomomorphicEncryption(most=4, public=party.public, opener=party)
    found = cost(collect, party, 4, 5000, 0)
    assert 0 < found.error <= found.bound < 1e-8
    assert 2 * WIDTH < found.bytes < 2.01 * WIDTH
    assert 20_000 < found.plain < 20_500
    assert len(table({5000: [found], 6000: [found]})) == 9
