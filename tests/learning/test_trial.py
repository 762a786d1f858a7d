"""How an execution plan is settled. No test depends on which way is faster."""

import pytest
import torch
from torch import nn

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.learning.trial import settle

TRAINING = Training(optimizer=SGD(lr=0.1), batch=4)
TABLES = [Examples.of((torch.randn(9, 6), torch.randint(0, 3, (9,)))) for _ in range(20)]
IMAGES = [Examples.of((torch.randn(9, 1, 6, 6), torch.randint(0, 3, (9,)))) for _ in range(20)]


def tables(*layers: nn.Module) -> Task:
    return Task(model=lambda: nn.Sequential(*layers, nn.Linear(6, 3)), objective=Classification(classes=3))


def images() -> Task:
    return Task(
        model=lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)),
        objective=Classification(classes=3),
    )


def test_everything_is_settled_and_said() -> None:
    for task, data in ((tables(), TABLES), (images(), IMAGES)):
        trial = settle(Plan(), task, TRAINING, data, seed=0, at_most=20)
        assert trial.plan.settled
        assert trial.plan.cohort in {1, 16, 20}
        assert trial.said.startswith("one by one" if trial.plan.cohort == 1 else f"{trial.plan.cohort} sites at once")
        assert trial.said.count(" at once ") + trial.said.count(" at once,") == 2  # both sizes, with their times


def test_what_the_user_settled_stays() -> None:
    assert settle(Plan(cohort=7, channels_last=True), images(), TRAINING, IMAGES, 0, 20).plan == Plan(
        cohort=7, channels_last=True
    )
    assert settle(Plan(cohort=7), tables(), TRAINING, TABLES, 0, 20).plan == Plan(cohort=7, channels_last=False)
    assert settle(Plan(cohort=1), images(), TRAINING, IMAGES, 0, 20).plan.cohort == 1
    assert settle(Plan(bf16=True), tables(nn.Dropout(0.5)), TRAINING, TABLES, 0, 20).plan == Plan(
        cohort=1, channels_last=False, bf16=True
    )


def test_a_cohort_that_cannot_be_is_refused_where_the_user_asked_for_it() -> None:
    with pytest.raises(BadInput, match="draws random numbers"):
        settle(Plan(cohort=4), tables(nn.Dropout(0.5)), TRAINING, TABLES, 0, 20)


@pytest.mark.parametrize(
    ("layer", "at_most", "reason"),
    [
        (nn.Dropout(0.5), 20, "draws random numbers"),
        (nn.BatchNorm1d(6), 20, "BatchNorm"),
        (nn.Identity(), 3, "too few sites"),
    ],
)
def test_one_by_one_has_a_reason(layer: nn.Module, at_most: int, reason: str) -> None:
    trial = settle(Plan(), tables(layer), TRAINING, TABLES, seed=0, at_most=at_most)
    assert trial.plan == Plan().plain
    assert reason in trial.said


def test_code_that_vmap_does_not_know_is_trained_one_by_one() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x  # a branch on a value

    trial = settle(Plan(), tables(Branches()), TRAINING, TABLES, seed=0, at_most=20)
    assert trial.plan.cohort == 1
    assert "vmap" in trial.said


def test_a_trial_changes_no_random_numbers() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    settle(Plan(), tables(), TRAINING, TABLES, seed=0, at_most=20)
    assert torch.equal(torch.rand(3), expected)


def test_plans_are_checked_and_read_back() -> None:
    with pytest.raises(BadInput, match="cohort must be >= 1"):
        Plan(cohort=0)
    with pytest.raises(BadInput, match="no device"):
        Plan(device="abacus")
    assert Plan.parse({"threads": 1, "cohort": 3, "channels_last": True, "bf16": False, "device": "cpu"}) == Plan(
        cohort=3, channels_last=True
    )
    for wrong in (None, {"sites": "one by one"}, {"cohort": -1}, 7):
        with pytest.raises(BadInput):
            Plan.parse(wrong)
