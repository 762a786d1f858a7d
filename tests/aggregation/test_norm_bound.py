"""Updates beyond a norm are refused; the others are aggregated as without the bound."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.aggregation.mean import Mean
from fedelta.aggregation.norm_bound import NormBound
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.core.errors import BadInput, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.messages import Update
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import run
from fedelta.fleet.local import Local
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.secure.aggregation import SecureAggregation


def update(values: list[float], weight: float = 1.0) -> Update:
    vector = torch.tensor(values)
    return Update(values=Parameters(Layout.of({"w": vector}), vector), weight=weight)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6), st.floats(0.1, 50))
def test_what_is_beyond_the_norm_is_refused(values: list[float], norm: float) -> None:
    found = NormBound(norm=norm).refuse(update(values))
    assert (found is None) == (math.sqrt(math.fsum(value * value for value in values)) <= norm)


def test_the_rule_still_refuses_what_it_cannot_take() -> None:
    assert "weight" in str(NormBound(norm=10.0).refuse(update([1.0], weight=-1.0)))
    assert "allowed" in str(NormBound(norm=10.0).refuse(update([math.nan])))


def test_the_aggregate_is_that_of_the_rule() -> None:
    updates = [update([1.0, -2.0], 3.0), update([0.5, 0.25], 1.0)]
    found, known = NormBound(norm=5.0)(updates, 2), Mean()(updates, 2)
    assert torch.equal(found.values.vector, known.values.vector)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_the_norm_is_checked(norm: float) -> None:
    with pytest.raises(BadInput, match=r"NormBound\.norm must be"):
        NormBound(norm=norm)


def site(name: str) -> Examples:
    scale = 1e3 if name == "d" else 1.0
    x = scale * torch.randn(12, 3, generator=torch.Generator().manual_seed(ord(name)))
    return Examples.of((x, (x.sum(dim=1) > 0).long()))


def test_a_site_that_would_move_the_mean_too_far_is_absent() -> None:
    task = Task(model=lambda: torch.nn.Linear(3, 2), objective=Classification(classes=2))
    algorithm = FedAvg(task=task, training=Training(optimizer=SGD(lr=0.1), batch=12))
    program = Federation(algorithm=algorithm, rounds=1, rule=NormBound(norm=1.0))
    ((_, report),) = run(program, Local(program, site, list("abcd")))
    assert list(report.absent) == ["d"]
    assert "and 1 is allowed" in report.absent["d"]
    with pytest.raises(UnsoundCombination, match="reveals only their sum"):
        Federation(algorithm=algorithm, rounds=1, rule=NormBound(norm=1.0), collect=SecureAggregation())
