"""A federation that trains many sites at once, against the same one by one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from fedelta.aggregation.mean import Mean
from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdam, FedOpt
from fedelta.algorithms.fedprox import FedProx
from fedelta.algorithms.parts import Stage
from fedelta.algorithms.sampling import Fixed
from fedelta.core.errors import TooFewSites
from fedelta.core.examples import Examples
from fedelta.core.messages import Update
from fedelta.core.parameters import Parameters
from fedelta.core.program import Report, Sight, Site, SiteData, run
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.training import Training
from small_task import plain_task, site_data, task

TRAINING = Training(optimizer=SGD(lr=0.1, momentum=0.5), batch=5, epochs=2)
DATA = site_data(11)
AVERAGED = FedAvg(task=plain_task(), training=TRAINING)


@dataclass(frozen=True)
class Halve:
    """A stage that needs the single update: it halves those of sites with an even number of rows."""

    def on_site(self, update: Update, site: Site) -> Update:
        factor = 0.5 if len(site.data().train) % 2 == 0 else 1.0
        return replace(update, values=update.values.like(update.values.vector * factor))

    def on_arrival(self, update: Update) -> Update:
        return replace(update, values=update.values.like(update.values.vector * 2))

    def on_total(self, total: Update) -> Update:
        return replace(total, values=total.values.like(total.values.vector / 2))


@dataclass(frozen=True)
class Largest:
    """A rule that compares single updates: the one with the largest norm."""

    needs: ClassVar[Sight] = Sight.EACH

    def refuse(self, update: Update) -> str | None:
        return None

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        # what arrives may be memory that is used again
        found = max(
            (replace(u, values=u.values.like(u.values.vector.clone())) for u in updates),
            key=lambda update: float(update.values.vector.norm()),
        )
        return replace(found, count=cohort)


def federation(cohort: int, algorithm: Algorithm[Any] = AVERAGED, **changes: Any) -> Federation[Any]:
    settings: dict[str, Any] = {"rounds": 3, "seed": 3, "plan": Plan(cohort=cohort), **changes}
    return Federation(algorithm=algorithm, **settings)


def finished(
    program: Federation[Any], site: Callable[[str], object] = DATA.__getitem__, workers: int = 0
) -> tuple[Parameters, list[Report]]:
    names = list(DATA)
    if not workers:
        reports = list(run(program, Local(program, site, names)))
    else:
        with Workers(program, site, names, workers=workers) as fleet:
            reports = list(run(program, fleet))
    return program.algorithm.parameters(reports[-1][0].algorithm), [report for _, report in reports]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm": FedProx(task=plain_task(), training=TRAINING, mu=0.5)},
        {"algorithm": FedOpt(client=AVERAGED, server=FedAdam())},
        {"stages": (Halve(),)},
        {"rule": Largest()},
        {"stages": (Halve(),), "rule": Largest(), "sampling": Fixed(size=6)},
        {"sampling": Fixed(size=7)},
    ],
    ids=["fedavg", "fedprox", "fedopt", "stage", "rule of each", "both", "sampled"],
)
@pytest.mark.parametrize("cohort", [3, 50])
def test_at_once_equals_one_by_one(changes: dict[str, Any], cohort: int) -> None:
    expected, slow = finished(federation(1, **changes))
    found, fast = finished(federation(cohort, **changes))
    torch.testing.assert_close(found.vector, expected.vector, rtol=1e-4, atol=1e-5)
    for one, other in zip(slow, fast, strict=True):
        assert other.metrics == pytest.approx(one.metrics, rel=1e-4)
        for field in ("cohort", "absent", "bytes_down", "bytes_up"):
            assert getattr(one, field) == getattr(other, field)


@pytest.mark.parametrize("stages", [(), (Halve(),)])
def test_local_and_workers_give_the_same_bits(stages: Sequence[Stage]) -> None:
    ends = [finished(federation(3, stages=stages), workers=workers)[0].vector for workers in (0, 1, 3)]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def broken(name: str) -> object:
    """Sites with every fault that one of many can have."""
    data = DATA[name]
    if name == "site-1":
        raise FileNotFoundError(2, "No such file or directory", "rows.csv")
    if name == "site-2":
        return data[:0]
    if name == "site-3":
        return Examples.of((data.inputs["x"], data.targets + 5))
    if name == "site-4":
        return Examples.of((torch.full_like(data.inputs["x"], float("nan")), data.targets))
    if name == "site-5":
        return Examples.of((data.inputs["x"] * 1e4, data.targets))  # its update is out of the rule's bound
    return SiteData(train=data)


def test_a_site_that_fails_is_absent_for_the_same_reason_as_one_by_one() -> None:
    changes: dict[str, Any] = {"rule": Mean(bound=16.0), "rounds": 1}
    expected, slow = finished(federation(1, **changes), broken)
    found, fast = finished(federation(4, **changes), broken)
    assert fast[0].absent.keys() == {"site-1", "site-2", "site-3", "site-4", "site-5"}
    for name, reason in slow[0].absent.items():
        assert fast[0].absent[name][:40] == reason[:40]
    torch.testing.assert_close(found.vector, expected.vector, rtol=1e-4, atol=1e-5)


def test_examples_of_other_shapes_are_trained_beside_each_other() -> None:
    """Texts of different lengths, say: here rows of 6 numbers, or of 2 x 6 whose mean the model takes."""

    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(x.reshape(len(x), -1, 6).mean(1))
            return out

    def site(name: str) -> Examples:
        data = DATA[name]
        wide = data.inputs["x"][:, None].repeat(1, 2, 1)
        return Examples.of((wide, data.targets)) if name in {"site-2", "site-7"} else data

    own = replace(AVERAGED, task=replace(plain_task(), model=Mean))
    torch.testing.assert_close(
        finished(federation(5, own), site)[0].vector, finished(federation(1, own), site)[0].vector
    )


def test_a_model_that_draws_random_numbers_says_so() -> None:
    random = FedAvg(task=task(), training=TRAINING)
    with pytest.raises(TooFewSites, match=r"BatchNorm.*set Plan\.cohort to 1"):
        finished(federation(4, random))
