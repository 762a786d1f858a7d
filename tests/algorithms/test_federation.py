"""The federation against a slow one written out, and its bookkeeping."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedOpt, FedYogi, ServerOptimizer
from fedelta.algorithms.fedprox import FedProx
from fedelta.algorithms.parts import Clear, Float32
from fedelta.algorithms.planning import planned
from fedelta.algorithms.sampling import Fixed, Poisson
from fedelta.algorithms.state import FederationState
from fedelta.algorithms.stopping import Best, Converged, Target
from fedelta.core import codec
from fedelta.core.errors import BadInput, TooFewSites, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.grid import Terms
from fedelta.core.messages import PUBLIC, Reply, Request, Requests, Update
from fedelta.core.parameters import Parameters
from fedelta.core.program import Report, Sight, Site, SiteData, run
from fedelta.core.seeds import derive
from fedelta.fleet.local import Local
from fedelta.learning.flat import FlatModel
from fedelta.learning.lora import LoRA
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD, AdamW
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Training, proximal_term, train
from fedelta.privacy.example_level import ROWS
from fedelta.privacy.site_level import SiteLevel
from fedelta.secure.aggregation import SecureAggregation
from small_task import plain_task, site_data, task

TRAINING = Training(optimizer=SGD(lr=0.1, momentum=0.5), batch=4)
DATA = site_data()


def federation(algorithm: Algorithm[Any] | None = None, **changes: Any) -> Federation[Any]:
    settings: dict[str, Any] = {"rounds": 3, "seed": 7, **changes}
    return Federation(algorithm=algorithm or FedAvg(task=task(), training=TRAINING), **settings)


def run_all(
    program: Federation[Any], site: Callable[[str], object] = DATA.__getitem__
) -> tuple[FederationState[Any], list[Report]]:
    reports, state = [], program.init()
    for state, report in run(program, Local(program, site, list(DATA))):  # noqa: B007  (the last one is returned)
        reports.append(report)
    return state, reports


def weights(program: Federation[Any], state: FederationState[Any]) -> Parameters:
    return program.algorithm.parameters(state.algorithm)


def slow_rounds(rounds: int, cohort: Callable[[int], list[str]], proximal: float = 0.0) -> Tensor:
    """Federated averaging in float64, one site after the other, each with a model of its own."""
    module = task().build(7)
    torch.set_num_threads(1)  # as at a site: other numbers of threads round otherwise
    globally = Parameters.of(module).vector.double()
    for round in range(1, rounds + 1):
        models, sizes = [], []
        for name in cohort(round):
            model = FlatModel(task().build(7))
            model.load(Parameters(model.layout, globally.float()))
            seed = derive(7, round, name, "local")
            penalty = proximal_term(model, proximal)
            train(model, DATA[name], task().objective, TRAINING, round=round, seed=seed, penalty=penalty)
            models.append(model.read().vector.double())
            sizes.append(len(DATA[name]))
        globally = sum((n * m for n, m in zip(sizes, models, strict=True)), torch.zeros(())) / sum(sizes)
    return globally


def test_fedavg_equals_the_slow_one() -> None:
    program = federation()
    state, reports = run_all(program)
    expected = slow_rounds(3, lambda round: list(DATA))
    torch.testing.assert_close(weights(program, state).vector.double(), expected, rtol=1e-5, atol=1e-6)
    assert [report.round for report in reports] == [1, 2, 3]
    assert reports[-1].stop == "all 3 rounds are done"


def test_fedprox_equals_the_slow_one_and_fedavg_at_zero() -> None:
    prox = federation(FedProx(task=task(), training=TRAINING, mu=0.7))
    state, _ = run_all(prox)
    expected = slow_rounds(3, lambda round: list(DATA), proximal=0.7)
    torch.testing.assert_close(weights(prox, state).vector.double(), expected, rtol=1e-5, atol=1e-6)
    zero = federation(FedProx(task=task(), training=TRAINING, mu=0.0))
    plain = federation()
    assert torch.equal(weights(zero, run_all(zero)[0]).vector, weights(plain, run_all(plain)[0]).vector)


def test_only_the_sampled_sites_take_part() -> None:
    program = federation(sampling=Fixed(size=2))
    state, reports = run_all(program)
    expected = slow_rounds(3, lambda round: Fixed(size=2)(list(DATA), round, 7))
    torch.testing.assert_close(weights(program, state).vector.double(), expected, rtol=1e-5, atol=1e-6)
    assert all(len(report.cohort) == 2 for report in reports)


@pytest.mark.parametrize(
    "server",
    [
        FedAvgM(lr=0.5, momentum=0.8),
        FedAdam(lr=0.03, beta1=0.8, beta2=0.9, tau=0.01),
        FedYogi(lr=0.03, beta1=0.8, beta2=0.9, tau=0.01),
        FedAdagrad(lr=0.03, beta1=0.5, tau=0.01),
    ],
)
def test_server_optimisers_equal_the_paper_element_by_element(server: ServerOptimizer) -> None:
    """Reddi et al., Algorithm 2, and Hsu et al., section 4.3, in plain Python numbers."""
    deltas = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    moments = server.init(5)
    total = torch.zeros(5)
    for row in deltas:
        moments, increment = server.step(moments, row)
        total += increment
    for i in range(5):
        x, m = 0.0, 0.0
        v = server.tau**2 if not isinstance(server, FedAvgM) else 0.0  # type: ignore[attr-defined]
        for d in deltas[:, i].tolist():
            if isinstance(server, FedAvgM):
                m = server.momentum * m + d
                x += server.lr * m
                continue
            assert isinstance(server, FedAdam | FedYogi | FedAdagrad)
            m = server.beta1 * m + (1 - server.beta1) * d
            if isinstance(server, FedAdagrad):
                v += d * d
            elif isinstance(server, FedYogi):
                v -= (1 - server.beta2) * d * d * ((v > d * d) - (v < d * d))
            else:
                v = server.beta2 * v + (1 - server.beta2) * d * d
            x += server.lr * m / (v**0.5 + server.tau)
        assert total[i].item() == pytest.approx(x, rel=1e-4, abs=1e-6)


def test_fedavgm_without_momentum_is_fedavg() -> None:
    plain, momentum = (
        federation(),
        federation(FedOpt(client=FedAvg(task=task(), training=TRAINING), server=FedAvgM(lr=1.0, momentum=0.0))),
    )
    a, b = weights(plain, run_all(plain)[0]), weights(momentum, run_all(momentum)[0])
    torch.testing.assert_close(a.vector, b.vector, rtol=1e-5, atol=1e-6)


def test_server_optimisers_leave_buffers_to_the_plain_mean() -> None:
    """An adaptive step of 10 would drive running variances negative."""
    averaged = federation(rounds=1)
    adaptive = federation(FedOpt(client=FedAvg(task=task(), training=TRAINING), server=FedAdam(lr=10.0)), rounds=1)
    mean, moved = (weights(p, run_all(p)[0]) for p in (averaged, adaptive))
    assert torch.equal(mean.buffers, moved.buffers)
    assert len(mean.buffers)
    assert not torch.allclose(mean.trained, moved.trained)


def test_the_state_is_all_that_a_resume_needs() -> None:
    client = FedAvg(task=task(), training=TRAINING)
    program = federation(FedOpt(client=client, server=FedYogi()), rounds=4, sampling=Fixed(size=3))
    whole, _ = run_all(program)
    fleet = Local(program, DATA.__getitem__, list(DATA))
    *_, (half, _) = run(replace(program, rounds=2), fleet)
    *_, (joined, _) = run(program, Local(program, DATA.__getitem__, list(DATA)), half)
    assert torch.equal(whole.algorithm.parameters.vector, joined.algorithm.parameters.vector)
    assert whole.bases == joined.bases


def test_a_run_learns_and_reports_it() -> None:
    test = Examples.of((DATA["site-0"].inputs["x"], DATA["site-0"].targets))
    program = federation(rounds=15, test=test, evaluate_every=5)
    state, reports = run_all(program)
    assert reports[-1].metrics["test_accuracy"] > 0.8
    assert [r.round for r in reports if "test_loss" in r.metrics] == [5, 10, 15]
    assert reports[-1].metrics["train_loss"] < reports[0].metrics["train_loss"]
    assert program.evaluate(weights(program, state))["test_loss"] == reports[-1].metrics["test_loss"]
    module = program.model(state).eval()
    correct = (module(test.inputs["x"]).argmax(1) == test.targets).float().mean().item()
    assert correct == pytest.approx(reports[-1].metrics["test_accuracy"])


def test_bytes_are_those_of_the_encoded_messages() -> None:
    program = federation(rounds=1)
    _, reports = run_all(program)
    vector = program.algorithm.parameters(program.init().algorithm).vector
    down = len(codec.encode({"parameters": vector}, {}))
    update = Update(
        values=Parameters.zeros(program.algorithm.parameters(program.init().algorithm).layout),
        sums={"examples": 1.0, "loss": 1.0, "correct": 1.0, "steps": 1.0},
    )
    assert reports[0].bytes_down == 4 * down
    assert reports[0].bytes_up == 4 * len(codec.encode(update.to_tensors(), {}))


def broken(name: str) -> object:
    """One site's file is missing, one is empty, one has a label that does not exist, one diverges."""
    data = DATA[name]
    if name == "site-1":
        raise FileNotFoundError("rows.csv is not there")
    if name == "site-2":
        return data[0:0]
    if name == "site-3":
        return Examples.of((data.inputs["x"] * float("nan"), data.targets))
    return data


def test_absent_sites_are_reported_and_the_round_goes_on() -> None:
    program = federation(rounds=2)
    _, reports = run_all(program, broken)
    assert dict(reports[0].absent) == {
        "site-1": "FileNotFoundError: rows.csv is not there",
        "site-2": "this site has no training examples",
        "site-3": reports[0].absent["site-3"],
    }
    assert "its loss became nan" in reports[0].absent["site-3"]
    assert reports[0].refused == ()  # they say so themselves
    assert len(reports) == 2


def test_too_few_sites_stop_the_run_with_the_reasons() -> None:
    with pytest.raises(
        TooFewSites,
        match=r"round 1: 1 of 4 sites answered and 2 must \(site-1: FileNotFoundError: rows.csv is not there",
    ):
        run_all(federation(min_sites=2), broken)


def test_a_label_outside_the_classes_is_that_sites_error() -> None:
    wrong = Examples.of((DATA["site-0"].inputs["x"], DATA["site-0"].targets + 5))
    _, reports = run_all(federation(rounds=1), lambda name: wrong if name == "site-0" else DATA[name])
    assert "is outside the classes 0..2" in reports[0].absent["site-0"]


def test_an_update_out_of_bounds_is_refused() -> None:
    @dataclass(frozen=True)
    class Shout:
        """Site-0 multiplies its update by a million."""

        def on_site(self, update: Update, site: Site) -> Update:
            factor = 1e6 if site.id == "site-0" else 1.0
            return replace(update, values=update.values.like(update.values.vector * factor))

        def on_arrival(self, update: Update) -> Update:
            return update

        def on_total(self, total: Update) -> Update:
            return total

    _, reports = run_all(federation(rounds=1, stages=(Shout(),)))
    assert list(reports[0].absent) == ["site-0"]


def test_stages_run_in_order_at_the_site_and_in_reverse_at_the_coordinator() -> None:
    calls: list[str] = []

    @dataclass(frozen=True)
    class Scale:
        """Times `factor` at the site, divided by it on the total: changes nothing but the bits."""

        factor: float

        def on_site(self, update: Update, site: Site) -> Update:
            calls.append(f"site {self.factor}")
            return replace(update, values=update.values.like(update.values.vector * self.factor))

        def on_arrival(self, update: Update) -> Update:
            calls.append(f"arrival {self.factor}")
            return update

        def on_total(self, total: Update) -> Update:
            calls.append(f"total {self.factor}")
            return replace(total, values=total.values.like(total.values.vector / self.factor))

    staged = federation(rounds=1, stages=(Scale(2.0), Scale(4.0)), sampling=Fixed(size=1))
    plain = federation(rounds=1, sampling=Fixed(size=1))
    a, b = weights(staged, run_all(staged)[0]), weights(plain, run_all(plain)[0])
    torch.testing.assert_close(a.vector, b.vector, rtol=1e-6, atol=1e-7)
    assert calls == ["site 2.0", "site 4.0", "arrival 4.0", "arrival 2.0", "total 4.0", "total 2.0"]


def test_an_empty_cohort_is_a_round_in_which_nothing_changes() -> None:
    program = federation(sampling=Poisson(rate=1e-9), rounds=2)
    state, reports = run_all(program)
    assert torch.equal(weights(program, state).vector, weights(program, program.init()).vector)
    assert [list(report.cohort) for report in reports] == [[], []]


def test_sites_evaluate_on_what_they_hold_back() -> None:
    def site(name: str) -> SiteData:
        data = DATA[name]
        return SiteData(train=data[0:8], validation=None if name == "site-3" else data[8:])

    program = federation(rounds=2, validate_at_sites=True)
    state, reports = run_all(program, site)
    assert all(seconds >= 0 for report in reports for seconds in report.seconds.values())  # no phase counts twice
    model = program.model(state).eval()
    held = {name: DATA[name][8:] for name in list(DATA)[:3]}
    correct = {n: int((model(d.inputs["x"]).argmax(1) == d.targets).sum()) for n, d in held.items()}
    rows = sum(len(d) for d in held.values())
    assert reports[-1].metrics["validation_accuracy"] == pytest.approx(sum(correct.values()) / rows)
    assert {n: m["validation_accuracy"] for n, m in reports[-1].per_site.items()} == pytest.approx(
        {n: correct[n] / len(held[n]) for n in held}
    )


def test_it_stops_at_a_target() -> None:
    test = DATA["site-3"]
    program = federation(rounds=50, test=test, stop=Target(metric="test_accuracy", value=0.7))
    state, reports = run_all(program)
    assert len(reports) < 50
    assert reports[-1].metrics["test_accuracy"] >= 0.7
    assert all(report.metrics["test_accuracy"] < 0.7 for report in reports[:-1])
    assert "test_accuracy reached" in str(reports[-1].stop)
    assert program.finished(state) == reports[-1].stop


def test_it_stops_when_nothing_improves() -> None:
    frozen = FedAvg(task=task(), training=Training(optimizer=SGD(lr=1e-12), batch=4))
    stop = Converged(metric="train_loss", delta=10.0, rounds=4)
    program = federation(frozen, rounds=50, test=DATA["site-0"], stop=stop)
    _, reports = run_all(program)
    assert len(reports) == 5
    assert "has not improved by 10 since round 1" in str(reports[-1].stop)


def test_a_condition_that_can_never_hold_is_refused_before_the_run() -> None:
    with pytest.raises(BadInput, match=r"no metric 'test_f1' to stop at; there are train_loss"):
        federation(stop=Target(metric="test_f1", value=1.0))
    with pytest.raises(BadInput, match="never measured; give test examples"):
        federation(stop=Target(metric="test_accuracy", value=1.0)).init()
    with pytest.raises(BadInput, match="never measured; set validate_at_sites"):
        federation(stop=Target(metric="validation_loss", value=1.0)).init()


def test_the_best_may_be_that_of_round_zero() -> None:
    stop = Converged(metric="test_accuracy", delta=0.0, rounds=2)
    best = Best()
    for round, accuracy in enumerate([0.9, 0.5, 0.6]):
        best, reason = stop.update(best, round, {"test_accuracy": accuracy})
    assert best == Best(value=0.9, round=0)
    assert reason == "test_accuracy has not improved by 0 since round 0"


def test_a_loss_is_better_when_it_falls() -> None:
    stop = Converged(metric="train_loss", delta=0.1, rounds=2)
    best = Best()
    for round, loss in enumerate([float("nan"), 3.0, 2.0, 1.0], 1):
        best, reason = stop.update(best, round, {"train_loss": loss})
        assert reason is None
    assert best == Best(value=1.0, round=4)
    assert stop.update(best, 5, {}) == (best, None)
    assert stop.update(best, 6, {"train_loss": 0.95})[1] is not None
    assert Target(metric="train_loss", value=0.5).update(Best(), 1, {"train_loss": 0.6})[1] is None
    assert Target(metric="train_loss", value=0.5).update(Best(), 1, {"train_loss": 0.4})[1] is not None


def test_the_round_that_stops_a_run_is_evaluated() -> None:
    program = federation(rounds=50, test=DATA["site-3"], evaluate_every=40, stop=Target(metric="train_loss", value=0.9))
    _, reports = run_all(program)
    assert len(reports) < 40
    assert "test_accuracy" in reports[-1].metrics


def test_a_stopped_run_goes_on_under_another_condition() -> None:
    program = federation(rounds=6, stop=Target(metric="train_loss", value=100.0))
    state, reports = run_all(program)
    assert len(reports) == 1
    assert program.finished(state) is not None
    longer = replace(program, stop=None)
    *_, (after, _) = run(longer, Local(longer, DATA.__getitem__, list(DATA)), state)
    assert after.round == 6


def test_the_test_set_is_checked_when_the_program_is_built() -> None:
    wrong = Examples.of((DATA["site-0"].inputs["x"], DATA["site-0"].targets + 5))
    with pytest.raises(BadInput, match="the test set: label"):
        federation(test=wrong)
    with pytest.raises(BadInput, match="the test set has no examples"):
        federation(test=DATA["site-0"][0:0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "difference": t["difference"].double()}, "not torch.float32"),
        (lambda t: {"value" if n == "difference" else n: v for n, v in t.items()}, "it is a value"),
        (lambda t: {**t, "count": torch.tensor(5.0, dtype=torch.float64)}, "claims to be of 5 sites"),
        (lambda t: {n: v for n, v in t.items() if n != "sum/loss"}, "lacks the sums loss"),
        (lambda t: {**t, "difference": t["difference"][1:].clone()}, "malformed"),
        # numbers that only a guarantee, or only a sum, has
        (lambda t: {**t, f"sum/{ROWS}": torch.tensor(torch.nan, dtype=torch.float64)}, "not a number"),
        (lambda t: {**t, f"sum/{ROWS}": torch.tensor(torch.inf, dtype=torch.float64)}, "not a number"),
        (lambda t: {**t, f"{PUBLIC}{ROWS}": torch.tensor([torch.nan], dtype=torch.float64)}, "malformed"),
        (lambda t: {**t, f"{PUBLIC}{ROWS}": torch.tensor(7.0, dtype=torch.float64)}, "malformed"),
        (lambda t: {**t, **{f"a name {n}": t["weight"] for n in range(10_000)}}, "unknown numbers"),
    ],
)
def test_a_malformed_update_makes_its_site_absent(change: Callable[[Any], Any], message: str) -> None:
    @dataclass(frozen=True)
    class Odd(Float32):
        """The site with 11 rows writes its update wrongly."""

        def encode(self, update: Update) -> Any:
            tensors = update.to_tensors()
            return change(tensors) if update.weight == 11 else tensors

    _, reports = run_all(federation(rounds=1, encoding=Odd()))
    assert list(reports[0].absent) == ["site-0"]
    assert message in reports[0].absent["site-0"]
    assert len(reports[0].absent["site-0"]) < 1000
    assert reports[0].refused == ("site-0",)


def test_evaluations_that_no_sum_can_hold_are_left_out() -> None:
    program = federation(rounds=1, validate_at_sites=True)

    class Boasting(Local):
        """Two sites have measured more than a float64 can add."""

        def next_reply(self, timeout_s: float | None = None) -> Any:
            reply = super().next_reply(timeout_s)
            if not isinstance(reply, Reply) or "/evaluate/" not in reply.answers or reply.sender[-1] not in "12":
                return reply
            loss = torch.tensor(1.7e308, dtype=torch.float64)
            return replace(reply, body={**reply.body, "sum/loss": loss})

    def site(name: str) -> SiteData:
        return SiteData(train=DATA[name], validation=DATA[name])

    ((_, report),) = run(program, Boasting(program, site, list(DATA)))
    assert list(report.unmeasured) == ["site-1", "site-2"]
    assert 0 < report.metrics["validation_loss"] < 100


def test_a_site_that_cannot_be_evaluated_still_took_part() -> None:
    bad = Examples.of((DATA["site-1"].inputs["x"] * float("nan"), DATA["site-1"].targets))

    def site(name: str) -> SiteData:
        return SiteData(train=DATA[name], validation=bad if name == "site-1" else DATA[name])

    state, reports = run_all(federation(rounds=1, validate_at_sites=True), site)
    assert reports[0].absent == {}
    assert "not finite" in reports[0].unmeasured["site-1"]
    assert "site-1" in state.bases
    assert 0 < reports[0].metrics["validation_loss"] < 100


def test_fewer_sites_than_must_answer() -> None:
    with pytest.raises(TooFewSites, match="there are 4 sites, and min_sites=5"):
        run_all(federation(min_sites=5))
    with pytest.raises(BadInput, match="asks fewer sites than min_sites=3"):
        federation(sampling=Fixed(size=2), min_sites=3)
    program = federation(sampling=Poisson(rate=0.3), min_sites=2, rounds=20)
    _, reports = run_all(program)
    assert {len(report.cohort) for report in reports} >= {1, 2}
    assert all(("train_loss" in report.metrics) == (len(report.cohort) >= 2) for report in reports)


@pytest.mark.parametrize("together", [1, 3])
def test_an_interrupted_round_leaves_nothing_outstanding(together: int) -> None:
    program = federation(rounds=1, algorithm=FedAvg(task=plain_task(), training=TRAINING))
    fleet = Local(program, DATA.__getitem__, list(DATA))
    requests = Requests(to=list(DATA), op="train", round=1, shared=start_of(program))
    replies = Clear().gather(fleet, requests, together, Terms())
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    assert fleet.next_reply() is None
    assert len(list(Clear().gather(fleet, requests, together, Terms()))) == -(-len(DATA) // together)


def start_of(program: Federation[Any]) -> dict[str, Tensor]:
    return {"parameters": weights(program, program.init()).vector}


def test_what_does_not_travel_does_not_leak_from_site_to_site() -> None:
    class Counting(nn.Module):
        """A buffer that training changes and that does not travel."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.register_buffer("seen", torch.zeros(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            out: Tensor = self.linear(x) / self.seen
            return out

    ends = []
    for names in (list(DATA), list(DATA)[::-1]):
        counting = Task(model=Counting, objective=Classification(classes=3))
        program = federation(FedAvg(task=counting, training=TRAINING), rounds=2)
        *_, (state, _) = run(program, Local(program, DATA.__getitem__, names))
        ends.append(weights(program, state).vector)
    assert torch.equal(*ends)


def test_unsound_combinations_are_refused_at_construction() -> None:
    @dataclass(frozen=True)
    class Compares:
        needs: Sight = Sight.EACH

        def refuse(self, update: Update) -> str | None:
            return None

        def __call__(self, updates: Any, cohort: int) -> Update:
            raise NotImplementedError

    with pytest.raises(UnsoundCombination, match="reveals only their sum; use Clear"):
        federation(rule=Compares(), collect=SecureAggregation())
    for changes in ({"rounds": -1}, {"min_sites": 0}, {"evaluate_every": 0}):
        with pytest.raises(BadInput, match="must be >="):
            federation(**changes)


def test_an_unknown_operation_is_refused() -> None:
    site = Site(id="site-0", data=lambda: SiteData.of(DATA["site-0"]))
    with pytest.raises(BadInput, match="knows no 'dance'"):
        federation().handle(Request(to="site-0", op="dance", round=1), site)


def test_local_adamw_trains_too() -> None:
    training = Training(optimizer=AdamW(lr=0.02), batch=4, epochs=2)
    program = federation(FedAvg(task=task(), training=training), rounds=8, test=DATA["site-3"])
    _, reports = run_all(program)
    metrics: Mapping[str, float] = reports[-1].metrics
    assert metrics["test_accuracy"] > 0.8


def adapted_task(targets: tuple[str, ...] = ("0", "2")) -> Task:
    def build() -> nn.Module:
        module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        return LoRA(rank=2, targets=targets).apply(module)

    return Task(model=build, objective=Classification(classes=3))


@pytest.mark.parametrize("cohort", [1, 3])
def test_the_error_of_averaging_factors_is_reported_in_rounds_that_are_evaluated(cohort: int) -> None:
    program = federation(
        FedAvg(task=adapted_task(), training=TRAINING), evaluate_every=2, plan=Plan(cohort=cohort), rounds=4
    )
    state, reports = run_all(program)
    assert [report.aggregation_errors is None for report in reports] == [True, False, True, False]
    last = reports[-1]
    assert last.aggregation_errors is not None
    assert [name.rpartition(".")[2] for name in last.aggregation_errors] == ["0", "2"]
    assert 0 < last.metrics["aggregation_error"] < 1
    assert "aggregation_error" not in reports[0].metrics

    # by hand, dense: what sites sent in round 1 of a run that begins where round 3 ended
    before = weights(program, run_all(replace(program, rounds=3))[0])
    exact, sizes = {name: torch.zeros(()).double() for name in ("0", "2")}, 0
    for name, rows in DATA.items():
        model = FlatModel(adapted_task().build(7))
        model.load(before)
        torch.set_num_threads(1)
        train(model, rows, program.algorithm.task.objective, TRAINING, round=4, seed=derive(7, 4, name, "local"))
        factors = {key.removeprefix("base_model.model."): value.double() for key, value in model.read().items()}
        for layer in exact:
            a, b = (factors[f"{layer}.lora_{half}.default.weight"] for half in "AB")
            exact[layer] = exact[layer] + len(rows) * (b @ a)
        sizes += len(rows)
    after = {key.removeprefix("base_model.model."): value.double() for key, value in weights(program, state).items()}
    for key, error in last.aggregation_errors.items():
        layer = key.rpartition(".")[2]
        a, b = (after[f"{layer}.lora_{half}.default.weight"] for half in "AB")
        wanted = torch.linalg.norm(exact[layer] / sizes - b @ a) / torch.linalg.norm(exact[layer] / sizes)
        assert error == pytest.approx(float(wanted), rel=1e-3)


def test_without_factors_there_is_no_error_and_without_sight_it_is_not_observable() -> None:
    _, (report, *_) = run_all(federation(rounds=1))
    assert report.aggregation_errors is None
    program = federation(FedAvg(task=adapted_task(), training=TRAINING), rounds=1, collect=SecureAggregation())
    _, (report, *_) = run_all(program)
    assert report.aggregation_errors == {}
    assert "aggregation_error" not in report.metrics


@dataclass(frozen=True, kw_only=True)
class Alone(FedAvg):
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = True


def test_what_an_algorithm_cannot_do_is_refused() -> None:
    algorithm = Alone(task=plain_task(), training=TRAINING)
    with pytest.raises(BadInput, match=r"Alone trains its sites one by one; leave Plan\.cohort out"):
        federation(algorithm, plan=Plan(cohort=2))
    with pytest.raises(BadInput, match="only sites can evaluate; leave `test` out"):
        federation(algorithm, test=DATA["site-0"])
    program, said = planned(federation(algorithm), DATA.__getitem__, list(DATA))
    assert program.plan.plain.cohort == 1
    assert "one by one" in said


def test_a_round_with_enough_sites_withdraws_the_others() -> None:
    asked: list[str] = []

    def data(name: str) -> Examples:
        asked.append(name)
        return DATA[name]

    program = federation(enough=2)
    state, reports = run_all(program, data)
    late = "enough sites had answered before it did"
    assert [dict(report.absent) for report in reports] == [{"site-2": late, "site-3": late}] * 3
    assert set(asked) == {"site-0", "site-1"}  # what was withdrawn is not worked on
    assert dict(state.bases) == {"site-0": 3, "site-1": 3}
    expected = slow_rounds(3, lambda round: ["site-0", "site-1"])
    torch.testing.assert_close(weights(program, state).vector.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_site_that_fails_does_not_count_as_one_of_enough() -> None:
    failing = {"site-0": "site-1", "site-1": "site-2"}
    state, reports = run_all(federation(rounds=1, enough=1), lambda name: broken(failing.get(name, "site-0")))
    assert dict(state.bases) == {"site-2": 1}
    assert {name: why.split(":")[0] for name, why in reports[0].absent.items()} == {
        "site-0": "FileNotFoundError",
        "site-1": "this site has no training examples",
        "site-3": "enough sites had answered before it did",
    }


def test_when_enough_is_not_sound() -> None:
    with pytest.raises(BadInput, match="min_sites=3 must answer"):
        federation(enough=2, min_sites=3)
    with pytest.raises(BadInput, match="asks fewer sites than enough=3"):
        federation(enough=3, sampling=Fixed(size=2))
    plain = FedAvg(task=plain_task(), training=TRAINING)
    with pytest.raises(UnsoundCombination, match="reveals one sum"):
        federation(plain, enough=2, collect=SecureAggregation())
    with pytest.raises(UnsoundCombination, match="pushes another one out of the sum"):
        federation(plain, enough=2, privacy=SiteLevel(epsilon=8.0, delta=1e-5, clip=1.0))
