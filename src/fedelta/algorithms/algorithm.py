"""What an algorithm is: what a federation broadcasts, trains and does with the total."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from fedelta.aggregation.rule import Rule
from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.noise import Noise
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.cohort import Cohort, train_many
from fedelta.learning.dp_sgd import PrivateSteps, train_private
from fedelta.learning.flat import FlatModel
from fedelta.learning.joined import joined
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Penalty, Training, descend, proximal_term, train

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Incoming:
    """What a site gets to work with in one round: the shared tensors and its own, merged."""

    tensors: Tensors
    round: int
    base: int  # round of this site's last accepted reply; -1 if there is none
    seed: int  # of the run: decides how the model is built
    local_seed: int  # of this site in this round: decides its shuffling and dropout
    plan: Plan
    private: tuple[PrivateSteps, Noise] | None = None  # how to train where examples are protected
    hidden: bool = False  # whether nobody may know that training diverged: what is not finite leaves as zeros, noised


@dataclass(frozen=True, kw_only=True, slots=True)
class IncomingMany:
    """What sites that are trained at once get to work with, in their order."""

    shared: Tensors
    own: Mapping[PartyId, Tensors]  # of those who get something besides
    round: int
    seed: int
    local_seeds: Sequence[int]
    plan: Plan
    hidden: bool = False  # as of one site


class Algorithm(Protocol[S]):
    @property
    def task(self) -> Task:
        """Its model has all that the algorithm's state knows: what is evaluated and saved at the coordinator."""
        ...

    @property
    def training(self) -> Training: ...

    @property
    def kind(self) -> Kind:
        """Of the updates that `local` gives."""
        ...

    @property
    def rule(self) -> Rule:
        """How its updates become one, where the federation is given no other rule."""
        ...

    @property
    def at_once(self) -> bool:
        """Whether there is a `local_many`."""
        ...

    @property
    def personal(self) -> bool:
        """Whether a part of what is learned stays at each site, so that only sites can evaluate."""
        ...

    @property
    def by_gradient(self) -> bool:
        """Whether all that leaves a site was learned by `trained`, where examples can be protected."""
        ...

    @property
    def steady(self) -> bool:
        """Whether messages are as large in every round as in the first."""
        ...

    def init(self, parameters: Parameters) -> S:
        """The state that starts from these parameters."""
        ...

    def parameters(self, state: S) -> Parameters:
        """The global model in a state."""
        ...

    def broadcast(self, state: S, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        """What all sites get that train or evaluate, and what each gets besides, or in its place.

        `to` has for each the round of its last accepted reply, -1 if there is none: what it got then it still knows.
        """
        ...

    def layout(self, state: S, party: PartyId) -> Layout:
        """Of the update with which a site answers."""
        ...

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        """The model as this site has it now, and what of `examples` it takes; both may be overwritten by the next."""
        ...

    def local(self, incoming: Incoming, site: Site) -> Update:
        """A site's work."""
        ...

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        """As `local` of each site, to rounding, at once; the sites that failed are apart, with the reason.

        The values may be overwritten by the next call.
        """
        ...

    def step(self, state: S, total: Update, round: int) -> S:
        """The state after `round`, whose aggregate is `total`."""
        ...


def loaded(task: Task, incoming: Incoming, examples: Examples) -> tuple[FlatModel, Examples]:
    """The working copy of a task's model with the broadcast parameters, and what of `examples` it takes."""
    task.check(examples)
    model, rows = task.flat_on(examples, incoming.seed, incoming.plan)
    model.load(Parameters(model.layout, incoming.tensors["parameters"]))
    return model, rows


def delta(task: Task, training: Training, incoming: Incoming, site: Site, *, proximal: float = 0.0) -> Update:
    """Train from the broadcast on the site's data: the difference, weighted by its number of examples."""
    data = site.data().train
    model, rows = loaded(task, incoming, data)
    sums = trained(model, rows, task, training, incoming, penalty=proximal_term(model, proximal))
    end = model.read()
    torch.sub(end.vector, incoming.tensors["parameters"], out=end.vector)
    return Update(values=end, weight=float(len(data)), sums=sums)


def value(task: Task, training: Training, incoming: Incoming, site: Site) -> Update:
    """As `delta`, but the weights themselves: for rules that are not linear in what was learned."""
    data = site.data().train
    model, rows = loaded(task, incoming, data)
    sums = trained(model, rows, task, training, incoming)
    return Update(values=model.read(), kind="value", weight=float(len(data)), sums=sums)


def trained(
    model: FlatModel,
    rows: Examples,
    task: Task,
    training: Training,
    incoming: Incoming,
    *,
    penalty: Penalty | None = None,
) -> dict[str, float]:
    """Train `model` in place with the randomness of this site and round: the sums of the objective.

    Where examples are protected, these sums are no part of what may leave, and only the steps are given.
    """
    if incoming.private is not None:
        steps, noise = incoming.private
        return train_private(
            model,
            rows,
            task.objective,
            training,
            incoming.plan,
            round=incoming.round,
            seed=incoming.local_seed,
            private=steps,
            noise=noise,
            penalty=penalty,
        )
    return (descend if incoming.hidden else train)(
        model,
        rows,
        task.objective,
        training,
        incoming.plan,
        round=incoming.round,
        seed=incoming.local_seed,
        penalty=penalty,
    )


def delta_many(
    task: Task, training: Training, incoming: IncomingMany, sites: Sequence[Site], *, proximal: float = 0.0
) -> tuple[Updates, dict[PartyId, str]]:
    """As `delta` for each site, trained at once; and the sites that failed, with the reason.

    Sites whose examples have another form than the others' are trained in a batch of their own. The values are valid
    until sites are trained at once again.
    """
    layout = task.cohort(incoming.seed, incoming.plan).layout
    start = Parameters(layout, incoming.shared["parameters"])
    groups, failed = _alike(task, sites)
    parts = []
    for group in groups:
        model, examples = task.cohort_on(group.examples, incoming.seed, incoming.plan)
        seeds = [incoming.local_seeds[index] for index in group.where]
        cohort = Cohort(rows=joined(examples), sizes=group.sizes, seeds=seeds)
        trained = train_many(
            model, start, cohort, task.objective, training, incoming.plan, round=incoming.round, proximal=proximal
        )
        updates = Updates(
            senders=[sites[index].id for index in group.where],
            layout=layout,
            values=trained.deltas if len(groups) == 1 else trained.deltas.clone(),
            weights=torch.tensor(group.sizes, dtype=torch.float64),
            sums=trained.sums,
            magnitude=None if trained.failed else trained.magnitude,
        )
        if incoming.hidden:
            parts.append(updates)
            continue
        failed |= {updates.senders[row]: reason for row, reason in trained.failed.items()}
        parts.append(updates.without(trained.failed))
    return Updates.cat(parts, layout), failed


@dataclass(slots=True)
class _Group:
    """Sites with examples of one form: their places among those given, what they learn from, and how many rows."""

    where: list[int] = field(default_factory=list)
    examples: list[Examples] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def _alike(task: Task, sites: Sequence[Site]) -> tuple[list[_Group], dict[PartyId, str]]:
    """The sites that have something to learn from, and why the others have not."""
    groups: dict[str, _Group] = defaultdict(_Group)
    failed: dict[PartyId, str] = {}
    for index, site in enumerate(sites):
        try:
            data = site.data().train
            form, size = task.check(data), len(data)
            if not size:
                raise BadInput("this site has no training examples")
            group = groups[form]
            group.where.append(index)
            group.examples.append(data)
            group.sizes.append(size)
        except FedeltaError as error:
            failed[site.id] = str(error)
        except OSError as error:
            failed[site.id] = f"{type(error).__name__}: {error}"
    return list(groups.values()), failed


def moved(parameters: Parameters, total: Update) -> Parameters:
    """`parameters` after the aggregate: moved by a difference, replaced by a value."""
    if total.kind == "value":
        return total.values
    return parameters.like(parameters.vector + total.values.vector)
