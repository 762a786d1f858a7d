"""Sums over sites one of which lies: what no rows have ends a summary, and keeps what is known."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.statistics.test_statistics import number, one_column, over

from fedelta.algorithms.parts import Clear
from fedelta.core.errors import BadTensors
from fedelta.core.messages import Reply, Request
from fedelta.core.program import Site
from fedelta.statistics.program import Statistics
from fedelta.statistics.summary import Summary


@dataclass(frozen=True, kw_only=True)
class Lying(Statistics):
    """Site a's answer to the given round has something else added to it."""

    round: int = 1
    lie: Callable[[torch.Tensor], torch.Tensor] = field(default=torch.zeros_like, metadata={"digest": False})

    def handle(self, request: Request, site: Site) -> Reply:
        reply = super().handle(request, site)
        if site.id != "a" or request.round != self.round:
            return reply
        value = reply.body["value"]
        return replace(reply, body={**reply.body, "value": value + self.lie(value)})


def told_lies(round: int, lie: Callable[[torch.Tensor], torch.Tensor]) -> Summary:
    columns, rows = one_column([1.25, 2, 3.5], [4, 8, 12.75], [4, 15, None], [0.5, 6, 7])
    return over(Lying(columns=columns, collect=Clear(), round=round, lie=lie), rows)


@settings(max_examples=40, deadline=None)
@given(round=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_a_lie_ends_a_summary_at_worst(round: int, seed: int) -> None:
    generator = np.random.default_rng(seed)

    def lie(value: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(generator.integers(-9, 10, len(value)).astype(float))

    if round == 1:
        with suppress(BadTensors):  # where nothing is known yet
            told_lies(round, lie)
    else:
        found = told_lies(round, lie)
        own = number(found)
        assert (found.rows, own.missing, own.within) == (12, 1, 11)
        assert all(quantile.low < quantile.high for quantile in own.quantiles.values())


@pytest.mark.parametrize("round", [2, 3, 4, 5])
@pytest.mark.parametrize("by", [-100.0, 100.0])
def test_what_is_known_stays_when_sums_cannot_be(round: int, by: float) -> None:
    found = told_lies(round, lambda value: torch.full_like(value, by))
    assert found.ended is not None
    assert "a site lies" in found.ended
    assert (found.rows, found.rounds) == (12, round)
    assert (number(found).bins is not None) == (number(found).mean is not None)
    assert json.loads(json.dumps(found.to_plain(), allow_nan=False)) == found.to_plain()


@pytest.mark.parametrize("by", [1e12, math.nan])
def test_an_answer_beyond_all_rows_is_not_added(by: float) -> None:
    found = told_lies(1, lambda value: torch.full_like(value, by))
    assert found.rows == 9
    assert "beyond what the rows of any site add up to" in found.absent["a"]
