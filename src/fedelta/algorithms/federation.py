"""The horizontal program: sample sites, broadcast, train locally, collect, aggregate, update.

Life of a round: `step` samples a cohort and sends it the broadcast; `handle` at each site trains, passes the
update through the stages and the encoding, and hands it to the collect; back in `step` what arrives is decoded,
checked, passed through the stages in reverse, and aggregated as it comes.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import nn

from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import ManyRule, Rule
from fedelta.algorithms import round_zero
from fedelta.algorithms.algorithm import Algorithm, Incoming, IncomingMany
from fedelta.algorithms.parts import Clear, Collect, Encoding, Float32, Stage
from fedelta.algorithms.sampling import All, Fixed, Sampling
from fedelta.algorithms.stopping import Best, Stop
from fedelta.algorithms.tally import Tally, bodies
from fedelta.core.errors import BadInput, BadTensors, TooFewSites, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests, Tensors, Update
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Fleet, Report, Sight, Site
from fedelta.core.seeds import derive, derive_each
from fedelta.core.threads import intra_op_threads
from fedelta.learning.closed_form import ClosedForm
from fedelta.learning.flat import FlatModel
from fedelta.learning.plan import Plan
from fedelta.learning.training import evaluate

S = TypeVar("S")
NO_VALUES = Layout.of({})


@dataclass(frozen=True, kw_only=True)
class FederationState(Generic[S]):
    """All that a resume needs. `bases` has, per site, the round of its last accepted reply."""

    algorithm: S
    round: int = 0
    started: bool = False  # round zero is over, if there is one
    bases: Mapping[PartyId, int] = field(default_factory=dict)
    best: Best = Best()
    stopped: str | None = None
    stop: str = ""  # the condition to which `best` and `stopped` belong: another one starts anew


@dataclass(frozen=True, kw_only=True)
class Federation(Generic[S]):
    algorithm: Algorithm[S]
    rounds: int = field(metadata={"digest": False})
    start: ClosedForm | None = None  # round zero: the head in closed form, from all sites
    sampling: Sampling = All()
    rule: Rule = Mean()
    stages: Sequence[Stage] = ()
    encoding: Encoding = Float32()
    collect: Collect = Clear()
    stop: Stop | None = field(default=None, metadata={"digest": False})
    seed: int = 0
    min_sites: int = 1  # that must answer for a round to count
    test: Examples | None = field(default=None, metadata={"digest": False})  # held out at the coordinator
    evaluate_every: int = 1  # rounds between evaluations; the last round is always evaluated
    plan: Plan = field(default=Plan(), metadata={"digest": False})  # of the arithmetic: a manifest has it apart
    validate_at_sites: bool = False  # ask every site to evaluate on the part that it holds back

    def __post_init__(self) -> None:
        for name, least in (("rounds", 0), ("min_sites", 1), ("evaluate_every", 1)):
            if getattr(self, name) < least:
                raise BadInput(f"Federation.{name} must be >= {least}, got {getattr(self, name)}")
        if self.rule.needs is Sight.EACH and self.collect.shows is Sight.SUM:
            raise UnsoundCombination(
                f"{self.rule} compares single updates, but {self.collect} reveals only their sum; "
                "use Mean() as the rule or Clear() as the collect"
            )
        if isinstance(self.sampling, Fixed) and self.sampling.size < self.min_sites:
            raise BadInput(f"{self.sampling} asks fewer sites than min_sites={self.min_sites} must answer")
        objective = self.algorithm.task.objective
        known = [f"{part}_{name}" for part in ("train", "test", "validation") for name in objective.metrics]
        if self.stop is not None and self.stop.metric not in known:
            raise BadInput(f"there is no metric {self.stop.metric!r} to stop at; there are {', '.join(known)}")
        if self.test is not None:
            try:
                self.algorithm.task.check(self.test)
            except BadInput as error:
                raise BadInput(f"the test set: {error}") from error
            if not len(self.test):
                raise BadInput("the test set has no examples")
        if self.start is not None:
            round_zero.classes(self.algorithm.task)
            if self.stages:
                raise UnsoundCombination(
                    f"{self.start} collects sums of features, which {self.stages} would not treat; leave `start` out"
                )
        if not self.encoding.linear and self.collect.shows is Sight.SUM:
            raise UnsoundCombination(
                f"{self.encoding} cannot be added up, but {self.collect} reveals only sums; use a linear encoding"
            )

    @cached_property
    def _plan(self) -> Plan:
        return self.plan.plain

    def init(self) -> FederationState[S]:
        """The state before the first round. Raises BadInput if `stop` waits for what is never measured."""
        part = self.stop.metric.partition("_")[0] if self.stop is not None else "train"
        if (part == "test" and self.test is None) or (part == "validation" and not self.validate_at_sites):
            cure = "give test examples" if part == "test" else "set validate_at_sites"
            raise BadInput(f"{self.stop} waits for a metric that is never measured; {cure}")
        module = self.algorithm.task.build(self.seed)
        if self.start is not None:
            round_zero.check(self.start, self.algorithm.task, module)
        return FederationState(algorithm=self.algorithm.init(Parameters.of(module)))

    def finished(self, state: FederationState[S]) -> str | None:
        if self.start is not None and not state.started:
            return None
        if state.stopped is not None and state.stop == repr(self.stop):
            return state.stopped
        done = "its one round is" if self.rounds == 1 else f"all {self.rounds} rounds are"
        return f"{done} done" if state.round >= self.rounds else None

    def step(self, state: FederationState[S], fleet: Fleet) -> tuple[FederationState[S], Report]:
        began = time.perf_counter()
        parties = fleet.parties()
        if len(parties) < self.min_sites:
            raise TooFewSites(f"there are {len(parties)} sites, and min_sites={self.min_sites} must answer")
        zeroth = self.start is not None and not state.started
        round = 0 if zeroth else state.round + 1
        tally = Tally(cohort=parties if zeroth else self.sampling(parties, round, self.seed))
        with intra_op_threads(1):  # the cores are the sites', and this is bound by memory
            if zeroth:
                algorithm, metrics = self._start(state.algorithm, fleet, tally), dict[str, float]()
            else:
                algorithm, metrics = self._train(state, round, fleet, tally)
        trained, waited = time.perf_counter(), tally.waited
        parameters = self.algorithm.parameters(algorithm)
        due = round % self.evaluate_every == 0 or round >= self.rounds
        if due:
            metrics |= self.evaluate(parameters) | self._validate(parameters, round, fleet, tally)
        best = state.best if state.stop == repr(self.stop) else Best()
        best, stopped = self.stop.update(best, round, metrics) if self.stop else (best, None)
        if stopped and not due:  # the last round is always evaluated
            metrics |= self.evaluate(parameters) | self._validate(parameters, round, fleet, tally)
        after = FederationState(
            algorithm=algorithm,
            round=round,
            started=True,
            bases=state.bases if zeroth else {**state.bases, **dict.fromkeys(tally.answered, round)},
            best=best,
            stopped=stopped,
            stop=repr(self.stop),
        )
        report = Report(
            round=round,
            metrics=metrics,
            cohort=tally.cohort,
            per_site=tally.per_site,
            absent=tally.absent,
            unmeasured=tally.unmeasured,
            bytes_down=tally.bytes_down,
            bytes_up=tally.bytes_up,
            seconds={
                "sites": waited,
                "aggregation": trained - began - waited,
                "evaluation": time.perf_counter() - trained,
            },
            stop=self.finished(after),
        )
        return after, report

    def _train(self, state: FederationState[S], round: int, fleet: Fleet, tally: Tally) -> tuple[S, dict[str, float]]:
        """The algorithm's state after the cohort has trained, and the metrics of that training."""
        cohort, algorithm = tally.cohort, state.algorithm
        if len(cohort) < self.min_sites:  # Poisson sampling may draw fewer: a round in which nothing is learned
            return algorithm, {}
        shared, own = self.algorithm.broadcast(algorithm, cohort)
        requests = Requests(to=cohort, op="train", round=round, bases=state.bases, shared=shared, bodies=own)
        start = self.algorithm.parameters(algorithm)
        total = self.rule(self._arriving(fleet, requests, start, tally), len(cohort))
        for stage in reversed(self.stages):
            total = stage.on_total(total)
        return self.algorithm.step(algorithm, total), self._named("train", total.sums)

    def _start(self, state: S, fleet: Fleet, tally: Tally) -> S:
        """The algorithm's state with the head that round zero gives."""
        assert self.start is not None
        task, parameters = self.algorithm.task, self.algorithm.parameters(state)
        requests = Requests(to=tally.cohort, op="statistics", round=0, shared={"parameters": parameters.vector})
        replies = tally.watch(self.collect.gather(fleet, requests, 1), requests)
        module = self._working_copy().module
        total = round_zero.total(replies, task, module, tally, self.min_sites)
        return self.algorithm.init(round_zero.with_head(self.start, task, module, parameters, total))

    def handle(self, request: Request, site: Site) -> Reply:
        if request.op == "train":
            return self.collect.handle(request, site, lambda: self._update(request, site))
        if request.op == "evaluate":
            return self.collect.handle(request, site, lambda: self._evaluation(request, site))
        if request.op == "statistics":
            return self.collect.handle(request, site, lambda: self._statistics(request, site))
        raise BadInput(f"this program knows no {request.op!r} request")

    def evaluate(self, parameters: Parameters) -> dict[str, float]:
        """Metrics of a model on the coordinator's `test` examples; empty if there are none."""
        if self.test is None:
            return {}
        return self._named("test", self._measure(parameters, self.test))

    def model(self, state: FederationState[S]) -> nn.Module:
        """A new module with the global weights of `state`, on the CPU."""
        module = self.algorithm.task.build(self.seed)
        self.algorithm.parameters(state.algorithm).load(module)
        return module

    def handle_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        """Train `sites` at once. One summed update goes on where nothing on its way has to see the single ones."""
        if requests.op != "train" or self.collect.shows is not Sight.EACH:
            raise BadInput(f"{requests.op!r} requests under {self.collect} are handled one by one")
        incoming = IncomingMany(
            shared=requests.shared,
            own=requests.bodies,
            round=requests.round,
            seed=self.seed,
            local_seeds=derive_each((self.seed, requests.round), requests.to, ("local",)),
            plan=self._plan,
        )
        updates, errors = self.algorithm.local_many(incoming, sites)
        if not self.stages and self.encoding.linear and isinstance(self.rule, ManyRule):
            refused = self.rule.refuse_many(updates)
            errors |= {updates.senders[row]: reason for row, reason in refused.items()}
            updates = updates.without(refused)
            body = self.encoding.encode(self.rule.combine(updates)) if len(updates) else {}
        else:
            updates = replace(updates, values=updates.values.cpu())
            by_name = {site.id: site for site in sites}
            encoded = [self._outgoing(one, by_name[to]) for to, one in zip(updates.senders, updates, strict=True)]
            body = {name: torch.stack([tensors[name] for tensors in encoded]) for name in encoded[0]} if encoded else {}
        return Replies(senders=updates.senders, answers=requests.id, round=requests.round, body=body, errors=errors)

    def _update(self, request: Request, site: Site) -> Tensors:
        return self._outgoing(self.algorithm.local(self._incoming(request), site), site)

    def _statistics(self, request: Request, site: Site) -> Tensors:
        parameters = request.shared["parameters"]
        update = round_zero.statistics(self.algorithm.task, parameters, site, self.seed, self._plan)
        return update.to_tensors()

    def _incoming(self, request: Request) -> Incoming:
        return Incoming(
            tensors={**request.shared, **request.body},
            round=request.round,
            seed=self.seed,
            local_seed=derive(self.seed, request.round, request.to, "local"),
            plan=self._plan,
        )

    def _outgoing(self, update: Update, site: Site) -> Tensors:
        for stage in self.stages:
            update = stage.on_site(update, site)
        return self.encoding.encode(update)

    def _evaluation(self, request: Request, site: Site) -> Tensors:
        held_back = site.data().validation
        sums: Mapping[str, float] = {}
        if held_back is not None and len(held_back):
            self.algorithm.task.check(held_back)
            sums = self._measure(Parameters(self._working_copy().layout, request.shared["parameters"]), held_back)
        return Update(values=Parameters.zeros(NO_VALUES), sums=sums).to_tensors()

    def _measure(self, parameters: Parameters, examples: Examples) -> dict[str, float]:
        model, rows = self.algorithm.task.flat_on(examples, self.seed, self._plan)
        model.load(parameters)
        return evaluate(model, rows, self.algorithm.task.objective, self._plan)

    def _working_copy(self) -> FlatModel:
        return self.algorithm.task.flat(self.seed, self._plan)

    def _named(self, part: str, sums: Mapping[str, float]) -> dict[str, float]:
        return {f"{part}_{name}": value for name, value in self.algorithm.task.objective.summarise(sums).items()}

    def _arriving(self, fleet: Fleet, requests: Requests, start: Parameters, tally: Tally) -> Iterator[Update]:
        """The updates of a cohort as they come, decoded and accepted by the rule; `tally` takes note of the rest."""
        together = self._plan.cohort or 1
        for reply in tally.watch(self.collect.gather(fleet, requests, together), requests):
            for senders, body in bodies(reply, tally.absent):
                try:
                    update = self.encoding.decode(body, start.layout)
                    self._check(update, start, len(senders))
                except BadTensors as error:
                    tally.absent |= dict.fromkeys(senders, f"its update is malformed: {error}")
                    continue
                for stage in reversed(self.stages):
                    update = stage.on_arrival(update)
                refusal = self.rule.refuse(update)
                if refusal is not None:
                    tally.absent |= dict.fromkeys(senders, refusal)
                    continue
                tally.accept(senders, update.count)
                yield update
        if tally.accepted < self.min_sites:
            raise TooFewSites(tally.shortage(requests.round, self.min_sites))

    def _check(self, update: Update, start: Parameters, senders: int) -> None:
        """Raise BadTensors for an update that could not be added to the others."""
        if update.values.vector.dtype != start.vector.dtype:
            raise BadTensors(f"its values are {update.values.vector.dtype}, not {start.vector.dtype}")
        if update.kind != self.algorithm.kind:
            raise BadTensors(f"it is a {update.kind}, not a {self.algorithm.kind}")
        if self.collect.shows is Sight.EACH and update.count != senders:
            raise BadTensors(f"it claims to be of {update.count} sites")
        missing = set(self.algorithm.task.objective.sums) - update.sums.keys()
        if missing:
            raise BadTensors(f"it lacks the sums {', '.join(sorted(missing))}")

    def _validate(self, parameters: Parameters, round: int, fleet: Fleet, tally: Tally) -> dict[str, float]:
        """Metrics over all sites' held-back examples, and per site where the collect shows them."""
        if not self.validate_at_sites:
            return {}
        shared = {"parameters": parameters.vector}
        requests = Requests(to=fleet.parties(), op="evaluate", round=round, shared=shared)
        sums: dict[str, list[float]] = {}
        for reply in tally.watch(self.collect.gather(fleet, requests, 1), requests):
            assert isinstance(reply, Reply)
            try:
                found = self._measured(reply)
            except BadTensors as error:
                tally.unmeasured[reply.sender] = str(error)
                continue
            if self.collect.shows is Sight.EACH and found:
                tally.per_site[reply.sender] = self._named("validation", found)
            for name, value in found.items():
                sums.setdefault(name, []).append(value)
        # fsum is exact, so the order of arrivals does not show
        return self._named("validation", {name: math.fsum(values) for name, values in sums.items()})

    def _measured(self, reply: Reply) -> Mapping[str, float]:
        """The sums of an evaluation, empty from a site that holds nothing back. Raises BadTensors if there are none."""
        if reply.error is not None:
            raise BadTensors(reply.error)
        sums = Update.from_tensors(reply.body, NO_VALUES).sums
        if sums and sums.keys() != set(self.algorithm.task.objective.sums):
            raise BadTensors(f"its evaluation has the sums {', '.join(sorted(sums))}")
        if not all(map(math.isfinite, sums.values())):
            raise BadTensors("its evaluation gave a number that is not finite")
        return sums
