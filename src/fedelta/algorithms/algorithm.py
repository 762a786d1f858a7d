"""What an algorithm is: what a federation broadcasts, trains and does with the total."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from fedelta.core.messages import Kind, PartyId, Tensors, Update
from fedelta.core.parameters import Parameters
from fedelta.core.program import Site
from fedelta.learning.task import Task
from fedelta.learning.training import Training, train

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Incoming:
    """What a site gets to work with in one round: the shared tensors and its own, merged."""

    tensors: Tensors
    round: int
    seed: int  # of the run: decides how the model is built
    local_seed: int  # of this site in this round: decides its shuffling and dropout


class Algorithm(Protocol[S]):
    @property
    def task(self) -> Task: ...

    @property
    def training(self) -> Training: ...

    @property
    def kind(self) -> Kind:
        """Of the updates that `local` gives."""
        ...

    def init(self, parameters: Parameters) -> S:
        """The state that starts from these parameters."""
        ...

    def parameters(self, state: S) -> Parameters:
        """The global model in a state."""
        ...

    def broadcast(self, state: S, to: Sequence[PartyId]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        """What all sites of the cohort get, and what each gets besides; it has the model under "parameters"."""
        ...

    def local(self, incoming: Incoming, site: Site) -> Update:
        """A site's work."""
        ...

    def step(self, state: S, total: Update) -> S:
        """The state after a round whose aggregate is `total`."""
        ...


def delta(task: Task, training: Training, incoming: Incoming, site: Site, *, proximal: float = 0.0) -> Update:
    """Train from the broadcast on the site's data: the difference, weighted by its number of examples."""
    data = site.data().train
    task.check(data)
    model = task.flat(incoming.seed, training.device, channels_last=training.channels_last)
    start = Parameters(model.layout, incoming.tensors["parameters"])
    model.load(start)
    sums = train(
        model, data, task.objective, training, round=incoming.round, seed=incoming.local_seed, proximal=proximal
    )
    end = model.read()
    torch.sub(end.vector, start.vector, out=end.vector)
    return Update(values=end, weight=float(len(data)), sums=sums)


def moved(parameters: Parameters, total: Update) -> Parameters:
    """`parameters` after the aggregate: moved by a difference, replaced by a value."""
    if total.kind == "value":
        return total.values
    return parameters.like(parameters.vector + total.values.vector)
