"""`fedelta run --compare`: what each method does, what is concluded, and the command as a user would call it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.cli.in_process import Fedelta, fedelta

from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.sampling import Fixed
from fedelta.algorithms.stopping import Target
from fedelta.cli.board import Board
from fedelta.cli.compare_methods import (
    ALONE,
    AS_IS,
    CLOSED,
    DRIFT,
    FEDERATED,
    POOLED_ALL,
    POOLED_CHAIN,
    Job,
    Setup,
    Way,
    from_scratch,
)
from fedelta.cli.compare_results import Results
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.program import Report, SiteData, run
from fedelta.fleet.local import Local
from fedelta.learning.closed_form import LDA, Ridge
from fedelta.learning.lora import LoRA
from fedelta.learning.objectives import Classification, Regression
from fedelta.learning.optimizers import SGD, Step
from fedelta.learning.plan import Plan
from fedelta.learning.pretrained import Pretrained
from fedelta.learning.task import Task
from fedelta.learning.text import encode
from fedelta.learning.training import Training
from fedelta.learning.tuning import Full
from small_task import plain_task, site_data, task

__all__ = ["fedelta"]  # a fixture

ACCURACY = "test_accuracy"


@dataclass(frozen=True, kw_only=True)
class Counted:
    """SGD that notes its learning rate at every step."""

    lr: float = 0.1
    rates: list[float]

    def make(self, weights: Sequence[torch.Tensor]) -> Step:
        step = SGD(lr=self.lr).make(weights)

        def counted(weights: Any, gradients: Any, lr: Any) -> None:
            self.rates.append(lr)
            step(weights, gradients, lr)

        return counted


@dataclass(frozen=True, kw_only=True)
class PerRound:
    """A schedule by which a round can be told from its learning rate."""

    def factor(self, round: int) -> float:
        return 1 + round / 16


def sites(count: int = 4, held_back: Sequence[str] = ()) -> dict[str, SiteData]:
    data = site_data(count)
    return {
        name: SiteData(train=rows, validation=site_data(1, 20 + n)["site-0"] if name in held_back else None)
        for n, (name, rows) in enumerate(data.items())
    }


def federation(**changes: Any) -> Federation[Any]:
    given: dict[str, Any] = {
        "algorithm": FedAvg(task=plain_task(), training=Training(optimizer=SGD(lr=0.1), batch=4)),
        "rounds": 3,
        "test": site_data(1, 9)["site-0"],
    }
    return Federation(**(given | changes))


def done(setup: Setup, way: Way, seed: int = 0, site: str | None = None) -> list[Report]:
    """All reports of a job that goes well."""
    reports: list[Report] = []

    def gathered() -> Generator[Report, None, None]:
        failure = yield from setup.work(Job(way=way, seed=seed, rounds=3, site=site))
        assert failure == b""

    reports.extend(gathered())
    return reports


def test_the_federated_line_is_what_a_run_gives() -> None:
    """Also where the run asks its sites to evaluate, stops early, and is cut short by nothing here."""
    own = federation(algorithm=FedAvg(task=task(), training=Training(optimizer=SGD(lr=0.1), batch=4)), seed=5)
    data = sites()
    plain = [report for _, report in run(own, Local(own, data.__getitem__, list(data)))]
    asked = replace(own, seed=0, validate_at_sites=True, stop=Target(metric=ACCURACY, value=0.0))
    reports = done(Setup.of(asked, data), FEDERATED, seed=5)
    assert [report.round for report in reports] == [0, 1, 2, 3]
    for found, expected in zip(reports[1:], plain, strict=True):
        assert {**found.metrics, DRIFT: 0} == {**expected.metrics, DRIFT: 0}
        assert found.metrics[DRIFT] > 1
        assert (found.bytes_up, found.bytes_down) == (expected.bytes_up, expected.bytes_down)


@pytest.mark.parametrize(("make", "epochs"), [(task, 1), (plain_task, 2)])
def test_all_make_the_steps_that_they_should(make: Callable[[], Task], epochs: int) -> None:
    """Sites of 11, 14, 17 and 20 rows; with BatchNorm a last batch of one row is left out."""
    rates: list[float] = []
    training = Training(optimizer=Counted(rates=rates), batch=5, epochs=epochs, schedule=PerRound())
    base = federation(algorithm=FedAvg(task=make(), training=training), sampling=Fixed(size=2))
    setup = Setup.of(base, sites())

    def steps(way: Way, site: str | None = None) -> list[int]:
        rates.clear()
        done(setup, way, seed=1, site=site)
        return [rates.count(0.1 * (1 + round / 16)) for round in (1, 2, 3)]

    least = 2 if make is task else 1
    each = {
        name: epochs * sum(len(part) >= least for part in torch.arange(len(data.train)).split(5))
        for name, data in setup.sites.items()
    }
    cohorts = [[each[name] for name in Fixed(size=2)(list(each), round, 1)] for round in (1, 2, 3)]
    assert steps(FEDERATED) == steps(POOLED_ALL) == [sum(cohort) for cohort in cohorts]
    chain = [max(cohort) for cohort in cohorts]
    assert steps(POOLED_CHAIN) == steps(ALONE, "site-0") == steps(ALONE, "site-3") == chain
    assert steps(AS_IS) == steps(CLOSED) == [0, 0, 0]


@pytest.mark.parametrize("start", [None, LDA()])
def test_a_federation_of_one_site_is_that_site_alone(start: LDA | None) -> None:
    setup = Setup.of(federation(start=start), sites(1))
    alone, together = done(setup, ALONE, site="site-0")[-1], done(setup, FEDERATED)[-1]
    for name in ("train_loss", "test_loss", ACCURACY):
        assert alone.metrics[name] == pytest.approx(together.metrics[name], abs=1e-5)
    assert alone.per_site.keys() == together.per_site.keys() == {"site-0"}


def test_round_zero_is_that_of_the_pooled_rows() -> None:
    setup = Setup.of(federation(), sites())
    assert setup.closed == Ridge()
    assert setup.pooled is not None
    (apart,) = done(setup, CLOSED)
    (pooled,) = done(replace(setup, sites={"all": SiteData(train=setup.pooled)}), CLOSED)
    assert apart.metrics["test_loss"] == pytest.approx(pooled.metrics["test_loss"], abs=1e-5)
    assert apart.bytes_up == 4 * pooled.bytes_up
    started = Setup.of(federation(start=Ridge(penalty=3.0)), sites())
    assert started.closed == Ridge(penalty=3.0)
    first = done(started, FEDERATED)[0]
    (closed,) = done(started, CLOSED)
    assert first.round == 0
    assert first.metrics == closed.metrics


def test_sites_measure_on_what_they_hold_back_and_all_on_the_test_set() -> None:
    base = federation(validate_at_sites=True)
    data = sites(held_back=("site-1", "site-2"))
    setup = Setup.of(base, data)
    *_, (_, expected) = run(base, Local(base, data.__getitem__, list(data)))
    last = done(setup, FEDERATED)[-1]
    assert last.metrics["test_loss"] == expected.metrics["test_loss"]
    for name in ("site-1", "site-2"):
        assert last.per_site[name]["test_loss"] == expected.per_site[name]["validation_loss"]
    for name in ("site-0", "site-3"):
        assert last.per_site[name]["test_loss"] == last.metrics["test_loss"]
    assert "for 2 on the same rows" in Results(setup=setup, seeds=[0], reports={}).measured_on()

    untested = Setup.of(replace(base, test=None), data)
    assert untested.metric == "validation_accuracy"
    last = done(untested, FEDERATED)[-1]
    assert last.metrics["validation_loss"] == pytest.approx(expected.metrics["validation_loss"], abs=1e-9)
    with pytest.raises(BadInput, match="needs rows to measure on"):
        Setup.of(replace(base, test=None, validate_at_sites=False), sites())
    with pytest.raises(BadInput, match="no site has rows"):
        Setup.of(base, {})


def test_from_scratch_everything_travels_and_the_rest_is_left_out_with_a_reason(bert: Path, bert_tokenizer) -> None:
    texts = ["good film", "bad plot was dull", "a very bright story", "not good"]

    def rows(*chosen: int) -> Examples:
        return encode([texts[i] for i in chosen], [i % 2 for i in chosen], bert_tokenizer, 16)

    model = Pretrained(source=str(bert), labels=("even", "odd"), tuning=LoRA(rank=2))
    known = Task(model=model, objective=Classification(classes=2))
    algorithm = FedAvg(task=known, training=Training(optimizer=SGD(lr=0.1), batch=2))
    data = {"a": SiteData(train=rows(0, 1)), "b": SiteData(train=rows(2, 3, 1))}
    setup = Setup.of(federation(algorithm=algorithm, rounds=1, test=rows(0, 1, 2, 3)), data)
    assert not setup.left_out
    assert from_scratch(POOLED_ALL) in setup.ways()
    whole = sum(parameter.numel() for parameter in replace(model, tuning=Full())().parameters())
    tuned, drawn = done(setup, FEDERATED)[-1], done(setup, from_scratch(FEDERATED))[-1]
    assert drawn.bytes_up > 2 * 4 * whole
    assert tuned.bytes_up < drawn.bytes_up / 2
    assert len(done(setup, from_scratch(ALONE), site="b")) == 1

    other = Task(model=lambda: torch.nn.Linear(3, 1), objective=Regression())
    algorithm = FedAvg(task=other, training=Training(optimizer=SGD(lr=0.1)))
    numbers = [Examples.of((torch.randn(4, width), torch.randn(4))) for width in (3, 2, 3)]
    base = federation(algorithm=algorithm, test=numbers[0])
    plain = Setup.of(base, {"a": SiteData(train=numbers[0]), "b": SiteData(train=numbers[1])})
    assert plain.ways() == [AS_IS, ALONE, FEDERATED]
    assert plain.metric == "test_loss"
    said = " ".join(plain.left_out)
    assert "is for classification" in said
    assert "rows of x [3]" in said
    assert "no Pretrained()" in said


def made_up(
    seeds: Sequence[int], scores: Callable[[Job, str], float], base: Federation[Any] | None = None, count: int = 3
) -> Results:
    """Results in which `scores` gives what a job measures, in total ("") and by site."""
    setup = Setup.of(base or federation(), sites(count))
    reports = {}
    for job in reversed(setup.jobs(seeds)):  # in the order in which they end
        per_site = {name: {setup.metric: scores(job, name)} for name in ([job.site] if job.site else setup.sites)}
        last = Report(round=1, metrics={setup.metric: scores(job, "")}, per_site=per_site, bytes_up=300)
        reports[job] = [last]
    return Results(setup=setup, seeds=seeds, reports=reports)


def test_gains_are_paired_by_seed_and_site() -> None:
    alone = {"site-0": 0.5, "site-1": 0.6, "site-2": 0.9}

    def scores(job: Job, site: str) -> float:
        if job.way == ALONE:
            assert job.site is not None
            return alone[job.site] + 0.01 * job.seed - (0.2 if site == "" else 0)
        return {FEDERATED: 0.7, POOLED_ALL: 0.8, AS_IS: 0.25}.get(job.way, 0.6) + 0.01 * job.seed

    results = made_up([3, 4, 5], scores)
    gains = {gain.site: gain.values for gain in results.gains()}
    assert {site: [round(value, 9) for value in values] for site, values in gains.items()} == {
        "site-0": [0.2] * 3,
        "site-1": [0.1] * 3,
        "site-2": [-0.2] * 3,
    }
    by_name = {method.name: method for method in results.methods()}
    assert by_name["each site alone, worst"].scores == pytest.approx([0.33, 0.34, 0.35])
    assert by_name["each site alone, mean"].scores == pytest.approx([2 / 3 - 0.17, 2 / 3 - 0.16, 2 / 3 - 0.15])
    assert by_name["federated"].scores == pytest.approx([0.73, 0.74, 0.75])
    assert by_name["federated"].sent is not None
    assert by_name["federated"].sent.mean == 100
    assert results.target() == pytest.approx(0.95 * 0.84)
    said = " ".join(results.reading())
    assert "2 of 3 sites gain (2 clearly), 1 loses (1 clearly) against training alone: +3.3" in said
    assert "10.0 ± 0.0 points below pooled training with all steps (84.0%)" in said
    assert "10.0 ± 0.0 points above pooled training with the longest chain (64.0%)" in said
    assert "One round in closed form alone gives 64.0%, 10.0 ± 0.0 points below the federation's end" in said
    table = results.site_table([ALONE, FEDERATED], 2)
    assert [row[0] for row in table.rows] == ["site-0", "site-2"]
    assert [row[-1] for row in table.rows] == ["+20.0 ± 0.0", "-20.0 ± 0.0"]
    assert table.caption


def test_of_a_loss_less_is_better() -> None:
    regression = Task(model=lambda: torch.nn.Linear(6, 1), objective=Regression())
    numbers = {name: (data.train.inputs["x"], torch.randn(len(data.train))) for name, data in sites(2).items()}
    algorithm = FedAvg(task=regression, training=Training(optimizer=SGD(lr=0.1)))
    base = federation(algorithm=algorithm, test=Examples.of(numbers["site-0"]))
    setup = Setup.of(base, {name: SiteData.of(pair) for name, pair in numbers.items()})
    losses = {ALONE: 2.0, FEDERATED: 1.5, POOLED_ALL: 1.0}
    reports = {}
    for job in setup.jobs([0]):
        loss = losses.get(job.way, 3.0) + (0.5 if job.site == "site-1" else 0)
        own = {name: {"test_loss": loss} for name in ([job.site] if job.site else setup.sites)}
        reports[job] = [Report(round=1, metrics={"test_loss": loss}, per_site=own)]
    results = Results(setup=setup, seeds=[0], reports=reports)
    assert [gain.values for gain in results.gains()] == [[0.5], [1.0]]
    assert {method.name: method.scores for method in results.methods()}["each site alone, worst"] == [2.5]
    assert results.target() is None
    said = " ".join(results.reading())
    assert "0.5000 above pooled training with all steps (1)" in said
    assert "One seed tells no spread" in said


def test_what_failed_is_told_and_does_not_count() -> None:
    results = made_up([0, 1], lambda job, site: 0.5 if job.site != "site-2" else 0.1)
    lone = next(job for job in results.reports if job.site == "site-2" and job.seed == 1)
    chain = next(job for job in results.reports if job.way == POOLED_CHAIN and job.seed == 0)
    kept = {job: reports for job, reports in results.reports.items() if job not in (lone, chain)}
    failing = replace(results, reports=kept, failures={lone: "it has one row", chain: "it diverged; lower it"})
    by_name = {method.name: method for method in failing.methods()}
    assert by_name["each site alone, worst"].scores == [0.5, 0.5]
    assert POOLED_CHAIN.name not in by_name
    assert [gain.site for gain in failing.gains()] == ["site-0", "site-1"]
    said = failing.failed()
    assert "each site alone (site-2), seed 1, failed: it has one row." in said
    assert len(said) == 2


EXPERIMENT = '''
"""Three sites of three classes."""
import torch
from rich.console import Console
from torch import nn
from fedelta import SGD, Classification, FedAvg, Federation, Task, Training

LR = 0.1
ROUNDS = 2
EMPTY = False

def program():
    task = Task(model=lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
                objective=Classification(classes=3))
    return Federation(algorithm=FedAvg(task=task, training=Training(optimizer=SGD(lr=LR), batch=8)), rounds=ROUNDS)

def sites():
    return ["north", "south [a]", "west"]

def examples(seed, n):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, 6, generator=g)
    x[torch.arange(n), y] += 2
    return x, y

def site(name):
    return examples(len(name), 0 if EMPTY and name == "west" else 40)

def test():
    return examples(100, 200)
'''
LINES = [
    "the model as it is",
    "closed form, one round",
    "each site alone, mean",
    "each site alone, worst",
    "pooled, longest chain",
    "pooled, all steps",
    "federated",
]
RUNS = 3 + 5  # a seed: sites alone, and the others


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "exp.py"
    path.write_text(EXPERIMENT)
    return path


def unwrapped(printed: str) -> str:
    return " ".join(printed.split())


def kept(out: Path) -> list[str]:
    path = out / "results.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_the_command_shows_all_lines_and_writes_a_report_that_stands_alone(
    fedelta: Fedelta, experiment: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    printed = fedelta("run", experiment, "--compare", "--seeds", 2, "--out", out, "--workers", 0)
    for line in LINES:
        assert re.search(rf"^ *{re.escape(line)} +\d+\.\d% ± ", printed, re.MULTILINE), line
    assert "From scratch is left out" in unwrapped(printed)
    assert len(kept(out)) == 2 * RUNS
    html = (out / "report.html").read_text(encoding="utf-8")
    for told in (*LINES, "south [a]", "exp: was it worth it?", "Drift between the sites", "longest site of the round"):
        assert told in html
    assert html.count("<svg") == 6  # bars, two curves, gains, drift, what the sites hold
    assert "<script" not in html
    fetched = re.findall(r"""(?:src|href|srcset|data)\s*=\s*["']?([^"'\s>]*)|url\(["']?([^"')]*)""", html)
    assert [t for pair in fetched for t in pair if t and not t.startswith(("#", "data:"))] == []
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.jsonl"]


def test_finished_runs_are_not_run_again(
    fedelta: Fedelta, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compare = ("run", experiment, "--compare", "--out", out, "--workers", 0)
    fedelta(*compare, "--seeds", 1)
    first = kept(out)
    with (out / "results.jsonl").open("a") as file:
        file.write(first[0][:40])  # as a crash would leave it
    assert f"of which {RUNS} are there already" in unwrapped(fedelta(*compare, "--seeds", 2))
    both = kept(out)
    assert both[:RUNS] == first
    assert len(both) == 1 + 2 * RUNS
    seeds = [json.loads(line)["seed"] for line in both[RUNS + 1 :]]
    assert seeds == [1] * RUNS
    fedelta(*compare, "--seeds", 2)
    assert kept(out) == both
    assert "are there already" not in unwrapped(fedelta(*compare, "--seeds", 1, "--rounds", 3))
    fedelta(*compare, "--seeds", 1, "--seed", 1)
    assert len(kept(out)) == 1 + 3 * RUNS
    monkeypatch.setattr("fedelta.cli.compare.own_digest", lambda: "of another state of fedelta")
    assert "are there already" not in unwrapped(fedelta(*compare, "--seeds", 1))


def test_processes_give_what_one_process_gives(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        fedelta("run", experiment, "--compare", "--seeds", 1, "--out", out, "--workers", workers)
        runs = {(run["method"], run["site"]): run["reports"] for run in map(json.loads, kept(out))}
        for reports in runs.values():
            for report in reports:
                del report["seconds"]
        found.append(runs)
    assert found[0] == found[1]
    assert len(found[0]) == RUNS


def test_ctrl_c_keeps_what_is_finished(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(experiment), "--compare", "--seeds", "1", "--set", "ROUNDS=40", "--out", str(out)]
    call = [sys.executable, "-c", "from fedelta.cli.main import main; main()", *arguments, "--workers", "2"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    compare = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while len(kept(out)) < 1 and compare.poll() is None:
        time.sleep(0.005)
    compare.send_signal(signal.SIGINT)
    _, errors = compare.communicate(timeout=300)
    before = kept(out)
    assert before
    if len(before) < RUNS:  # it may have been quicker
        assert compare.returncode == 130, errors
        assert f"{len(before)} of {RUNS} runs are kept" in errors
        assert "Traceback" not in errors
    printed = fedelta(*arguments, "--workers", 0)
    assert f"{len(before)} are there already" in unwrapped(printed)
    assert kept(out)[: len(before)] == before
    assert len(kept(out)) == RUNS


def test_a_site_without_rows_is_left_out_and_a_failure_is_told(
    fedelta: Fedelta, experiment: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compare = ("run", experiment, "--compare", "--seeds", 1, "--workers", 0)
    printed = fedelta(*compare, "--set", "EMPTY=true", "--out", out)
    assert "west has no rows to train on" in unwrapped(printed)
    assert len(kept(out)) == RUNS - 1
    printed = fedelta(*compare, "--set", "LR=1e30", "--out", tmp_path / "wild")
    assert "lower it" in unwrapped(printed)
    assert "closed form, one round" in printed
    assert len(kept(tmp_path / "wild")) == 2  # what does not train


def test_a_bug_of_the_users_model_is_named(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    experiment.write_text(EXPERIMENT.replace("nn.Linear(8, 3)", "nn.Linear(9, 3)"))
    for workers in (0, 1):
        compare = ("run", experiment, "--compare", "--seeds", 1, "--workers", workers, "--out", tmp_path / str(workers))
        said = fedelta(*compare, status=1)
        assert "shapes cannot be multiplied" in said
        assert len(said.strip().splitlines()) == 1


def test_the_board_shows_what_was_there_before_and_what_failed() -> None:
    jobs = [Job(way=way, seed=0, rounds=2) for way in (FEDERATED, POOLED_ALL, POOLED_CHAIN)]
    names = [job.name for job in jobs]
    for terminal in (True, False):
        screen = StringIO()
        console = Console(file=screen, force_terminal=terminal, width=100)
        with Board(jobs, console, names=names, metric=ACCURACY, before={jobs[0]: 0.875}) as board:
            board.show(jobs[1], Report(round=1, metrics={ACCURACY: 0.25}))
            board.finish(jobs[1])
            board.finish(jobs[2])
        shown = screen.getvalue()
        assert ("87.5%" in shown) == ("3/3" in shown) == terminal
        assert "25.0%" in shown
        assert ("pooled, longest chain, seed 0: failed" in shown) == (not terminal)


def test_what_does_not_go_together_is_refused(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    assert "is for --compare" in fedelta("run", experiment, "--seeds", 2, status=2)
    for option in (["--resume"], ["--plan", "plain"], ["--commit-every", "1"]):
        said = fedelta("run", experiment, "--compare", *option, status=2)
        assert f"--compare goes without {option[0]}" in said
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("three years of work")
    for out in (tmp_path / "thesis", experiment):
        assert "--out" in fedelta("run", experiment, "--compare", "--out", out, status=2)
    experiment.write_text(EXPERIMENT.replace("def test():", "def others():"))
    out = tmp_path / "out"
    assert "needs rows to measure on" in fedelta("run", experiment, "--compare", "--out", out, status=2)


def test_the_plan_of_the_experiment_is_used() -> None:
    """Sites at once give the same, and drift is known all the same."""
    reports = [
        done(Setup.of(federation(plan=Plan(cohort=cohort, channels_last=False)), sites()), FEDERATED)[-1]
        for cohort in (1, 3)
    ]
    for name in ("test_loss", DRIFT):
        assert reports[0].metrics[name] == pytest.approx(reports[1].metrics[name], rel=1e-4)
