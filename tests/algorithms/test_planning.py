"""A federation's plan, chosen on the data of its sites."""

import pytest

from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.planning import planned
from fedelta.algorithms.sampling import Fixed
from fedelta.core.examples import Examples
from fedelta.core.parameters import Parameters
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.training import Training
from small_task import plain_task, site_data, task

DATA = site_data(30)
ALGORITHM = FedAvg(task=plain_task(), training=Training(optimizer=SGD(lr=0.1), batch=5))


def federation(**changes: object) -> Federation[Parameters]:
    return Federation(algorithm=ALGORITHM, rounds=1, **changes)  # type: ignore[arg-type]


def site(name: str) -> Examples:
    if name == "site-0":
        raise FileNotFoundError(2, "no such file", name)
    return DATA[name][:0] if name == "site-1" else DATA[name]


def test_a_plan_is_settled_on_the_sites_that_have_data() -> None:
    found, said = planned(federation(), site, list(DATA))
    assert found.plan.settled
    assert found.plan.cohort in {1, 16, 30}
    assert said
    assert found.algorithm is ALGORITHM


@pytest.mark.parametrize(("size", "workers"), [(3, 1), (6, 2)])
def test_a_worker_with_few_sites_trains_them_one_by_one(size: int, workers: int) -> None:
    found, said = planned(federation(sampling=Fixed(size=size)), site, list(DATA), workers=workers)
    assert found.plan == Plan().plain
    assert "too few sites" in said


def test_a_settled_plan_asks_no_site() -> None:
    def never(name: str) -> Examples:
        raise AssertionError(name)

    plan = Plan(cohort=4, channels_last=False)
    assert planned(federation(plan=plan), never, list(DATA))[0].plan == plan


def test_no_site_with_data_leaves_the_plain_way() -> None:
    assert planned(federation(), site, ["site-0", "site-1"])[0].plan == Plan().plain
    random = Federation(algorithm=FedAvg(task=task(), training=ALGORITHM.training), rounds=1)
    assert planned(random, site, list(DATA))[0].plan == Plan().plain
