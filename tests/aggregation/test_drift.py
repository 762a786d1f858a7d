"""The dissimilarity of a round against its definition, and the rule that measures it against the rule alone."""

import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedelta.aggregation.drift import Measured
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import ManyRule, Rule
from fedelta.core.errors import TooFewSites
from fedelta.core.messages import Update
from fedelta.core.parameters import Layout, Parameters


def update(values: Tensor, weight: float = 1.0) -> Update:
    return Update(values=Parameters(Layout.of({"w": values}), values), weight=weight)


def measured(updates: list[Update]) -> list[float]:
    told: list[float] = []
    Measured(rule=Mean(), tell=told.append)(iter(updates), len(updates))
    return told


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 5))
def test_it_is_what_the_definition_says(seed: int, sites: int, size: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(sites, size, generator=g)
    weights = torch.rand(sites, generator=g).double() + 0.1
    shares = weights / weights.sum()
    mean = (shares[:, None] * values.double()).sum(0)
    expected = float(((shares * values.double().square().sum(1)).sum() / mean.square().sum()).sqrt())
    (told,) = measured([update(row, weight) for row, weight in zip(values, weights.tolist(), strict=True)])
    assert told == pytest.approx(expected, rel=1e-4)
    assert told >= 1 - 1e-6  # by Jensen's inequality


def test_alike_at_right_angles_and_against_each_other() -> None:
    assert measured([update(torch.tensor([3.0, 4.0]))] * 5) == [pytest.approx(1.0)]
    assert measured([update(row) for row in torch.eye(4)]) == [pytest.approx(2.0)]
    assert measured([update(torch.ones(2)), update(-torch.ones(2))]) == [math.inf]
    assert measured([update(torch.zeros(2))] * 2) == []


def test_running_statistics_do_not_count() -> None:
    norm = nn.BatchNorm1d(2)
    alike = Parameters.of(norm)
    alike.trained.fill_(1.0)
    other = alike.like(alike.vector.clone())
    other["running_mean"].fill_(50.0)
    assert measured([Update(values=alike), Update(values=other)]) == [pytest.approx(1.0)]


def test_the_rule_does_what_it_did() -> None:
    rule: Rule = Measured(rule=Mean(bound=2.0), tell=lambda _: None)
    assert not isinstance(rule, ManyRule)
    assert rule.needs == Mean.needs
    good, wild = update(torch.tensor([1.0, -0.3])), update(torch.tensor([3.0, 0.0]))
    assert rule.refuse(good) is None
    assert rule.refuse(wild) == Mean(bound=2.0).refuse(wild)
    updates = [good, update(torch.tensor([0.1, 0.7]), 3.0)]
    assert torch.equal(rule(updates, 2).values.vector, Mean(bound=2.0)(updates, 2).values.vector)
    with pytest.raises(TooFewSites):
        rule([], 2)


def test_updates_are_let_go_as_they_arrive() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def arriving() -> Iterator[Update]:
        for _ in range(4):
            assert not any(reference() is not None for reference in alive)
            values = torch.ones(3)
            alive.append(weakref.ref(values))
            yield update(values)
            del values

    Measured(rule=Mean(), tell=lambda _: None)(arriving(), 4)
