"""fedelta through `run()`, with a run folder that takes every report, under one of its execution plans."""

import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.simulation.outcome import Clock, Contestant, Outcome, Settings
from benchmarks.simulation.plans import FedeltaPlan
from benchmarks.simulation.workloads import CLASSES, Workload, data, trained, vector
from fedelta import SGD, AdamW, Classification, Examples, FedAvg, Federation, Fixed, Local, Plan, Task, Training, run
from fedelta.core.parameters import Parameters
from fedelta.core.program import Fleet
from fedelta.fleet.workers import Workers
from fedelta.learning.optimizers import Optimizer
from fedelta.learning.trial import settle
from fedelta.observe.folder import RunFolder
from fedelta.observe.manifest import environment


def contestant(plan: FedeltaPlan) -> Contestant:
    return Contestant(packages=("fedelta", "torch"), run=partial(_run, plan))


def _run(plan: FedeltaPlan, workload: Workload, rounds: int, settings: Settings) -> Outcome:
    examples = data(workload, "cpu" if plan.workers else settings.device)  # a device is not shared by processes
    names = [f"site-{index:05d}" for index in range(workload.sites)]

    def site(name: str) -> Examples:
        return Examples(*examples.site(int(name.removeprefix("site-"))))

    chosen, trial_s = _plan(plan.workers, plan.trial, tuple(plan.plan.items()), workload, settings)
    phases: Counter[str] = Counter({"trial of the plan": trial_s})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        clock = Clock(settings.device)
        federation = _federation(chosen, workload, rounds)
        reports = stack.enter_context(RunFolder.create(folder, environment()))
        fleet: Fleet
        if plan.workers:
            fleet = stack.enter_context(Workers(federation, site, names, workers=plan.workers, threads=plan.threads))
        else:
            fleet = Local(federation, site, names, threads=plan.threads)
        for state, report in run(federation, fleet):
            reports.add(state, report)
            clock.mark()
            phases.update(report.seconds)
            if report.absent:
                raise RuntimeError(f"{len(report.absent)} sites were absent: {next(iter(report.absent.values()))}")
    return Outcome(ends=clock.ends, model=vector(trained(federation.model(state))), phases=dict(phases))


@cache
def _plan(
    workers: int, trial: bool, given: tuple[tuple[str, Any], ...], workload: Workload, settings: Settings
) -> tuple[Plan, float]:
    """The plan as fedelta takes it, and the seconds that its trial took; chosen once in a process."""
    plan = Plan(**dict(given), device=settings.device)
    if not trial:
        return plan, 0.0
    started = time.perf_counter()
    examples = data(workload, settings.device if not workers else "cpu")
    sites = [Examples(*examples.site(index)) for index in range(workload.per_round)]
    at_most = -(-workload.per_round // max(1, workers))
    found = settle(plan, _task(workload), _training(workload), sites, 0, at_most=at_most)
    print(f"{workload.name}: {found.said}", flush=True)
    return found.plan, time.perf_counter() - started


def _federation(plan: Plan, workload: Workload, rounds: int) -> Federation[Parameters]:
    return Federation(
        algorithm=FedAvg(task=_task(workload), training=_training(workload)),
        sampling=Fixed(size=workload.per_round),
        rounds=rounds,
        plan=plan,
    )


def _task(workload: Workload) -> Task:
    return Task(model=workload.build, objective=Classification(classes=CLASSES))


def _training(workload: Workload) -> Training:
    return Training(optimizer=_optimizer(workload), batch=workload.batch, epochs=workload.epochs)


def _optimizer(workload: Workload) -> Optimizer:
    own = workload.optimizer
    return SGD(lr=own.lr, momentum=own.momentum) if own.kind == "sgd" else AdamW(lr=own.lr)
