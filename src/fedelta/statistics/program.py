"""Statistics of the sites' rows together, of which the coordinator sees nothing but sums over the sites.

Without privacy. Round 1: rows, missing values, categories, how many digits numbers have, and counts at the ends of
the ranges. Then ranges are looked for where none is given, then histograms and sums, then quantiles by bisection:
search.py has what is asked. All columns are asked about at once. All counts are exact. Means are those of the values
up to 1e-15 of the largest magnitude and 2^-80 of the range (the grid of sums): where values cancel, this is more of the
mean. Variances are, up to 1e-14 of themselves, the square of 2^-51 of the largest magnitude, and 2^-80 of the range's
square. Quantiles are as search.py says.

Which sites: all that answer in round 1, and in every later round these and no others. Sums over two different sets of
sites would tell of the sites in which they differ, and counts of different rows are no bisection. Under masks a round
in which one of them is missing shows nothing (under other collects what it shows is not used), and is asked for again;
after three in a row the run ends with what is known: counts and histograms as far as they are there, and of each
quantile between which two numbers it lies.

With privacy (a budget for each row) there is one round: private.py. Ranges must be given.

Limits: what is exact is not private. A count of one, or a quantile of few rows, is about one person, whoever may see
it; and who asks twice, before and after a site or a row came, learns the difference. A site can lie. Sums that no
rows have end the run, with what was known before; others are believed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fedelta.algorithms.parts import Collect
from fedelta.algorithms.tally import Tally, bodies
from fedelta.core.digest import digest
from fedelta.core.errors import (
    BadInput,
    BadTensors,
    BudgetSpent,
    RoundLost,
    TooFewSites,
    UnsoundCombination,
)
from fedelta.core.grid import Terms
from fedelta.core.messages import PartyId, Reply, Request, Requests, Tensors
from fedelta.core.noise import Noise, SeededNoise, SystemNoise
from fedelta.core.program import Fleet, Report, Sight, Site, run
from fedelta.core.release import Budget, Ledger, Limit
from fedelta.core.withheld import withheld
from fedelta.privacy.ledger import MemoryLedger
from fedelta.secure.aggregation import SecureAggregation
from fedelta.statistics import private
from fedelta.statistics.columns import Category, Column, Number
from fedelta.statistics.counting import (
    TERMS,
    Counts,
    Sum,
    answer,
    asked,
    body,
    check_rows,
    read_counts,
    read_questions,
    size,
)
from fedelta.statistics.search import Plan, Search, searching
from fedelta.statistics.summary import CategorySummary, NumberSummary, Summary

OP = "statistics"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST_LOST = 3  # rounds in a row
_LEAST_LEFT = 0.01  # of a budget's rho: with less, noise is ten times as large as it would be
_PRIVATE = "private counts"  # in Site.given: they have left


@dataclass(frozen=True, kw_only=True)
class StatisticsState:
    """All that a resume needs."""

    round: int = 0
    sites: tuple[PartyId, ...] = ()  # whose rows are counted
    absent: Mapping[PartyId, str] = field(default_factory=dict)
    counts: Counts | None = None
    searches: tuple[Search, ...] = ()  # one for each column of numbers, in their order
    read: private.Read | None = None  # what a private sum says
    rho: float | None = None
    lost: int = 0  # rounds in a row of which nothing came
    ended: str | None = None


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A program; `rows_of` makes what a site has for it, and `summary` reads what comes out.

    `quantiles` are above 0 and below 1, `bins` about how many a histogram has, `precision` is a share of a column's
    range. `privacy` is a budget for each row; `ledger` is where the coordinator takes down what is released. With a
    `seed` noise can be repeated, and taken away by whoever knows it; None: it is from the operating system.
    """

    columns: Sequence[Column]
    quantiles: Sequence[float] = QUANTILES
    bins: int = 20
    precision: float = 1e-6
    collect: Collect = field(default_factory=SecureAggregation)
    privacy: Budget | None = None
    ledger: Ledger = field(default_factory=MemoryLedger, repr=False, compare=False, metadata={"digest": False})
    seed: int | None = field(default=None, metadata={"digest": False})

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if not names or len(set(names)) < len(names):
            raise BadInput(f"statistics are of one column or more, each named once, got {names}")
        if not all(0 < q < 1 for q in self.quantiles) or len(set(self.quantiles)) < len(self.quantiles):
            raise BadInput(
                f"Statistics.quantiles must be distinct, above 0 and below 1, got {list(self.quantiles)}: the smallest "
                "and the largest value are single rows"
            )
        if not 2 <= self.bins <= 1000:
            raise BadInput(f"Statistics.bins must be from 2 to 1000, got {self.bins}")
        if not 1e-9 <= self.precision < 1:
            raise BadInput(f"Statistics.precision must be from 1e-9 to less than 1, got {self.precision}")
        if self.privacy is not None:
            unknown = [column.name for column in self.numbers if column.low is None]
            if unknown:
                raise BadInput(
                    f"{unknown[0]!r} has no range: under privacy none is looked for, as that takes counts without "
                    "noise; give one that follows from what the column is, not from its values"
                )
            if self.collect.shows is Sight.SUM and not self.collect.whole:
                raise UnsoundCombination(
                    f"{self.collect} does not tell sites how many of them add noise; use SecureAggregation() or Clear()"
                )

    @property
    def numbers(self) -> tuple[Number, ...]:
        return tuple(column for column in self.columns if isinstance(column, Number))

    def init(self) -> StatisticsState:
        return StatisticsState()

    def finished(self, state: StatisticsState) -> str | None:
        if state.ended is not None:
            return state.ended
        if state.read is not None:
            return "its one round is done"
        known = state.counts is not None and all(search.stage == "done" for search in state.searches)
        return "all is known" if known else None

    def step(self, state: StatisticsState, fleet: Fleet) -> tuple[StatisticsState, Report]:
        """One question to all sites.

        Raises TooFewSites if too few answer the first one, BadTensors if their sum is of no rows.
        """
        sites = state.sites or tuple(fleet.parties())
        tally = Tally(cohort=sites, registered=len(sites))
        metered = tally.metered(fleet)
        after = (self._exact if self.privacy is None else self._private)(state, metered, tally)
        after = replace(after, round=state.round + 1)
        metrics = {"open": float(sum(search.open for search in after.searches))}
        seconds = {"sites": tally.waited}
        return after, tally.report(after.round, metrics, seconds, stop=self.finished(after))

    def handle(self, request: Request, site: Site) -> Reply:
        if request.op != OP:
            return self.collect.answer(request, site)
        return self.collect.handle(request, site, lambda: self._outgoing(request, site), self._terms(request.shared))

    def summary(self, state: StatisticsState) -> Summary:
        """What is known after a state. Raises BadInput before round 1."""
        if state.counts is None and state.read is None:
            raise BadInput("nothing is known before the first round; run the program")
        done = self.finished(state) is not None and state.ended is None
        known = Summary(
            sites=state.sites,
            absent=state.absent,
            rows=0,
            columns=(),
            rounds=state.round,
            ended=None if done else state.ended or "it goes on",
        )
        if state.read is not None:
            found = state.read
            return replace(
                known,
                rows=found.rows,
                columns=found.columns,
                privacy=self.privacy,
                rho=state.rho,
                noise=found.deviation,
            )
        assert state.counts is not None
        searches = iter(state.searches)
        columns = [
            _number(next(searches), missing)
            if isinstance(column, Number)
            else _category(column, missing, state.counts.categories[column.name])
            for column, missing in zip(self.columns, state.counts.missing, strict=True)
        ]
        return replace(known, rows=state.counts.rows, columns=columns)

    # Exact

    def _exact(self, state: StatisticsState, fleet: Fleet, tally: Tally) -> StatisticsState:
        first = state.counts is None
        plan = Plan(bins=self.bins, quantiles=tuple(self.quantiles), precision=self.precision)
        searches = state.searches or tuple(Search(column=column, plan=plan) for column in self.numbers)
        questions = [search.question for search in searches]
        shared = asked(questions, first)
        try:
            total = self._sum(shared, size(self.columns, shared), state.round + 1, fleet, tally, whole=not first)
        except TooFewSites as error:
            lost = state.lost + 1
            if first and (lost == _MOST_LOST or not isinstance(error, RoundLost)):
                raise
            why = f"a site that was there at first does not answer any more ({error})" if lost == _MOST_LOST else None
            return replace(state, lost=lost, ended=why)
        if first:
            counts, total = read_counts(self.columns, total)
            searches = self._begun(counts, plan)
            state = replace(state, counts=counts, sites=tuple(tally.answered), absent=dict(tally.absent))
        answers = read_questions(questions, total)
        try:
            found = tuple(search.after(*own) for search, own in zip(searches, answers, strict=True))
        except BadTensors as error:
            return replace(state, searches=searches, ended=str(error))
        return replace(state, searches=found, lost=0)

    def _begun(self, counts: Counts, plan: Plan) -> tuple[Search, ...]:
        missing = dict(zip((column.name for column in self.columns), counts.missing, strict=True))
        return tuple(
            searching(column, plan, counts.rows - missing[column.name], counts.finer[column.name])
            for column in self.numbers
        )

    def _sum(self, shared: Tensors, length: int, round: int, fleet: Fleet, tally: Tally, *, whole: bool) -> Tensor:
        """The sum of the answers of those that were asked: of all of them if it is to be `whole`."""
        requests = Requests(to=tally.cohort, op=OP, round=round, shared=shared)
        collect = _of_all(self.collect, len(requests)) if whole else self.collect
        terms = self._terms(shared)
        total = Sum(length, terms, len(requests))
        try:
            for reply in collect.gather(fleet, requests, 1, terms):
                for senders, found in bodies(reply, tally.absent):
                    try:
                        total.add(found, len(senders))
                        tally.accept(senders, len(senders))
                    except BadTensors as error:
                        tally.absent |= dict.fromkeys(senders, f"its answer is malformed: {error}")
        except TooFewSites as error:
            tally.absent |= error.absent
            raise type(error)(f"{error} ({tally.reasons(tally.absent)})" if tally.absent else str(error)) from None
        needed = len(requests) if whole else collect.least
        if total.sites < needed:
            raise TooFewSites(tally.shortage(round, needed))
        tally.answered.sort(key=list(requests.to).index)
        return total.total()

    # Private

    def _private(self, state: StatisticsState, fleet: Fleet, tally: Tally) -> StatisticsState:
        """The one round. What it may spend is taken down before anything is asked."""
        budget, sites = self._budget, len(tally.cohort)
        if sites < self.collect.least:
            raise TooFewSites(f"{sites} sites were asked, and a sum is of {self.collect.least}; ask more")
        left = private.most(budget, self.ledger.releases())
        if left < _LEAST_LEFT * self._most:
            raise BudgetSpent(
                f"the ledger has spent all but a trace of epsilon {budget.epsilon:g}, which is a limit on all that is "
                "in it: nothing but noise could be told; raise epsilon"
            )
        share = private.share(self._vectors, self.collect.honest(sites), left)
        found = private.release(share, state.round + 1, digest(self))
        self.ledger.record(found, within=Limit(budget=budget, unit="example"))
        tally.releases = [found]
        shared = {
            "rho": torch.tensor(share.rho, dtype=torch.float64),
            "sites": torch.tensor(sites),
        }
        total = self._sum(shared, self._vectors.size, state.round + 1, fleet, tally, whole=False)
        variance = len(tally.answered) * float(share.variance)
        read = self._vectors.read(total, variance, self.quantiles)
        return replace(state, read=read, rho=share.rho, sites=tuple(tally.answered), absent=dict(tally.absent))

    @property
    def _budget(self) -> Budget:
        """No other accountant knows the noise."""
        assert self.privacy is not None
        return replace(self.privacy, accountant="rdp")

    @cached_property
    def _vectors(self) -> private.Vectors:
        return private.Vectors(columns=tuple(self.columns), bins=self.bins)

    @cached_property
    def _most(self) -> float:
        """The rho of all of the budget."""
        return private.most(self._budget, ())

    def _terms(self, shared: Tensors) -> Terms:
        return TERMS if self.privacy is None else private.terms(_sites(shared))

    # At a site

    def _outgoing(self, request: Request, site: Site) -> Tensors:
        hidden = self.privacy is not None or self.collect.shows is Sight.SUM
        with withheld(site.id, hidden, "it could not count its rows; why is in its own log, as it may tell of them"):
            rows = site.data().train
            if self.privacy is None:
                return body(answer(self.columns, rows, request.shared), TERMS)
            check_rows(self.columns, rows)
        if request.round != 1 or _PRIVATE in site.given:
            raise BadInput("it has told its noisy counts, and twice would be twice the epsilon")
        rho, sites = request.shared.get("rho"), _sites(request.shared)
        if self.collect.registered not in (None, sites):
            raise BadInput(f"it is told of {sites} sites, and knows the identities of {self.collect.registered}")
        if rho is None or rho.ndim or not 0 < float(rho) <= self._most * (1 + 1e-9):
            raise BadTensors("the request asks for less noise than the budget of each row needs")
        share = private.share(self._vectors, self.collect.honest(sites), float(rho))
        site.given[_PRIVATE] = request.round
        noise: Noise = SystemNoise() if self.seed is None else SeededNoise(self.seed, request.round, site.id, OP)
        vector = private.noisy(self._vectors, rows, share.variance, noise)
        own = site.data().ledger
        if own is not None:
            own.record(private.release(share, request.round, digest(self), of=site.id))
        return body(vector, private.terms(sites))


def summarise(program: Statistics, fleet: Fleet) -> Summary:
    """Run the program to its end. Raises what its first step does."""
    state = program.init()
    for after, _ in run(program, fleet):
        state = after
    return program.summary(state)


def _of_all(collect: Collect, sites: int) -> Collect:
    """The same, which shows nothing unless all `sites` are in the sum; of others what is not whole is not used."""
    return replace(collect, least=sites) if isinstance(collect, SecureAggregation) else collect


def _sites(shared: Tensors) -> int:
    told = shared.get("sites")
    if told is None or told.ndim or told.dtype != torch.int64 or int(told) < 1:
        raise BadTensors("the request does not say how many sites are asked")
    return int(told)


def _number(search: Search, missing: int) -> NumberSummary:
    ranged = search.stage != "first" and (search.bins is not None or search.column.low is not None)
    return NumberSummary(
        name=search.column.name,
        missing=missing,
        below=search.below,
        above=search.above,
        within=search.within,
        low=search.low if ranged else search.column.low,
        high=search.high if ranged else search.column.high,
        mean=search.mean,
        variance=None if search.variance is None or math.isnan(search.variance) else search.variance,
        bins=search.bins,
        quantiles=search.found(),
    )


def _category(column: Category, missing: int, counts: Sequence[int]) -> CategorySummary:
    *known, other = counts
    return CategorySummary(
        name=column.name, missing=missing, counts=dict(zip(column.values, known, strict=True)), other=other
    )
