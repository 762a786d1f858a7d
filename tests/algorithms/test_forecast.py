"""A forecast against the run that it is of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedelta.algorithms.algorithm import Algorithm, Incoming
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdam, FedOpt
from fedelta.algorithms.fedprox import FedProx
from fedelta.algorithms.forecast import Forecast, Link
from fedelta.algorithms.forecasting import forecast
from fedelta.algorithms.sampling import All, Fixed, Poisson, Sampling
from fedelta.algorithms.stopping import Target
from fedelta.core.errors import BadInput, TooFewSites
from fedelta.core.examples import Examples
from fedelta.core.messages import PartyId, Tensors, Update
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Report, Site, SiteData, run
from fedelta.core.seeds import derive
from fedelta.fleet.local import Local
from fedelta.learning.closed_form import LDA, Ridge
from fedelta.learning.flat import FlatModel
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Training, train
from fedelta.privacy.distributed import DistributedDP
from fedelta.privacy.example_level import ExampleLevel
from fedelta.privacy.site_level import SiteLevel
from fedelta.secure.aggregation import SecureAggregation
from small_task import plain_task, site_data, task

TRAINING = Training(optimizer=SGD(lr=0.1), batch=4)
EPOCHS = Training(optimizer=SGD(lr=0.1), batch=5, epochs=2)
STEPS = Training(optimizer=SGD(lr=0.1), batch=5, epochs=None, steps=3)
DATA = site_data(6)
NAMES = list(DATA)


def held(name: str) -> SiteData:
    """Every second site holds rows back."""
    data = DATA[name]
    return SiteData(train=data, validation=data[:4] if NAMES.index(name) % 2 else None)


@dataclass(frozen=True, kw_only=True)
class Controlled(FedAvg):
    """Sends each site something besides, not of the same size, and has each report one number more."""

    def broadcast(self, state: Parameters, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        shared, _ = super().broadcast(state, to)
        own = {name: {"control": torch.ones(1 + NAMES.index(name))} for name in to if name != "site-2"}
        return {**shared, "mean": torch.ones(3, dtype=torch.float64)}, own

    def local(self, incoming: Incoming, site: Site) -> Update:
        update = super().local(incoming, site)
        return replace(update, sums={**update.sums, "norm": float(update.values.vector.norm())})


@dataclass(frozen=True, kw_only=True)
class Half:
    """float16, and a number that says so."""

    linear: bool = False

    def encode(self, update: Update) -> Tensors:
        tensors = update.to_tensors()
        return {**tensors, "difference": tensors["difference"].half()}

    def decode(self, tensors: Tensors, layout: Layout) -> Update:
        return Update.from_tensors({**tensors, "difference": tensors["difference"].float()}, layout)


@dataclass(frozen=True)
class Noted:
    """A stage that adds a number to every update."""

    def on_site(self, update: Update, site: Site) -> Update:
        return replace(update, sums={**update.sums, "clipped": 1.0})

    def on_arrival(self, update: Update) -> Update:
        return update

    def on_total(self, total: Update) -> Update:
        return total


def federation(algorithm: Algorithm[Any] | None = None, **changes: Any) -> Federation[Any]:
    settings: dict[str, Any] = {"rounds": 3, "seed": 5, **changes}
    return Federation(algorithm=algorithm or FedAvg(task=task(), training=TRAINING), **settings)


def told(
    program: Federation[Any], load: Callable[[str], object] = held, names: Sequence[str] = tuple(NAMES)
) -> Forecast:
    return forecast(program, load, names, seconds=0.0)


def reports(
    program: Federation[Any], load: Callable[[str], object] = held, names: Sequence[str] = tuple(NAMES)
) -> list[Report]:
    return [report for _, report in run(program, Local(program, load, names))]


def sent(found: Forecast | list[Report]) -> list[tuple[int, int, int]]:
    rounds = found.rounds if isinstance(found, Forecast) else found
    return [(each.round, each.bytes_down, each.bytes_up) for each in rounds]


@pytest.mark.parametrize(
    "program",
    [
        federation(),
        federation(FedProx(task=task(), training=EPOCHS, mu=0.1), validate_at_sites=True),
        federation(FedOpt(client=FedAvg(task=task(), training=STEPS), server=FedAdam()), sampling=Fixed(size=2)),
        federation(Controlled(task=task(), training=TRAINING), sampling=Fixed(size=3)),
        federation(encoding=Half(), stages=(Noted(),), validate_at_sites=True, evaluate_every=2),
        federation(sampling=Poisson(rate=0.4), min_sites=2, rounds=8, evaluate_every=3, validate_at_sites=True),
        federation(FedAvg(task=plain_task(), training=TRAINING), plan=Plan(cohort=4), sampling=Fixed(size=5)),
        federation(FedAvg(task=plain_task(), training=TRAINING), start=LDA(), validate_at_sites=True, evaluate_every=2),
        federation(test=DATA["site-0"], evaluate_every=2),
    ],
    ids=["plain", "validated", "sampled", "own tensors", "encoded", "poisson", "at once", "closed form", "tested"],
)
def test_the_bytes_are_those_of_the_run(program: Federation[Any]) -> None:
    found, happened = told(program), reports(program)
    assert sent(found) == sent(happened)
    assert found.bytes_down == sum(report.bytes_down for report in happened)
    assert found.bytes_up == sum(report.bytes_up for report in happened)
    assert all(check.holds for check in found.checks)


def plain(**changes: Any) -> Federation[Any]:
    return federation(FedAvg(task=plain_task(), training=TRAINING), **{"collect": SecureAggregation(), **changes})


@pytest.mark.parametrize(
    "program",
    [
        plain(),
        plain(collect=SecureAggregation(bits=32), validate_at_sites=True, evaluate_every=2),
        plain(sampling=Fixed(size=5), start=LDA()),
        plain(sampling=Poisson(rate=0.5), rounds=8),
        plain(
            privacy=ExampleLevel(clip=1.0, noise=1.0), collect=SecureAggregation(bits=32), evaluate_every=9, rounds=1
        ),
        plain(collect=SecureAggregation(least=6), sampling=Poisson(rate=0.9), rounds=5),
        plain(privacy=SiteLevel(clip=1.0, noise=1.0), start=Ridge(), rounds=2),
        plain(privacy=DistributedDP(clip=1.0, noise=1.0), start=Ridge(), rounds=2),
        plain(privacy=DistributedDP(clip=1.0, noise=1.0, bits=32), sampling=Fixed(size=5)),
    ],
    ids=["64 bits", "32 bits", "sampled", "poisson", "examples", "six at least", "sites", "shares", "32-bit shares"],
)
def test_the_bytes_are_those_of_secure_sums(program: Federation[Any]) -> None:
    found, happened = told(program), reports(program)
    assert sent(found) == sent(happened)
    assert all(check.holds for check in found.checks)
    assert found.bearing is not None


@pytest.mark.parametrize("fails", [{"s5": "silent"}, {"s5": "empty"}, {"s4": "silent", "s1": "empty"}], ids=str)
def test_the_bytes_of_secure_sums_without_some_sites(fails: dict[str, str]) -> None:
    names = [f"s{number}" for number in range(9)]

    def load(name: str) -> object:
        if fails.get(name) == "silent":
            raise FileNotFoundError(2, "No such file or directory", "rows.csv")
        return DATA["site-0"][: 0 if name in fails else None]

    program = plain(rounds=2, validate_at_sites=True)
    found, happened = told(program, load, names), reports(program, load, names)
    assert sent(found) == sent(happened)
    assert happened[-1].absent.keys() == fails.keys()
    assert all(check.holds for check in found.checks)


def test_a_sum_that_too_few_answer_is_seen_before_the_run() -> None:
    def load(name: str) -> object:
        return DATA[name][:0] if name in ("site-1", "site-2") else DATA[name]

    program = plain(rounds=1)
    found, (happened,) = told(program, load), reports(program, load)
    assert sent(found) == sent([happened])
    assert len(happened.absent) == len(NAMES)
    (check,) = (check for check in found.checks if not check.holds)
    assert "round 1: 4 of 6 sites can answer, and a secure sum needs 5" in check.found


def test_the_bytes_of_a_sum_of_many_sites() -> None:
    """Each draws whom it shares with: the digits of how many drew a site are all that is not known."""
    names = [f"s{number}" for number in range(66)]
    program = plain(rounds=1, collect=SecureAggregation(colluding=0.02, dropouts=0.02))
    ((_, down, up),) = sent(told(program, lambda _: DATA["site-0"], names))
    ((_, really_down, really_up),) = sent(reports(program, lambda _: DATA["site-0"], names))
    assert abs(down - really_down) <= 16 * len(names)
    assert abs(up - really_up) <= 16 * len(names)


@settings(max_examples=10)
@given(
    sampling=st.one_of(
        st.just(All()), st.integers(1, 4).map(lambda n: Fixed(size=n)), st.floats(0.1, 1).map(lambda r: Poisson(rate=r))
    ),
    rounds=st.integers(1, 5),
    evaluate_every=st.integers(1, 6),
    validate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_bytes_are_those_of_any_schedule(
    sampling: Sampling, rounds: int, evaluate_every: int, validate: bool, seed: int
) -> None:
    program = federation(
        FedAvg(task=plain_task(), training=STEPS),
        sampling=sampling,
        rounds=rounds,
        evaluate_every=evaluate_every,
        validate_at_sites=validate,
        seed=seed,
    )
    alike = NAMES[2:]  # in size: one of them is rehearsed
    assert sent(told(program, held, alike)) == sent(reports(program, held, alike))


def broken(name: str) -> object:
    data = DATA[name]
    if name == "site-1":
        raise FileNotFoundError(2, "No such file or directory", "rows.csv")
    if name == "site-2":
        return data[:0]
    if name == "site-3":
        return SiteData(train=Examples.of((data.inputs["x"], data.targets + 5)), validation=data)
    if name == "site-4":
        return SiteData(train=data[:1], validation=Examples.of((data.inputs["x"].double(), data.targets)))
    return SiteData(train=data, validation=data[:0])


@pytest.mark.parametrize("start", [None, LDA()])
def test_sites_without_usable_data_are_known_to_fail(start: LDA | None) -> None:
    """With BatchNorm, for which one row is too few; in closed form it is enough."""
    program = federation(validate_at_sites=True, start=start)
    found, happened = told(program, broken), reports(program, broken)
    assert sent(found) == sent(happened)
    failing = {site.name for site in found.sites if "train" in site.failures}
    assert failing == happened[-1].absent.keys() == {"site-1", "site-2", "site-3", "site-4"}
    assert {site.name for site in found.sites if "evaluate" in site.failures} == happened[-1].unmeasured.keys()


def test_too_few_sites_are_seen_before_the_run() -> None:
    program = federation(min_sites=3)
    enough = next(check for check in told(program, broken).checks if check.what == "enough sites answer")
    assert not enough.holds
    assert "round 1: 2 of 6" in enough.found
    with pytest.raises(TooFewSites, match="2 of 6"):
        reports(program, broken)
    with pytest.raises(TooFewSites, match="min_sites=7"):
        told(federation(min_sites=7))
    with pytest.raises(TooFewSites, match=r"3 under SecureAggregation\("):
        told(plain(), held, NAMES[:2])
    with pytest.raises(BadInput, match=r"no site can train; site-1: .*No such file"):
        told(federation(), broken, ["site-1", "site-2"])


def test_a_site_whose_work_fails_is_named() -> None:
    wide = Training(optimizer=SGD(lr=0.1), batch=1)
    with pytest.raises(BadInput, match=r"site site-\d, when its work was tried out: BatchNorm needs batches of two"):
        told(federation(FedAvg(task=task(), training=wide)))
    odd = Task(model=lambda: nn.Linear(5, 3), objective=Classification(classes=3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        told(federation(FedAvg(task=odd, training=TRAINING)))


@pytest.mark.parametrize("training", [TRAINING, EPOCHS, STEPS, Training(optimizer=SGD(lr=0.1), batch=3)])
def test_steps_are_those_of_training(training: Training) -> None:
    found = told(federation(FedAvg(task=task(), training=training)))
    for site in found.sites:
        model = FlatModel(task().build(0))
        sums = train(model, DATA[site.name], task().objective, training, round=1, seed=derive(0, site.name))
        assert site.steps == sums["steps"]


def test_what_travels_and_what_is_frozen() -> None:
    def partly_frozen() -> nn.Module:
        module = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.BatchNorm1d(8))
        module[0].requires_grad_(False)
        return nn.Sequential(module, nn.Linear(8, 3))

    partly = Task(model=partly_frozen, objective=Classification(classes=3))
    found = told(federation(FedAvg(task=partly, training=TRAINING)))
    assert (found.frozen, found.frozen_bytes) == (56, 224)
    assert found.trained == 2 * 72 + 16 + 27
    assert [(group.name, group.tensors, group.elements, group.buffers) for group in found.groups] == [
        ("*.*.*", 4, 144, False),
        ("*.*", 2, 16, False),
        ("*", 2, 27, False),
        ("*.*", 3, 17, True),
    ]
    pieces = {piece.name: piece.shape for piece in found.tiers[0].rehearsal.update}
    assert pieces["difference"] == (found.trained + 17,)
    assert pieces["sum/loss"] == ()


def test_sites_of_unequal_sizes_are_looked_at_apart() -> None:
    def unequal(name: str) -> Examples:
        return DATA[name][:4] if name == "site-0" else DATA[name]

    assert [tier.site.name for tier in told(federation(), unequal).tiers] == ["site-0", "site-2", "site-5"]
    assert [tier.called for tier in told(federation(), unequal, NAMES[:2]).tiers] == ["smallest", "largest"]
    alike = told(federation(), unequal, NAMES[1:4])
    assert [(tier.called, tier.site.name) for tier in alike.tiers] == [("median", "site-2")]


def test_a_link_takes_its_time() -> None:
    link = Link(down_mbit=8.0, up_mbit=2.0, latency_ms=50.0)
    assert link.seconds(1_000_000, 500_000) == pytest.approx(0.1 + 1.0 + 2.0)
    for wrong in ({"down_mbit": 0.0}, {"up_mbit": float("nan")}, {"latency_ms": -1.0}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Link(**wrong)


def test_the_time_of_a_round_is_that_of_its_slowest_site() -> None:
    program = federation(sampling=Fixed(size=2), validate_at_sites=True, evaluate_every=3, test=DATA["site-0"])
    found, link = told(program), Link(down_mbit=0.5, up_mbit=0.1, latency_ms=10.0)
    sites = {site.name: site for site in found.sites}

    def alone(op: str, name: str) -> float:
        site = sites[name]
        return site.seconds[op] + link.seconds(site.bytes_down[op], site.bytes_up[op])

    expected, here = [], []
    for report in reports(program):
        evaluation = report.round == 3
        test = len(DATA["site-0"]) * found.tiers[0].rehearsal.test_row_s * evaluation
        expected.append(test + max(alone("train", name) for name in report.cohort))
        here.append(test + sum(sites[name].seconds["train"] for name in report.cohort))
        if evaluation:
            expected[-1] += max(alone("evaluate", name) for name in NAMES)
            here[-1] += sum(sites[name].seconds["evaluate"] for name in NAMES)
    assert found.seconds(link) == pytest.approx(expected)
    assert found.seconds_here() == pytest.approx(here)


def test_memory_grows_with_the_batch() -> None:
    """4 numbers for each of 2**20 outputs of a row: 16 rows more are at least 64 MB more."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            wide = x.repeat(1, 2**18).relu() + 1
            return self.one(wide.view(len(x), -1, 6).mean(1))

    wide = Task(model=Wide, objective=Classification(classes=3))
    memory = []
    for batch in (1, 17):
        training = replace(TRAINING, batch=batch, epochs=None, steps=1)
        (tier,) = told(federation(FedAvg(task=wide, training=training)), lambda _: DATA["site-5"]).tiers
        if tier.memory_bytes is None:
            pytest.skip("memory is not known on this system")
        memory.append(tier.memory_bytes)
    more = 16 * 4 * 2**18 * 6
    assert more < memory[1] - memory[0] < 10 * more  # how much more depends on the heap that earlier tests have left


def test_a_stop_is_told() -> None:
    program = federation(stop=Target(metric="train_accuracy", value=0.1))
    assert any("Target" in check.found for check in told(program).checks)
    with pytest.raises(BadInput, match="never measured"):
        told(federation(stop=Target(metric="test_accuracy", value=0.1)))
