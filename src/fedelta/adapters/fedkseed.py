"""FedKSeed (Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under
18 Kilobytes", ICML 2024, section 4).

All trained weights move, and only along K Gaussian directions z_k, which every party draws from seeds: the model is
w_0 + sum_k a_k z_k, and K numbers are all that travels, whatever its size. A local step takes one direction at random
and moves along it by the difference of the losses at w + epsilon z and w - epsilon z (Malladi et al., NeurIPS 2023):
no gradient is computed. The coordinator averages the movements of the sites. That is linear, so it works on sums.

What differs: the paper accumulates the differences, and all parties multiply them by one learning rate; here the rate
is in the a_k, so that it may follow a schedule. Losses are measured in evaluation mode, as in the authors' code. Seeds
are taken with equal probability: FedKSeed-Pro, which prefers some, is not here.

w_0 is the model as it is built for the run's seed. A head that may have come from round zero travels to each site
once.

A process that follows the rounds draws again the directions whose numbers changed since the last; one that is new draws
all that were ever taken. So that both have the same bits, directions and their numbers lie on grids, and products are
added as 64-bit integers: in whatever order, from wherever.

Limits: that is 8 bytes a weight besides the model, and a pass over all weights for each direction: time is what bytes
were saved for. Directions are the same on all CPU types only to rounding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, moved
from fedelta.algorithms.round_zero import classes
from fedelta.core.errors import BadInput, TrainingFailed
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.core.seeds import generator
from fedelta.learning.batches import batches
from fedelta.learning.features import head_layer
from fedelta.learning.flat import FlatModel
from fedelta.learning.objectives import Objective
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Training, diverged, predict, prepared

_CHUNK = 2**16  # numbers drawn at a time: 256 kB, which stay in the cache until they are added; part of what is drawn
_SCALAR_BITS, _DIRECTION_BITS = 36, 16  # behind the point: of the numbers, and of what is in a direction (below 6)
_FARTHEST = 2.0**8  # sum of all |numbers|: times 6, 2**36 and 2**16 it is within 64 bits
_HEAD = "head/"  # before the names of tensors in a broadcast


@dataclass(frozen=True, kw_only=True)
class FedKSeedState:
    start: Parameters  # w_0
    scalars: Parameters  # a: one entry, "scalars" [candidates]


@dataclass(frozen=True, kw_only=True)
class FedKSeed:
    """`task` has any model; `training` has plain SGD, whose rate multiplies the slope along a direction."""

    kind: ClassVar[Kind] = "difference"
    rule: ClassVar[Rule] = Mean(bound=1.0)  # directions have numbers of size 1, so that a model is lost long before
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = False
    steady: ClassVar[bool] = False

    task: Task
    training: Training
    candidates: int = 4096  # K
    epsilon: float = 1e-3  # between the model and each of the points at which its loss is measured, in directions
    seed: int = 0  # of the directions

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise BadInput(f"FedKSeed.candidates must be >= 1, got {self.candidates}")
        if not 0 < self.epsilon < math.inf:
            raise BadInput(f"FedKSeed.epsilon must be > 0 and finite, got {self.epsilon}")
        optimizer = self.training.optimizer
        if not isinstance(optimizer, SGD) or optimizer.momentum or optimizer.weight_decay:
            raise BadInput(
                f"a step of FedKSeed is along one direction, which {optimizer} does not stay on; use SGD(lr=...) with "
                "neither momentum nor weight decay"
            )

    def init(self, parameters: Parameters) -> FedKSeedState:
        return FedKSeedState(start=parameters, scalars=Parameters.zeros(self._layout))

    def parameters(self, state: FedKSeedState) -> Parameters:
        return rebuilt(self.task, state.start, state.scalars.vector, self.seed)

    def broadcast(self, state: FedKSeedState, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        head = {f"{_HEAD}{name}": state.start[name] for name in self._head if name in state.start}
        return {"scalars": state.scalars.vector}, {party: head for party, base in to.items() if base < 0 and head}

    def layout(self, state: FedKSeedState, party: PartyId) -> Layout:
        return self._layout

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        self.task.check(examples)
        model, rows = self.task.flat_on(examples, incoming.seed, incoming.plan)
        model.load(Parameters(model.layout, self._weights(incoming, site).vector))
        return model, rows

    def local(self, incoming: Incoming, site: Site) -> Update:
        data = site.data().train
        if not len(data):
            raise BadInput("this site has no training examples")
        if incoming.plan.bf16:
            raise BadInput("in bf16 the difference of two losses is mostly rounding; use a Plan without bf16")
        self.task.check(data)
        model, rows = self.task.flat_on(data, incoming.seed, incoming.plan)
        start = Parameters(model.layout, self._weights(incoming, site).vector)
        walk = _Walk(model=model, objective=self.task.objective, plan=incoming.plan, epsilon=self.epsilon)
        scalars, sums = self._walked(walk, start, rows, incoming)
        site.memory.commit(incoming.base, incoming.round, _head_of(incoming, site))
        return Update(values=Parameters(self._layout, scalars), weight=float(len(data)), sums=sums)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("FedKSeed trains its sites one by one")

    def step(self, state: FedKSeedState, total: Update, round: int) -> FedKSeedState:
        return replace(state, scalars=moved(state.scalars, total))

    @cached_property
    def _layout(self) -> Layout:
        return Layout.of({"scalars": torch.empty(self.candidates)})

    @cached_property
    def _head(self) -> tuple[str, ...]:
        """The names of what round zero may have changed in w_0."""
        try:
            name = head_layer(self.task.build(0), classes(self.task))
        except BadInput:  # there is nothing that it could solve
            return ()
        return f"{name}.weight", f"{name}.bias"

    def _weights(self, incoming: Incoming, site: Site) -> Parameters:
        """The model that was broadcast. Not to be written into."""
        start, head = self.task.initial(incoming.seed), _head_of(incoming, site)
        if any(not torch.equal(values, start[name]) for name, values in head.items()):
            start = start.like(start.vector.clone())
            for name, values in head.items():
                start[name].copy_(values)
        return rebuilt(self.task, start, incoming.tensors["scalars"], self.seed)

    def _walked(
        self, walk: "_Walk", start: Parameters, rows: Examples, incoming: Incoming
    ) -> tuple[Tensor, dict[str, float]]:
        """How far local training goes along each direction, [candidates]; and the sums of the objective."""
        training, scalars = self.training, torch.zeros(self.candidates)
        at, z = start.like(start.vector.clone()), torch.empty(start.layout.trained)
        lr = training.optimizer.lr * training.schedule.factor(incoming.round)
        choices = generator(incoming.local_seed, "candidates")
        totals: dict[str, float] = {}
        steps = 0
        for batch in batches(len(rows), training.batch, training.epochs, training.steps, incoming.local_seed):
            chosen = int(torch.randint(self.candidates, (), generator=choices))
            fill(z, self.seed, chosen)
            slope, sums = walk.slope(at, z, rows[batch])
            steps += 1
            if not math.isfinite(slope) and incoming.hidden:
                return scalars.fill_(math.nan), totals | {"steps": float(steps)}
            if not math.isfinite(slope):
                raise TrainingFailed(diverged(sums["loss"], steps, lr))
            if training.clip is not None:
                slope *= min(1.0, training.clip / (abs(slope) * float(torch.linalg.vector_norm(z)) + 1e-6))
            at.trained.add_(z, alpha=-lr * slope)
            scalars[chosen] -= lr * slope
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
        return scalars, totals | {"steps": float(steps)}


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """The loss of a model on a batch, and its slope along a direction."""

    model: FlatModel
    objective: Objective
    plan: Plan
    epsilon: float

    def slope(self, at: Parameters, z: Tensor, batch: Examples) -> tuple[float, dict[str, float]]:
        """Of the mean loss along `z` [trained], and the sums of the objective, as means of those at both points."""
        prepared_batch = prepared(batch, self.plan)
        point = at.like(at.vector.clone())
        found = []
        for side in (self.epsilon, -self.epsilon):
            torch.add(at.trained, z, alpha=side, out=point.trained)
            found.append(self._sums(point, prepared_batch))
        up, down = (sums["loss"] / max(sums["examples"], 1.0) for sums in found)
        return (up - down) / (2 * self.epsilon), {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}

    @torch.no_grad()
    def _sums(self, point: Parameters, batch: Examples) -> dict[str, float]:
        self.model.load(point)
        self.model.module.eval()  # two masks of dropout would differ by more than two points
        measured = self.objective.measure(predict(self.model.module, batch.inputs), batch.targets)
        return {name: float(values.sum(dtype=torch.float64)) for name, values in measured.items()}


def fill(z: Tensor, seed: int, index: int) -> None:
    """Write direction `index` under `seed` into `z`, float32 [n]: independent Gaussian numbers of variance 1.

    They are multiples of 2**-16.
    """
    stream = generator(seed, "direction", index)
    for part in torch.split(z, _CHUNK):
        _draw(part, stream).mul_(2.0**-_DIRECTION_BITS)


def rebuilt(task: Task, start: Parameters, scalars: Tensor, seed: int) -> Parameters:
    """start + sum_k scalars[k] z_k: the same bits whatever was known before. Not to be written into.

    The last one is kept in this process for each task. Raises BadInput if it is out of all bounds.
    """
    if not float(scalars.abs().sum(dtype=torch.float64)) <= _FARTHEST:
        raise BadInput("the weights have gone too far along the directions of FedKSeed; lower the learning rate")
    numbers = (scalars.double() * 2.0**_SCALAR_BITS).round().long()
    known = _last.get(task)
    if known is not None and known.fits(start, numbers, seed):
        return known.weights
    _last.pop(task, None)  # what it has is moved in place, and would be lost half-way
    size = start.layout.trained
    at, distance = torch.zeros_like(numbers), torch.zeros(size, dtype=torch.int64)
    if known is not None and known.nearer(numbers, seed, size):
        at, distance = known.numbers, known.distance
    _move(distance, numbers - at, seed)
    weights = start.like(start.vector.clone())
    for own, far in zip(torch.split(weights.trained, _CHUNK), torch.split(distance, _CHUNK), strict=True):
        own.copy_(far.double().mul_(2.0 ** -(_SCALAR_BITS + _DIRECTION_BITS)).add_(own))
    _last[task] = _Rebuilt(start, numbers, seed, distance, weights)
    return weights


@dataclass(frozen=True)
class _Rebuilt:
    start: Parameters
    numbers: Tensor  # int64 [candidates], on the grid of 2**-36
    seed: int
    distance: Tensor  # int64 [trained], from the start, on the grid of 2**-52
    weights: Parameters

    def fits(self, start: Parameters, numbers: Tensor, seed: int) -> bool:
        same = self.seed == seed and torch.equal(self.numbers, numbers)
        return same and (self.start is start or torch.equal(self.start.vector, start.vector))

    def nearer(self, numbers: Tensor, seed: int, size: int) -> bool:
        """Whether fewer directions are drawn from here than from the start."""
        if self.seed != seed or len(self.numbers) != len(numbers) or len(self.distance) != size:
            return False
        return bool((self.numbers != numbers).sum() < numbers.count_nonzero())


def _move(distance: Tensor, by: Tensor, seed: int) -> None:
    """Add sum_k by[k] z_k to `distance`, all on their grids, in place."""
    buffer = torch.empty(min(_CHUNK, len(distance)))
    for index in by.nonzero().flatten().tolist():
        stream, length = generator(seed, "direction", index), int(by[index])
        for part in torch.split(distance, _CHUNK):
            part.add_(_draw(buffer[: len(part)], stream).long(), alpha=length)


def _draw(part: Tensor, stream: torch.Generator) -> Tensor:
    """The next numbers of a direction as multiples of their grid, written into `part`, float32."""
    return part.normal_(generator=stream).mul_(2.0**_DIRECTION_BITS).round_()


def _head_of(incoming: Incoming, site: Site) -> dict[str, Tensor]:
    """The head of w_0 as the coordinator has it: what came, or what came once."""
    came = {name.removeprefix(_HEAD): values for name, values in incoming.tensors.items() if name.startswith(_HEAD)}
    return came or dict(site.memory.at(incoming.base))


_last: WeakKeyDictionary[Task, _Rebuilt] = WeakKeyDictionary()
