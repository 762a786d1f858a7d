"""What `fedelta run --compare` compares, and one run of it.

All methods have the experiment's model, optimiser, batch size and schedule, and the same rounds. In each round, a site
alone and the pooled rows are trained for as many steps as the longest of the cohort's sites makes in it ("longest
chain": what a federated round takes one after the other); pooled rows also for as many as all sites of the cohort make
together ("all steps"). An optimiser starts anew in each round, as it does at the sites.

If the experiment starts from round zero, so do all methods with the same start: a site alone from the head that its own
rows give. From scratch there is no round zero, all weights are drawn, and all are trained (see `learning.scratch`).

Nothing is sent for an evaluation here: the bytes are those of round zero and of training.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from fedelta.adapters.moving import fixed
from fedelta.aggregation.drift import Measured
from fedelta.algorithms import round_zero
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.forecasting import local_steps
from fedelta.cli import methods
from fedelta.cli.methods import Data
from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.examples import Examples
from fedelta.core.parameters import Parameters
from fedelta.core.program import Report, Sight, SiteData, run
from fedelta.core.seeds import derive
from fedelta.core.swap import swapped
from fedelta.fleet.local import Local
from fedelta.learning.closed_form import ClosedForm
from fedelta.learning.objectives import Objective
from fedelta.learning.plan import Plan
from fedelta.learning.pooling import pooled
from fedelta.learning.pretrained import Pretrained
from fedelta.learning.scratch import FromScratch
from fedelta.learning.task import Task
from fedelta.learning.training import evaluate, train
from fedelta.observe.text import is_share
from fedelta.privacy.ledger import MemoryLedger

DRIFT = "drift"  # the metric of a federated round (see `aggregation.drift`)


class Budget(Enum):
    """Local steps in a round, where they are not the federation's own."""

    CHAIN = "as many as the longest site of the round"
    ALL = "as many as all sites of the round together"


Way = methods.Way[Budget | None]
Job = methods.Job[Budget | None]

AS_IS = Way(name="the model as it is", data=Data.NOTHING, how=None)
CLOSED = Way(name="closed form, one round", data=Data.SUMS, how=None)
ALONE = Way(name="each site alone", data=Data.ALONE, how=Budget.CHAIN)
POOLED_CHAIN = Way(name="pooled, longest chain", data=Data.POOLED, how=Budget.CHAIN)
POOLED_ALL = Way(name="pooled, all steps", data=Data.POOLED, how=Budget.ALL)
FEDERATED = Way(name="federated", data=Data.FEDERATED, how=None)
TRAINED = (ALONE, POOLED_CHAIN, POOLED_ALL, FEDERATED)


def from_scratch(way: Way) -> Way:
    """The same from weights that are drawn."""
    return replace(way, name=f"scratch: {way.name}", pretrained=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """The experiment, taken apart into its methods. `Setup.of` finds out which of them there are."""

    federation: Federation[Any]
    sites: Mapping[str, SiteData]  # those with rows to train on
    pooled: Examples | None
    closed: ClosedForm | None
    scratch: Task | None
    left_out: Sequence[str]  # a sentence for each method that there is not
    _budgets: dict[tuple[int, Budget, int], list[int]] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, federation: Federation[Any], sites: Mapping[str, SiteData]) -> "Setup":
        """Raises BadInput if there is nothing to train on or nothing to measure on."""
        if not sites:
            raise BadInput("no site has rows to train on, so there is nothing to compare")
        if federation.test is None and not any(map(_held_back, sites.values())):
            raise BadInput(
                "a comparison needs rows to measure on; define test(), or let site(name) return "
                "SiteData(train=..., validation=...)"
            )
        rows, closed, scratch = _pooled(sites), _closed_form(federation), _scratch(federation)
        found = [_part(part) for part in (closed, rows, scratch)]
        return cls(
            federation=federation,
            sites=sites,
            closed=found[0],
            pooled=found[1],
            scratch=found[2],
            left_out=[part for part in (closed, rows, scratch) if isinstance(part, str)],
        )

    def keeping_features(self, folder: Path) -> "Setup":
        """The same, with features of frozen bodies in `folder`, where all processes find them."""
        federation = self.federation
        task = federation.algorithm.task
        if task.features is not None:
            return self
        algorithm = swapped(federation.algorithm, task, replace(task, features=folder))
        return replace(self, federation=replace(federation, algorithm=algorithm))

    @property
    def objective(self) -> Objective:
        return self.federation.algorithm.task.objective

    @property
    def metric(self) -> str:
        """By which methods are compared: a share (accuracy, …) if there is one, otherwise the first metric."""
        names = self.objective.metrics
        return f"{self.part}_{next(filter(is_share, names), names[0])}"

    @property
    def part(self) -> str:
        """Of what all methods are measured on."""
        return "validation" if self.federation.test is None else "test"

    @property
    def common(self) -> list[Examples]:
        """What all methods are measured on: the test set, or all that the sites hold back."""
        if self.federation.test is not None:
            return [self.federation.test]
        return [held for data in self.sites.values() if (held := _held_back(data)) is not None]

    def own(self, site: str) -> list[Examples]:
        """What a site measures on: what it holds back, or the same as everyone."""
        held = _held_back(self.sites[site])
        return self.common if held is None else [held]

    @property
    def measuring_alone(self) -> int:
        """The number of sites that measure on what they hold back."""
        return sum(_held_back(data) is not None for data in self.sites.values())

    def ways(self) -> list[Way]:
        """All methods, in the order in which they are shown."""
        known = [way for way in TRAINED if way.data is not Data.POOLED or self.pooled is not None]
        scratch = [from_scratch(way) for way in known] if self.scratch is not None else []
        return [AS_IS, *([CLOSED] if self.closed is not None else []), *known, *scratch]

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """All runs, the longest first."""
        order = [Data.FEDERATED, Data.POOLED, Data.ALONE, Data.SUMS, Data.NOTHING]
        found: list[Job] = []
        for way in sorted(self.ways(), key=lambda way: (order.index(way.data), way.how is Budget.CHAIN)):
            trained = way.data not in (Data.NOTHING, Data.SUMS)
            rounds = max(1, self.federation.rounds) if trained else 1
            for seed in seeds:
                who = self.sites if way.data is Data.ALONE else [None]
                found += [Job(way=way, seed=seed, rounds=rounds, site=site) for site in who]
        return found

    def work(self, job: Job, start: bytes | None = None) -> Generator[Report, None, bytes]:
        """Run a job. Its last report has the metrics of what came of it, per site too; where it fails, returns why."""
        try:
            if job.way.data in (Data.NOTHING, Data.SUMS, Data.FEDERATED):
                yield from self._federated(job)
            else:
                yield from self._locally(job)
        except FedeltaError as error:
            return str(error).encode()
        return b""

    def steps(self, job: Job, least: int) -> list[int]:
        """Of a job with a budget, in each round; `least` rows make a batch."""
        assert job.way.how is not None
        key = (job.seed, job.way.how, least)
        if key not in self._budgets:
            self._budgets[key] = list(self._counted(*key))
        return self._budgets[key]

    def program(self, job: Job) -> Federation[Any]:
        """The federation of a job that is none of `Data.ALONE` and `Data.POOLED`."""
        algorithm, start = self.federation.algorithm, self.federation.start
        if not job.way.pretrained:
            algorithm, start = swapped(algorithm, algorithm.task, self.scratch), None
        rounds = self.federation.rounds
        if job.way.data is Data.NOTHING:
            rounds, start = 0, None
        elif job.way.data is Data.SUMS:
            rounds, start = 0, self.closed
        return replace(
            self.federation,
            algorithm=algorithm,
            rounds=rounds,
            start=start,
            seed=job.seed,
            test=None,  # measured here, like what the sites hold back
            validate_at_sites=False,
            stop=None,
            ledger=MemoryLedger(),  # each job spends a budget of its own: none of them is released
        )

    def _federated(self, job: Job) -> Iterator[Report]:
        federation, drifts = self.program(job), list[float]()
        seen = federation.collect.shows is Sight.EACH and federation.privacy is None
        if seen and federation.algorithm.kind == "difference":
            federation = replace(federation, rule=Measured(rule=federation.aggregation, tell=drifts.append))
        task, state = federation.algorithm.task, federation.init()
        before = Report(round=0)
        if federation.finished(state) is not None:
            yield self._last(before, job, task, federation.algorithm.parameters(state.algorithm))
            return
        if federation.start is None:
            yield self._measured(before, job, task, federation.algorithm.parameters(state.algorithm))
        rounds = run(federation, Local(federation, self.sites.__getitem__, list(self.sites)), state)
        for state, report in rounds:
            if drifts:
                report = replace(report, metrics={**report.metrics, DRIFT: drifts.pop()})
            parameters = federation.algorithm.parameters(state.algorithm)
            if federation.finished(state) is not None:
                yield self._last(report, job, task, parameters)
            elif report.round % federation.evaluate_every == 0:
                yield self._measured(report, job, task, parameters)
            else:
                yield report

    def _locally(self, job: Job) -> Iterator[Report]:
        """Plain training in one place."""
        task = self._task(job.way)
        rows = self.pooled if job.site is None else self.sites[job.site].train
        assert rows is not None
        training, name = self.federation.algorithm.training, job.site or "pooled"
        parameters = self._start(job, task, rows, name)
        model, rows = task.flat_on(rows, job.seed, self._plan)
        model.load(parameters)
        report = Report(round=0)
        for round, steps in enumerate(self.steps(job, model.least_batch), start=1):
            sums: dict[str, float] = {}
            if steps:
                once = replace(training, epochs=None, steps=steps)
                seed = derive(job.seed, round, name, "local")  # of the first round, the batches of the federation
                sums = train(model, rows, task.objective, once, self._plan, round=round, seed=seed)
            metrics = {f"train_{key}": value for key, value in task.objective.summarise(sums).items()}
            report = Report(round=round, metrics=metrics)
            if round < self.federation.rounds:
                yield report
        yield self._last(report, job, task, model.read())

    def _start(self, job: Job, task: Task, rows: Examples, name: str) -> Parameters:
        """The model as it is built, or with the head that these rows give in closed form."""
        start = self.federation.start if job.way.pretrained else None
        algorithm = FedAvg(task=task, training=self.federation.algorithm.training)
        federation = Federation(algorithm=algorithm, rounds=0, start=start, seed=job.seed, plan=self._plan)
        state = federation.init()
        zeroth = run(federation, Local(federation, {name: SiteData(train=rows)}.__getitem__, [name]), state)
        return next((headed for headed, _ in zeroth), state).algorithm

    def _counted(self, seed: int, budget: Budget, least: int) -> Iterator[int]:
        federation, names = self.federation, list(self.sites)
        training = federation.algorithm.training
        steps = {name: local_steps(training, len(data.train), least) for name, data in self.sites.items()}
        for round in range(1, federation.rounds + 1):
            cohort = [steps[name] for name in federation.sampling(names, round, seed)]
            if len(cohort) < max(1, federation.min_sites):
                yield 0  # a round in which nobody trains
            else:
                yield max(cohort) if budget is Budget.CHAIN else sum(cohort)

    def _task(self, way: Way) -> Task:
        if way.pretrained:
            return fixed(self.federation.algorithm.task)  # where the base moves, it does so in federated rounds alone
        assert self.scratch is not None
        return self.scratch

    @property
    def _plan(self) -> Plan:
        return self.federation.plan.plain

    def _measured(self, report: Report, job: Job, task: Task, parameters: Parameters) -> Report:
        found = self._metrics(task, job.seed, parameters, self.common)
        return replace(report, metrics={**report.metrics, **found})

    def _last(self, report: Report, job: Job, task: Task, parameters: Parameters) -> Report:
        report = self._measured(report, job, task, parameters)
        everyone = {key: value for key, value in report.metrics.items() if key.startswith(f"{self.part}_")}
        per_site = {}
        for site in self.sites if job.site is None else [job.site]:
            alike = self.measuring_alone == 0 or _held_back(self.sites[site]) is None
            per_site[site] = everyone if alike else self._metrics(task, job.seed, parameters, self.own(site))
        return replace(report, per_site=per_site)

    def _metrics(self, task: Task, seed: int, parameters: Parameters, parts: Sequence[Examples]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for part in parts:
            task.check(part)
            model, rows = task.flat_on(part, seed, self._plan)
            model.load(parameters)
            for name, value in evaluate(model, rows, task.objective, self._plan).items():
                sums[name] = sums.get(name, 0.0) + value
        return {f"{self.part}_{name}": value for name, value in task.objective.summarise(sums).items()}


def _held_back(data: SiteData) -> Examples | None:
    return data.validation if data.validation is not None and len(data.validation) else None


def _part(found: Any) -> Any:
    """None for the sentence that says why there is nothing."""
    return None if isinstance(found, str) else found


def _pooled(sites: Mapping[str, SiteData]) -> Examples | str:
    try:
        return pooled([data.train for data in sites.values()])
    except BadInput as error:
        return f"Pooled training is left out: {error}."


def _closed_form(federation: Federation[Any]) -> ClosedForm | str:
    """How the experiment starts, or how a new head would."""
    task, start = federation.algorithm.task, federation.start or round_zero.USUAL
    try:
        replace(federation, start=start)  # refuses what it does not go with
        round_zero.check(start, task, task.build(federation.seed))
    except FedeltaError as error:
        return f"Round zero in closed form is left out: {str(error).partition(';')[0]}."
    return start


def _scratch(federation: Federation[Any]) -> Task | str:
    task = federation.algorithm.task
    if not isinstance(task.model, Pretrained):
        return (
            "From scratch is left out: what is built is no Pretrained(), of which the architecture without the weights "
            "would be known."
        )
    fresh = replace(task, model=FromScratch(like=task.model))
    if swapped(federation.algorithm, task, fresh) is federation.algorithm:
        return f"From scratch is left out: {type(federation.algorithm).__name__} does not let its task be exchanged."
    return fresh
