"""Fed-SB (Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning", 2025), on LoRA-SB (Ponkshe et al., "Initialization using Update Approximation is a Silver
Bullet for Extremely Efficient Low-Rank Fine-Tuning", 2024).

A layer is W + s B R A. B [out, r] and A [r, in] are common to all and fixed; sites train and send R [r, r] (and the
head). The mean of R is that of the products, so that averaging is exact, and of all methods on factors this one sends
the fewest bytes. B and A travel to each site once.

LoRA-SB takes B, A and R from the first step that full fine-tuning would make: the truncated SVD of that step is
B S A, and s R = S at the start. Here that is the step of `training`'s optimizer (AdamW: the learning rate times the
sign of the gradient, as in the papers) on the mean gradient of the adapted weights. It moves the model, as a step of
full fine-tuning would, for which the rate that R needs is far too high where weights are pre-trained: hence `first_lr`.
The gradient comes from

- round 1, in which every site of the cohort sends that of its examples, as large as the adapted weights, and nothing is
  trained. It is a release of its own: a ledger of privacy has to count it, and noise that is meant for R is not meant
  for it. Or from
- `public` examples, at the coordinator: nothing about the sites is released. The model's frozen weights must then not
  depend on the run's seed.

What differs: LoRA-SB has s = 1, which is LoRA(alpha=rank); here s is what the model has. Gradients are of all examples,
in evaluation mode. What is evaluated and saved has B R in the place of LoRA's B, and R nowhere.
Limits: a dense SVD, in float64, of the step of each layer; no embeddings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedelta.adapters.factors import place
from fedelta.aggregation.factors import half, pairs
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, moved, trained
from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters, trainable
from fedelta.core.program import Site
from fedelta.learning.adapted import Adapted, Square, Squared, adapted
from fedelta.learning.flat import FlatModel
from fedelta.learning.objectives import Objective
from fedelta.learning.plan import Plan
from fedelta.learning.quantised import bits_of
from fedelta.learning.task import Task
from fedelta.learning.training import PLAIN, Training, autocast, by_length, predict, prepared

_NOTHING = Layout.of({})


@dataclass(frozen=True, kw_only=True)
class FedSBState:
    parameters: Parameters  # with LoRA's own factors: what is evaluated and saved
    learned: Parameters  # what sites train: R of each layer, the head; without R until there are B and A
    fixed: Parameters  # B and A of each layer; empty until they are there
    since: int = -1  # the round that gave B and A; -1 before, and where they are from public examples


@dataclass(frozen=True, kw_only=True)
class FedSB:
    """`task` has a model that is tuned by LoRA and whose factors add nothing yet."""

    kind: ClassVar[Kind] = "difference"
    rule: ClassVar[Rule] = Mean()
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    steady: ClassVar[bool] = False

    task: Task
    training: Training
    first_lr: float | None = None  # of the step that gives B, A and the first R; None: that of the training
    public: Examples | None = field(default=None, metadata={"digest": False})  # at the coordinator

    def __post_init__(self) -> None:
        if self.first_lr is not None and not 0 < self.first_lr < math.inf:
            raise BadInput(f"FedSB.first_lr must be > 0 and finite, got {self.first_lr}")
        _ = self._forms  # checked here, and not in the first round
        if self.public is not None:
            self.task.check(self.public)
            if not len(self.public):
                raise BadInput("there are no public examples; give some, or leave `public` out")

    def init(self, parameters: Parameters) -> FedSBState:
        rest = parameters.part(parameters.layout.only(lambda name: half(name) is None))
        state = FedSBState(parameters=parameters, learned=rest, fixed=Parameters.zeros(_NOTHING))
        if self.public is None:
            return state
        return self._started(state, self._public_gradient(self.public, rest), -1)

    def parameters(self, state: FedSBState) -> Parameters:
        return state.parameters

    def broadcast(self, state: FedSBState, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        new = [party for party, base in to.items() if base <= state.since] if len(state.fixed) else []
        return {"learned": state.learned.vector}, {party: {"fixed": state.fixed.vector} for party in new}

    def layout(self, state: FedSBState, party: PartyId) -> Layout:
        return state.learned.layout if len(state.fixed) else self._forms.weights

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        fixed = _fixed_of(incoming, site)
        task = self.task if fixed is None else self._local
        task.check(examples)
        model, rows = task.flat_on(examples, incoming.seed, incoming.plan)
        if fixed is None:
            model.load(_without_factors(model.layout, incoming.tensors["learned"]))
        else:
            model.load(Parameters(model.layout, incoming.tensors["learned"]))
            place(model.module, Parameters(self._forms.fixed, fixed))
        return model, rows

    def local(self, incoming: Incoming, site: Site) -> Update:
        data = site.data().train
        fixed = _fixed_of(incoming, site)
        if fixed is None and self.public is not None:  # nobody may ask for what `by_gradient` says does not leave
            raise BadTensors("the request lacks the factors, which are those of public examples in every round")
        if fixed is None:
            values, sums = self._gradient(incoming, data)
        else:
            model, rows = self.received(incoming, site, data)
            sums = trained(model, rows, self.task, self.training, incoming)
            values = model.read()
            torch.sub(values.vector, incoming.tensors["learned"], out=values.vector)
        site.memory.commit(incoming.base, incoming.round, {} if fixed is None else {"fixed": fixed})
        return Update(values=values, weight=float(len(data)), sums=sums)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("FedSB trains its sites one by one")

    def step(self, state: FedSBState, total: Update, round: int) -> FedSBState:
        if not len(state.fixed):
            return self._started(state, total.values, round)
        return self._with_learned(replace(state, learned=moved(state.learned, total)))

    @property
    def by_gradient(self) -> bool:
        """Not in the first round, unless its factors come from public examples."""
        return self.public is not None

    @cached_property
    def _local(self) -> Task:
        return replace(self.task, model=Squared(model=self.task.model))

    @cached_property
    def _forms(self) -> "_Forms":
        return _Forms.of(self._local.build(0))

    def _gradient(self, incoming: Incoming, data: Examples) -> tuple[Parameters, dict[str, float]]:
        """That of the mean loss of a site, and the sums of the objective."""
        self.task.check(data)
        if not len(data):
            raise BadInput("this site has no training examples")
        model = self.task.flat(incoming.seed, incoming.plan)
        model.load(_without_factors(model.layout, incoming.tensors["learned"]))
        return mean_gradient(model, data, self._forms.weights, self.task.objective, self.training.batch, incoming.plan)

    def _public_gradient(self, public: Examples, rest: Parameters) -> Parameters:
        model, other = self.task.flat(0, PLAIN), self.task.build(1)
        own, drawn = dict(model.module.named_parameters()), trainable(other)
        for name, values in other.named_parameters():
            unused = ".original_module." in name  # what peft keeps of a head that is trained
            if name not in drawn and not unused and not torch.equal(values, own[name]):
                raise BadInput(
                    f"{name!r} is frozen and depends on the run's seed, so that a gradient from public examples would "
                    "be of another model; use a model that is pre-trained, or leave `public` out"
                )
        model.load(_without_factors(model.layout, rest.vector))
        return mean_gradient(model, public, self._forms.weights, self.task.objective, self.training.batch, PLAIN)[0]

    def _started(self, state: FedSBState, gradient: Parameters, since: int) -> FedSBState:
        """The state with the factors that a gradient gives."""
        step = first_step(self.training, gradient, self.first_lr)
        learned, fixed = Parameters.zeros(self._forms.learned), Parameters.zeros(self._forms.fixed)
        learned = learned.with_part(state.learned)
        for pair in pairs(state.parameters.layout):
            layer = self._forms.layers[pair.layer]
            b, r, a = initial_factors(step[layer.weight], layer)
            names = Square(pair.layer)
            for part, name, values in ((learned, names.r, r), (fixed, names.b, b), (fixed, names.a, a)):
                part[name].copy_(values.reshape(part[name].shape))
        return self._with_learned(replace(state, learned=learned, fixed=fixed, since=since))

    def _with_learned(self, state: FedSBState) -> FedSBState:
        """The state with what was learned in LoRA's own factors: A, and B R in the place of B."""
        rest = state.learned.part(state.learned.layout.only(lambda name: name in state.parameters))
        whole = state.parameters.with_part(rest)
        for pair in pairs(whole.layout):
            names = Square(pair.layer)
            r, b = (values.flatten(1).double() for values in (state.learned[names.r], state.fixed[names.b]))
            whole[pair.b].copy_((b @ r).reshape(whole[pair.b].shape))
            whole[pair.a].copy_(state.fixed[names.a])
        return replace(state, parameters=whole)


@dataclass(frozen=True, kw_only=True)
class _Forms:
    """Of a model with matrices between its factors: its layers, and the layouts of what is trained, fixed, adapted."""

    layers: Mapping[str, Adapted]
    learned: Layout
    fixed: Layout
    weights: Layout

    @classmethod
    def of(cls, module: nn.Module) -> "_Forms":
        layers, learned = adapted(module), Parameters.of(module).layout
        own = dict(module.named_parameters())
        if bits_of(module) is not None:
            raise BadInput("Fed-SB takes the gradient of the weights, which rounded ones have not; leave `bits` out")
        fixed: dict[str, Tensor] = {}
        for layer in layers:
            names = Square(layer)
            if own[names.b].any():
                raise BadInput(
                    "Fed-SB takes its factors from a gradient, and those of this model add something already; merge "
                    "them into the model first"
                )
            fixed |= {names.a: own[names.a], names.b: own[names.b]}
        weights = Layout.of({layer.weight: own[layer.weight] for layer in layers.values()})
        return cls(layers=layers, learned=learned, fixed=Layout.of(fixed), weights=weights)


def mean_gradient(
    model: FlatModel, examples: Examples, weights: Layout, objective: Objective, batch: int, plan: Plan
) -> tuple[Parameters, dict[str, float]]:
    """The gradient of the mean loss over `examples` in the frozen `weights` of a model, and the sums of the objective.

    In evaluation mode; `batch` is how many rows go through the model at a time.
    """
    own = dict(model.module.named_parameters())
    tensors = [own[name] for name in weights.by_name]
    gradient, totals = Parameters.zeros(weights), dict.fromkeys(objective.sums, 0.0)
    model.module.eval()
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        for rows in torch.split(by_length(examples), batch):
            part = prepared(examples[rows], plan)
            with autocast(plan):
                measured = objective.measure(predict(model.module, part.inputs), part.targets)
            found = torch.autograd.grad(measured["loss"].sum(), tensors, materialize_grads=True)
            for name, values in zip(weights.by_name, found, strict=True):
                gradient[name].add_(values.to(gradient.vector))
            for name, values in measured.items():
                totals[name] += float(values.detach().sum(dtype=torch.float64))
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)
    gradient.vector.div_(max(totals["examples"], 1.0))
    return gradient, totals


def first_step(training: Training, gradient: Parameters, lr: float | None = None) -> Parameters:
    """What the optimizer adds to weights in its first step: weight decay apart, which is no part of what is learned."""
    step = torch.zeros_like(gradient.vector)
    lr = training.optimizer.lr * training.schedule.factor(1) if lr is None else lr
    training.optimizer.make([step])([step], [gradient.vector.clone()], lr)
    return gradient.like(step)


def initial_factors(step: Tensor, layer: Adapted) -> tuple[Tensor, Tensor, Tensor]:
    """B [out, r], R [r, r] and A [r, in] in float64: s B R A is the best approximation of `step` of that rank.

    `step` has the shape of the layer's weight. B has orthonormal columns and A orthonormal rows, as many as `step` has
    singular values; the rest of them is 0.
    """
    matrix = step.double()
    matrix = matrix.T if layer.transposed else matrix.flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    b, a = matrix.new_zeros(len(matrix), layer.rank), matrix.new_zeros(layer.rank, matrix.shape[1])
    r = matrix.new_zeros(layer.rank, layer.rank)
    taken = min(layer.rank, len(s))
    b[:, :taken], a[:taken] = u[:, :taken], vh[:taken]
    r.diagonal()[:taken] = s[:taken] / layer.scale(layer.rank)
    return b, r, a


def _without_factors(layout: Layout, rest: Tensor) -> Parameters:
    """The parameters of `layout` in which all but factors is as in `rest`, and factors add nothing."""
    return Parameters.zeros(layout).with_part(Parameters(layout.only(lambda name: half(name) is None), rest))


def _fixed_of(incoming: Incoming, site: Site) -> Tensor | None:
    """B and A as they came, or as they came once; None if they are not there yet."""
    came = incoming.tensors.get("fixed")
    return site.memory.at(incoming.base).get("fixed") if came is None else came
