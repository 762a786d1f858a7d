"""A short timed trial that settles what an execution plan leaves open.

A few steps of training on real data of the sites, in each of the ways that come into question; the fastest is taken.
The numeric format is never chosen here: bf16 changes results by more than rounding.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice

from torch import nn

from fedelta.core.errors import BadInput, TrainingFailed
from fedelta.core.examples import Examples
from fedelta.core.parameters import Parameters
from fedelta.core.threads import intra_op_threads
from fedelta.learning.cohort import Cohort, one_by_one, train_many
from fedelta.learning.joined import joined
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Training, train

_STEPS = 2  # of each site in the trial
_COHORTS = (16, 64, 256, 1024)
_FEW = 4  # sites at once that are not worth a trial
_LONG_STEP_S = 0.02  # beyond this it is arithmetic that takes the time, and there is nothing to gain at once
_MARGIN = 0.8  # of the time one by one: a cohort must be clearly faster, as it takes more memory
_MEMORY = 2**30  # bytes for the weights of a cohort and what training needs besides
_COPIES = 5  # of the weights in training: themselves, gradients, two moments, one intermediate
_REPEATS = 3


@dataclass(frozen=True)
class Trial:
    plan: Plan  # settled
    said: str  # what was chosen and why, in one sentence


def settle(plan: Plan, task: Task, training: Training, sites: Sequence[Examples], seed: int, at_most: int) -> Trial:
    """The plan with all that it leaves open chosen; `at_most` sites are trained at once.

    `sites` are examples of sites that can be trained on, of which the first few are used. One thread is used, as in a
    worker.
    """
    if plan.settled or not sites:
        return Trial(plan.plain, _named(plan.plain))
    start = Parameters.of(task.build(seed))
    with intra_op_threads(1):
        return _Clock(task, _shortened(training, sites), sites, start, seed).settle(plan, at_most)


@dataclass(frozen=True)
class _Clock:
    task: Task
    training: Training
    sites: Sequence[Examples]
    start: Parameters
    seed: int

    def settle(self, plan: Plan, at_most: int) -> Trial:
        at_most = min(at_most, max(1, _MEMORY // (4 * _COPIES * self.start.layout.size)))
        reason = self._against(plan, at_most)
        formats = [False, True] if self._images(plan) else [bool(plan.channels_last)]
        ways = [replace(plan, cohort=1, channels_last=channels_last) for channels_last in formats]
        if len(ways) == 1 and reason is not None:
            return Trial(ways[0], f"{_named(ways[0])}: {reason}")
        taken = {way: self._fastest(partial(self._alone, way), 1) for way in ways}  # seconds a site
        single = min(taken, key=taken.__getitem__)
        if reason is None and taken[single] / _STEPS > _LONG_STEP_S and plan.cohort is None:
            reason = f"a step takes {_time(taken[single] / _STEPS)}, which is arithmetic"
        if reason is not None:
            return Trial(single, f"{_named(single)}: {reason}")
        sizes = sorted({min(size, at_most) for size in _COHORTS}) if plan.cohort is None else [plan.cohort]
        for size in sizes:
            way, sites = replace(single, cohort=size, channels_last=False), min(size, at_most)
            try:
                taken[way] = self._fastest(partial(self._together, way, sites), sites)
            except (BadInput, RuntimeError, NotImplementedError) as error:  # random numbers; code vmap does not know
                if plan.cohort is not None:
                    raise
                return Trial(single, f"{_named(single)}: {error!s:.100}")
        best = min(taken, key=lambda way: taken[way] if way.cohort == 1 else taken[way] / _MARGIN)
        if plan.cohort is not None:
            best = next(way for way in taken if way.cohort == plan.cohort)
        others = ", ".join(f"{_named(way)} {_time(seconds)}" for way, seconds in taken.items() if way != best)
        return Trial(best, f"{_named(best)}, {_time(taken[best])} for {_STEPS} steps of a site ({others})")

    def _images(self, plan: Plan) -> bool:
        """Whether the memory format matters and is open."""
        filters = any(isinstance(part, nn.Conv2d) for part in self._trained(plan).modules())
        return plan.channels_last is None and filters

    def _against(self, plan: Plan, at_most: int) -> str | None:
        """What speaks against training sites at once, before it is tried; None if the user wants it."""
        if plan.cohort == 1:
            return "as asked"
        if plan.cohort is not None:
            return None
        if at_most < _FEW:
            return "too few sites work at the same time"
        return one_by_one(self._trained(plan))

    def _trained(self, plan: Plan) -> nn.Module:
        return self.task.flat_on(self.sites[0], self.seed, plan)[0].module

    def _alone(self, plan: Plan) -> None:
        model, rows = self.task.flat_on(self.sites[0], self.seed, plan)
        model.load(self.start)
        train(model, rows, self.task.objective, self.training, plan, round=1, seed=self.seed)
        model.read()

    def _together(self, plan: Plan, size: int) -> None:
        alike = [site for site in self.sites if site.form == self.sites[0].form]
        sites = list(islice(cycle(alike), size))
        model, rows = self.task.cohort_on(sites, self.seed, plan)
        cohort = Cohort(rows=joined(rows), sizes=[len(site) for site in sites], seeds=range(size))
        train_many(model, self.start, cohort, self.task.objective, self.training, plan, round=1)

    def _fastest(self, work: Callable[[], None], sites: int) -> float:
        """Seconds a site, the best of a few; the first one builds models and fills caches, and does not count."""
        times: list[float] = []
        while len(times) <= _REPEATS and sum(times[1:]) < _REPEATS * _LONG_STEP_S:
            began = time.perf_counter()
            with suppress(TrainingFailed):  # as much work as one that succeeds
                work()
            times.append(time.perf_counter() - began)
        return min(times[1:]) / sites


def _shortened(training: Training, sites: Sequence[Examples]) -> Training:
    steps = training.steps or (training.epochs or 1) * -(-len(sites[0]) // training.batch)
    return replace(training, epochs=None, steps=min(_STEPS, steps))


def _named(plan: Plan) -> str:
    at_once = "one by one" if plan.plain.cohort == 1 else f"{plan.cohort} sites at once"
    return at_once + (", channels last" if plan.channels_last else "") + (", bf16" if plan.bf16 else "")


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
