"""The horizontal program: sample sites, broadcast, train locally, collect, aggregate, update.

Life of a round: `step` samples a cohort and sends it the broadcast; each site (at_site.py) trains, passes the update
through the stages and the encoding, and hands it to the collect; back in `step` what arrives is decoded, checked,
passed through the stages in reverse, and aggregated as it comes.
"""

import itertools
import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Generic, TypeVar

from torch import nn

from fedelta.aggregation.factors import Meter, half, pairs
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms import evaluation, handover, round_zero, soundness
from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.arriving import arriving
from fedelta.algorithms.at_site import AtSite
from fedelta.algorithms.mechanism import Entropy, Privacy, scheme
from fedelta.algorithms.parts import Clear, Collect, Encoding, Float32, Stage
from fedelta.algorithms.private import Guard
from fedelta.algorithms.sampling import All, Poisson, Sampling
from fedelta.algorithms.state import FederationState
from fedelta.algorithms.stopping import Best, Stop
from fedelta.algorithms.tally import Tally
from fedelta.core.digest import digest
from fedelta.core.errors import BadInput, RoundLost, TooFewSites
from fedelta.core.examples import Examples
from fedelta.core.grid import Terms
from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests, Tensors, Update
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Fleet, Report, Sight, Site
from fedelta.core.release import Ledger
from fedelta.core.threads import intra_op_threads
from fedelta.learning.closed_form import ClosedForm
from fedelta.learning.flat import FlatModel
from fedelta.learning.plan import Plan
from fedelta.learning.saving import frozen_digest
from fedelta.learning.training import evaluate
from fedelta.privacy.example_level import ROWS
from fedelta.privacy.guarantee import PrivacyState
from fedelta.privacy.ledger import MemoryLedger

S = TypeVar("S")
_MOST_LOST = 3  # rounds in a row: then it is not by chance that nothing comes of them, and the run ends


@dataclass(frozen=True, kw_only=True)
class Federation(Generic[S]):
    """Raises BadInput for a number out of range, UnsoundCombination for parts that do not go together."""

    algorithm: Algorithm[S]
    rounds: int = field(metadata={"digest": False})
    start: ClosedForm | None = None  # round zero: the head in closed form, from all sites
    sampling: Sampling = All()
    rule: Rule | None = None  # how updates become one; None: as the algorithm does it
    privacy: Privacy | None = None  # the guarantee that sites or examples have
    stages: Sequence[Stage] = ()
    encoding: Encoding = Float32()
    collect: Collect = Clear()
    stop: Stop | None = field(default=None, metadata={"digest": False})
    seed: int = 0
    min_sites: int = 1  # that must answer for a round to count
    # With which a round is complete: the others are withdrawn, so that it waits for no straggler (Bonawitz et al. 2019,
    # "Towards Federated Learning at Scale", section 2.2, who ask 1.3 times as many). None: all that were asked.
    enough: int | None = field(default=None, metadata={"digest": False})
    test: Examples | None = field(default=None, metadata={"digest": False})  # held out at the coordinator
    evaluate_every: int = 1  # rounds between evaluations; the last round is always evaluated
    plan: Plan = field(default=Plan(), metadata={"digest": False})  # of the arithmetic: a manifest has it apart
    validate_at_sites: bool = False  # ask every site to evaluate on the part that it holds back
    # Of the privacy's releases, at the coordinator; the default is one that ends with the process.
    ledger: Ledger = field(default_factory=MemoryLedger, repr=False, compare=False, metadata={"digest": False})
    # Where noise comes from, and samplings that amplify: "seed" for simulations, "system" where a guarantee is meant.
    entropy: Entropy = field(default="seed", metadata={"digest": False})

    def __post_init__(self) -> None:
        for name, least in (("rounds", 0), ("min_sites", 1), ("evaluate_every", 1)):
            if getattr(self, name) < least:
                raise BadInput(f"Federation.{name} must be >= {least}, got {getattr(self, name)}")
        soundness.check(self)

    @property
    def aggregation(self) -> Rule:
        """The rule that is used."""
        return self.algorithm.rule if self.rule is None else self.rule

    @cached_property
    def _plan(self) -> Plan:
        return self.plan.plain

    def init(self) -> FederationState[S]:
        """The state before the first round. Raises BadInput if `stop` waits for what is never measured."""
        soundness.check_stop(self)
        module = self.algorithm.task.build(self.seed)
        if self.start is not None:
            round_zero.check(self.start, self.algorithm.task, module)
        parameters = Parameters.of(module)
        soundness.check_layout(self, parameters.layout)
        privacy = None if self.privacy is None else PrivacyState()
        return FederationState(algorithm=self.algorithm.init(parameters), privacy=privacy)

    def finished(self, state: FederationState[S]) -> str | None:
        if self.start is not None and not state.started:
            return None
        if state.stopped is not None and state.stop == repr(self.stop):
            return state.stopped
        if state.round < self.rounds and self.guard is not None and state.privacy is not None:
            spent = self.guard.over(state.privacy, state.round + 1)
            if spent is not None:
                return spent
        done = "its one round is" if self.rounds == 1 else f"all {self.rounds} rounds are"
        return f"{done} done" if state.round >= self.rounds else None

    def step(self, state: FederationState[S], fleet: Fleet) -> tuple[FederationState[S], Report]:
        began = time.perf_counter()
        parties = fleet.parties()
        if len(parties) < self._least:
            why = (
                f"min_sites={self.min_sites}"
                if self.min_sites == self._least
                else f"{self._least} under {self.collect}"
            )
            raise TooFewSites(f"there are {len(parties)} sites, and {why} must answer")
        zeroth = self.start is not None and not state.started
        round = 0 if zeroth else state.round + 1
        state = self.begun(state, parties)
        cohort = parties if zeroth else self.sampling(parties, round, self._sampling_seed)
        tally = Tally(cohort=cohort, registered=len(parties), told=self.privacy is None)
        fleet = tally.metered(fleet)
        with intra_op_threads(1):  # the cores are the sites', and this is bound by memory
            try:
                after, metrics = (self._start if zeroth else self._train)(state, round, fleet, tally)
                after = replace(after, lost=0)
            except RoundLost as lost:
                if zeroth or state.lost + 1 == _MOST_LOST:
                    raise
                after, metrics = replace(state, lost=state.lost + 1), {}
                tally.absent = dict.fromkeys(cohort, str(lost))
        trained, waited = time.perf_counter(), tally.waited
        answered = {} if zeroth else dict.fromkeys(tally.answered, round)
        after = replace(after, round=round, started=True, bases={**state.bases, **answered})
        # twice the sums of one model, of which one lacks a site, would be that of the site
        tally.validated = self.collect.shows is Sight.EACH or after.algorithm is not state.algorithm
        after, metrics = self._judged(after, metrics, fleet, tally)
        seconds = {"sites": waited, "aggregation": trained - began - waited}
        seconds["evaluation"] = time.perf_counter() - trained
        return after, tally.report(round, metrics, seconds, stop=self.finished(after))

    def begun(self, state: FederationState[S], parties: Sequence[PartyId]) -> FederationState[S]:
        """The state with its guarantee made for these sites, or found to be that of this run."""
        if self.guard is None or state.privacy is None:
            return state
        size = self.algorithm.layout(state.algorithm, parties[0]).size
        privacy = self.guard.begin(state.privacy, parties, size, self.rounds, self.start is not None)
        return replace(state, privacy=privacy)

    @cached_property
    def guard(self) -> Guard | None:
        """What sees to the guarantee; None if there is none."""
        if self.privacy is None:
            return None
        return Guard(
            privacy=self.privacy,
            ledger=self.ledger,
            entropy=self.entropy,
            seed=self.seed,
            job=digest(self),
            sampling=self.sampling,
            training=self.algorithm.training,
            start=self.start is not None,
            rounds=self.rounds,
            honest=self.collect.honest,
            registered=self.collect.registered,
        )

    @property
    def _sampling_seed(self) -> int:
        """One that nobody else knows, where a guarantee is meant and rests on nobody's knowing who was asked."""
        amplifies = self.privacy is not None and scheme(self.sampling) in ("poisson", "fixed")
        return secrets.randbits(62) if amplifies and self.entropy == "system" else self.seed

    def _judged(
        self, state: FederationState[S], metrics: dict[str, float], fleet: Fleet, tally: Tally
    ) -> tuple[FederationState[S], dict[str, float]]:
        """The model measured where it is due, and the state with what `stop` makes of it."""
        round, due = state.round, self._due(state.round)
        if due:
            metrics |= self._measured_everywhere(state, fleet, tally)
        best = state.best if state.stop == repr(self.stop) else Best()
        best, stopped = self.stop.update(best, round, metrics) if self.stop else (best, None)
        after = replace(state, best=best, stopped=stopped, stop=repr(self.stop))
        if not due and self.finished(after):  # the last round is always evaluated
            metrics |= self._measured_everywhere(state, fleet, tally)
        return after, metrics

    def _due(self, round: int) -> bool:
        return round % self.evaluate_every == 0 or round >= self.rounds

    def _measured_everywhere(self, state: FederationState[S], fleet: Fleet, tally: Tally) -> dict[str, float]:
        parameters = self.algorithm.parameters(state.algorithm)
        spent = {} if self.guard is None else {"epsilon": self.guard.spent()}
        return self.evaluate(parameters) | self._validate(state, fleet, tally) | spent

    def _train(
        self, state: FederationState[S], round: int, fleet: Fleet, tally: Tally
    ) -> tuple[FederationState[S], dict[str, float]]:
        """The state after the cohort has trained, and the metrics of that training."""
        cohort, algorithm = tally.cohort, state.algorithm
        if len(cohort) < self.collect.least and not isinstance(self.sampling, Poisson):
            raise TooFewSites(
                f"{self.sampling} asks {len(cohort)} sites in a round, and a sum is of {self.collect.least}; ask more"
            )
        if len(cohort) < self._least and not self._noised_total:
            return state, {}  # Poisson sampling may draw fewer: a round in which nothing is learned
        shared, own = self.broadcast(state, cohort)
        requests = Requests(to=cohort, op="train", round=round, bases=state.bases, shared=shared, bodies=own)
        rule = self._rule(shared)
        updates = self._in_order(self._arriving(fleet, requests, algorithm, rule, tally), cohort)
        meter = Meter(self.algorithm.parameters(algorithm)) if self._metered and self._due(round) else None
        layout = self.algorithm.layout(algorithm, fleet.parties()[0])
        try:
            total = self._total(updates if meter is None else meter.watch(updates), rule, tally, layout)
        except BaseException:
            if self.guard is not None:  # what has arrived is out
                self.guard.sent(tally.arrived, shared, round)
            raise
        metrics = self._named("train", total.sums)
        if self._due(round) and any(map(half, layout.by_name)):
            error, tally.aggregation_errors = (None, {}) if meter is None else meter.errors(total)
            metrics |= {} if error is None else {"aggregation_error": error}
        if self.guard is not None and state.privacy is not None:
            found = self.guard.released(total, state.privacy, tally.arrived, shared, round)
            total, privacy, tally.releases = found
            state = replace(state, privacy=privacy)
        for stage in reversed(self.stages):
            total = stage.on_total(total)
        return replace(state, algorithm=self.algorithm.step(algorithm, total, round)), metrics

    def broadcast(self, state: FederationState[S], to: Sequence[PartyId]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        """What all of these sites get in order to train, and what each gets besides, or in its place."""
        shared, own = self.algorithm.broadcast(state.algorithm, {party: state.bases.get(party, -1) for party in to})
        return {**shared, **self._told(state)}, own

    def _told(self, state: FederationState[S]) -> Tensors:
        """What sites have to know of the guarantee."""
        return {} if self.privacy is None or state.privacy is None else self.privacy.shared(state.privacy)

    def _total(self, updates: Iterator[Update], rule: Rule, tally: Tally, layout: Layout) -> Update:
        """The aggregate; where what is released is noised, it shows neither that nobody answered nor how many did."""
        if self.collect.shows is Sight.SUM:
            return tally.only(updates)
        if not self._noised_total:
            return rule(updates, len(tally.cohort))
        first = next(updates, None)
        if first is None:
            return Update(values=Parameters.zeros(layout), weight=0.0)
        return rule(itertools.chain((first,), updates), tally.registered)

    @property
    def _noised_total(self) -> bool:
        return self.privacy is not None and self.privacy.central

    @property
    def _least(self) -> int:
        """The number of sites that must answer for a round to count."""
        return max(self.min_sites, self.collect.least)

    def _rule(self, shared: Tensors) -> Rule:
        """How the updates become one that answer such a broadcast."""
        return (None if self.guard is None else self.guard.mean(shared)) or self.aggregation

    def _terms(self, op: str, shared: Tensors) -> Terms:
        """On what terms the answers to such requests can be added up, by whoever shows no more than sums."""
        found = None if self.guard is None else self.guard.terms(op, shared)
        if found is not None or op != "train":
            return found or (round_zero.RULE.terms if op == "statistics" else Terms())
        rule = self._rule(shared)
        if not isinstance(rule, Mean):
            return Terms()
        told = () if self.privacy is None else self.privacy.numbers
        return replace(rule.terms, public=frozenset({ROWS} & set(told)))

    def _gathered(
        self, fleet: Fleet, requests: Requests, tally: Tally, together: int = 1
    ) -> Generator[Reply | Replies]:
        terms = self._terms(requests.op, requests.shared)
        try:
            yield from self.collect.gather(fleet, requests, together, terms)
        except TooFewSites as error:
            reasons = tally.reasons(error.absent)
            raise type(error)(f"{error} ({reasons})" if reasons else str(error)) from None

    @cached_property
    def _metered(self) -> bool:
        """Whether the coordinator can see how far the aggregate of low-rank factors is from the mean of products."""
        return self.privacy is None and self.collect.shows is Sight.EACH and bool(pairs(self._working_copy().layout))

    def _in_order(
        self, arriving: Iterator[tuple[Sequence[PartyId], Update]], cohort: Sequence[PartyId]
    ) -> Iterator[Update]:
        """The updates as they come; in the order of the cohort for rules and meters that round."""
        if self.aggregation.needs is Sight.EACH or self._metered:
            places = {party: place for place, party in enumerate(cohort)}
            arriving = iter(sorted(arriving, key=lambda found: places[found[0][0]]))
        for _, update in arriving:
            yield update
            del update  # or it would stay in memory while the next one arrives

    def _start(
        self, state: FederationState[S], round: int, fleet: Fleet, tally: Tally
    ) -> tuple[FederationState[S], dict[str, float]]:
        """The state with the head that round zero gives."""
        assert self.start is not None
        task, parameters = self.algorithm.task, self.algorithm.parameters(state.algorithm)
        told = self._told(state)
        shared = {"parameters": parameters.vector, **told}
        module = self._working_copy().module
        private = None if self.guard is None else self.guard.moments(told)
        if private is not None:
            round_zero.check_private(private, task, module)
        requests = Requests(to=tally.cohort, op="statistics", round=round, shared=shared)
        replies = self._gathered(fleet, requests, tally)
        noise = None if self.guard is None else self.guard.noise("start", self.guard.times(round))
        summed = self.collect.shows is Sight.SUM
        total = round_zero.total(replies, task, module, tally, self.min_sites, private, noise, summed)
        if self.guard is not None:
            tally.releases = self.guard.started(tally.answered, told)
        headed = round_zero.with_head(self.start, task, module, parameters, total, private)
        return replace(state, algorithm=self.algorithm.init(headed)), {}

    def handle(self, request: Request, site: Site) -> Reply:
        return self._at_site.handle(request, site)

    def handle_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        """Train `sites` at once. One summed update goes on where nothing on its way has to see the single ones."""
        return self._at_site.handle_many(requests, sites)

    @cached_property
    def _at_site(self) -> AtSite:
        return AtSite(
            algorithm=self.algorithm,
            start=self.start is not None,
            validates=self.validate_at_sites,
            guard=self.guard,
            stages=self.stages,
            encoding=self.encoding,
            collect=self.collect,
            seed=self.seed,
            plan=self._plan,
            rule=lambda: None if self._metered else self.aggregation,
            terms=self._terms,
        )

    def evaluate(self, parameters: Parameters) -> dict[str, float]:
        """Metrics of a model on the coordinator's `test` examples; empty if there are none."""
        if self.test is None:
            return {}
        model, rows = self.algorithm.task.flat_on(self.test, self.seed, self._plan)
        model.load(parameters)
        return self._named("test", evaluate(model, rows, self.algorithm.task.objective, self._plan))

    def frozen(self) -> str | None:
        """Digest of the weights that every party has to have already, since they do not travel; None without any."""
        # On the CPU, whatever the device: CUDA must not be in use when workers are forked. They inherit this copy.
        return frozen_digest(self.algorithm.task.flat(self.seed, replace(self._plan, device="cpu")).module)

    def model(self, state: FederationState[S]) -> nn.Module:
        """A new module with the global weights of `state`, on the CPU."""
        module = self.algorithm.task.build(self.seed)
        self.algorithm.parameters(state.algorithm).load(module)
        return module

    def model_at(self, state: FederationState[S], site: Site) -> nn.Module:
        """As `model`; where a part of it stays at each site, with the part that `site` keeps."""
        (request,) = handover.requests(self.algorithm, state, [site.id])
        return self._at_site.model(request, site)

    def hand_over(self, state: FederationState[S], fleet: Fleet) -> dict[PartyId, str]:
        """Have each site keep its model (Site.keep) at the end; those that have not, with the reason."""
        return handover.hand_over(self.algorithm, state, fleet)

    def _working_copy(self) -> FlatModel:
        return self.algorithm.task.flat(self.seed, self._plan)

    def _named(self, part: str, sums: Mapping[str, float]) -> dict[str, float]:
        return {f"{part}_{name}": value for name, value in self.algorithm.task.objective.summarise(sums).items()}

    def _arriving(
        self, fleet: Fleet, requests: Requests, state: S, rule: Rule, tally: Tally
    ) -> Iterator[tuple[Sequence[PartyId], Update]]:
        """The updates of a cohort as they come, accepted by the rule."""
        replies = self._gathered(fleet, requests, tally, self._plan.cohort or 1)
        return arriving(self, replies, partial(self.algorithm.layout, state), rule, tally, requests.round)

    def _validate(self, state: FederationState[S], fleet: Fleet, tally: Tally) -> dict[str, float]:
        """Metrics over all sites' held-back examples, and per site where the collect shows them."""
        if not (self.validate_at_sites and tally.validated):
            return {}
        parties = fleet.parties()
        shared, own = self.algorithm.broadcast(state.algorithm, {to: state.bases.get(to, -1) for to in parties})
        requests = Requests(to=parties, op="evaluate", round=state.round, bases=state.bases, shared=shared, bodies=own)
        replies = self._gathered(fleet, requests, tally)
        sums = evaluation.added(replies, self.algorithm.task.objective, tally, self.collect.shows)
        return self._named("validation", sums)
