"""A run in which all breaks that can break, and the same model as if nothing had happened."""

from pathlib import Path

import pytest
from tests.fleet.chaos import Chaos
from tests.fleet.chaos_checks import check


@pytest.mark.parametrize("rounds", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_that_happens_to_processes_and_streams_loses_or_doubles_a_round(rounds: int, tmp_path: Path) -> None:
    seen = Chaos(tmp_path, seed=9, rounds=rounds, limit_s=800, tell=lambda _line: None).run()
    print(check(seen))
