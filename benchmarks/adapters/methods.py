"""Every method, and one run of it."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.adapters.workloads import TIERS, Workload
from fedelta import (
    CAUSAL_LANGUAGE_MODEL,
    SGD,
    AdamW,
    Cosine,
    FedAvg,
    Federation,
    FedExLoRA,
    FedKSeed,
    FedSALoRA,
    FedSB,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    FLoRANA,
    HetLoRA,
    Local,
    LoRAFAIR,
    Pretrained,
    RoLoRA,
    SiteData,
    Task,
    Training,
    run,
)
from fedelta.algorithms.algorithm import Algorithm
from fedelta.learning.adapted import origin

GRID = (1e-3, 2e-3, 4e-3)
Make = Callable[[Task, Training, Mapping[str, int]], Algorithm[Any]]


@dataclass(frozen=True, kw_only=True)
class Method:
    name: str
    sends: str
    make: Make
    ranks: bool = False  # whether it allows sites of several ranks
    grid: tuple[float, ...] = ()  # of learning rates; empty: FedIT's rate, as for all that train both factors


def _plain(kind: Callable[..., Algorithm[Any]]) -> Make:
    return lambda task, training, ranks: kind(task=task, training=training)


def _ranked(kind: Callable[..., Algorithm[Any]]) -> Make:
    return lambda task, training, ranks: kind(task=task, training=training, ranks=ranks)


def _zeroth_order(task: Task, training: Training, ranks: Mapping[str, int]) -> Algorithm[Any]:
    """On the factors and the head, by plain SGD."""
    return FedKSeed(task=task, training=replace(training, optimizer=SGD(lr=training.optimizer.lr), clip=None))


def _silver(task: Task, training: Training, ranks: Mapping[str, int]) -> Algorithm[Any]:
    """The first step, which moves all weights, at a rate for full fine-tuning where they are those of a large model."""
    source = origin(task.model)
    large = isinstance(source, Pretrained) and source.kind is not CAUSAL_LANGUAGE_MODEL
    return FedSB(task=task, training=training, first_lr=2e-5 if large else None)


METHODS = (
    Method(name="FedIT", sends="A, B", make=_plain(FedAvg), grid=GRID),
    Method(name="FFA-LoRA", sends="B", make=_plain(FFALoRA), grid=GRID),
    Method(name="RoLoRA", sends="A or B in turn", make=_plain(RoLoRA)),
    Method(name="FedSA-LoRA", sends="A", make=_plain(FedSALoRA)),
    Method(name="FLoRA", sends="A, B", make=_ranked(FLoRA), ranks=True),
    Method(name="FlexLoRA", sends="A, B", make=_ranked(FlexLoRA), ranks=True),
    Method(name="FedEx-LoRA", sends="A, B", make=_plain(FedExLoRA)),
    Method(name="HetLoRA", sends="A, B", make=_ranked(HetLoRA), ranks=True),
    Method(name="LoRA-FAIR", sends="A, B", make=_plain(LoRAFAIR)),
    Method(name="FLoRA-NA", sends="A, B", make=_plain(FLoRANA)),
    Method(name="Fed-SB", sends="R", make=_silver, grid=GRID),
    Method(name="FedKSeed", sends="4,096 numbers", make=_zeroth_order, grid=(1e-5, 1e-4, 1e-3)),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    score: float
    start: float | None  # after round zero, where there is one
    up: float  # bytes that a site sends in a round in which it takes part, the mean over the run
    down: float  # bytes that it receives
    seconds: float  # of a round, sites one after the other on one thread, the median
    error: float | None  # of the aggregation in the last round


def tuned_as(method: Method) -> Method:
    """The method whose learning rate it takes."""
    return method if method.grid else METHODS[0]


def measured(workload: Workload, method: Method, lr: float, seed: int, *, tuning: bool) -> dict[str, Any]:
    """One run, on one thread; on the validation rows where a rate is to be chosen."""
    torch.set_num_threads(1)
    data = workload.draw(seed)
    held_out = data.validation if tuning else data.test
    algorithm = method.make(workload.task, _training(workload, lr), TIERS if workload.ranks else {})
    federation = Federation(
        algorithm=algorithm,
        rounds=workload.rounds,
        start=workload.start,
        sampling=workload.sampling,
        seed=seed,
        test=None if algorithm.personal else held_out,
        validate_at_sites=algorithm.personal,  # each site's own model, on the same rows
        evaluate_every=workload.rounds,
    )
    fleet = Local(federation, lambda name: SiteData(train=data.sites[name], validation=held_out), list(data.sites))
    reports = [report for _, report in run(federation, fleet)]
    rounds = [report for report in reports if report.round]
    sent = rounds[:-1] if algorithm.personal else rounds  # without the messages of its evaluation
    part = "validation" if algorithm.personal else "test"
    name = f"{part}_{workload.metric}"
    turns = sum(len(report.cohort) - len(report.absent) for report in sent)
    zeroth = next((report.metrics.get(name) for report in reports if not report.round), None)
    return asdict(
        Result(
            score=rounds[-1].metrics[name],
            start=zeroth,
            up=sum(report.bytes_up for report in sent) / turns,
            down=sum(report.bytes_down for report in sent) / turns,
            seconds=statistics.median(report.seconds["sites"] + report.seconds["aggregation"] for report in rounds),
            error=rounds[-1].metrics.get("aggregation_error"),
        )
    )


def _training(workload: Workload, lr: float) -> Training:
    return Training(
        optimizer=AdamW(lr=lr),
        batch=workload.batch,
        steps=workload.steps,
        epochs=None if workload.steps else 1,
        clip=1.0,
        schedule=Cosine(rounds=workload.rounds, floor=0.1),
    )
