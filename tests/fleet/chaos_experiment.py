"""A linear model whose sites remember: what a site sends depends on its rounds before, in its memory.

A site notes the latest round that it has worked on (Site.given), and refuses to go back behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedelta import SGD, Classification, Federation, Task, Training
from fedelta.aggregation.mean import Mean
from fedelta.algorithms.algorithm import Incoming, IncomingMany, delta, loaded, moved
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.flat import FlatModel

HONEST = [f"h{number:02}" for number in range(20)]
ROGUES = [f"r{number}" for number in range(4)]


@dataclass(frozen=True, kw_only=True)
class Remembering:
    """FedAvg; each site adds a quarter of what it sent the time before."""

    kind: ClassVar[str] = "difference"
    rule: ClassVar[Mean] = Mean()
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    task: Task
    training: Training

    def init(self, parameters: Parameters) -> Parameters:
        return parameters

    def parameters(self, state: Parameters) -> Parameters:
        return state

    def broadcast(self, state: Parameters, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        return {"parameters": state.vector}, {}

    def layout(self, state: Parameters, party: PartyId) -> Layout:
        return state.layout

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        return loaded(self.task, incoming, examples)

    def local(self, incoming: Incoming, site: Site) -> Update:
        if incoming.round < site.given.get("train", 0):
            raise BadInput(f"asked to go back from round {site.given['train']} to {incoming.round}")
        site.given["train"] = incoming.round
        before = site.memory.at(incoming.base).get("sent")
        update = delta(self.task, self.training, incoming, site)
        if before is not None:
            update.values.vector.add_(before, alpha=0.25)
        site.memory.commit(incoming.base, incoming.round, {"sent": update.values.vector})
        return update

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise NotImplementedError

    def step(self, state: Parameters, total: Update, round: int) -> Parameters:
        return moved(state, total)


def program() -> Federation[Parameters]:
    task = Task(model=lambda: nn.Linear(6, 3), objective=Classification(classes=3))
    algorithm = Remembering(task=task, training=Training(optimizer=SGD(lr=0.05), batch=4))
    return Federation(algorithm=algorithm, rounds=200, min_sites=8)  # type: ignore[arg-type]


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=g)
    x = torch.randn(count, 6, generator=g)
    x[torch.arange(count), y] += 1
    return x, y


def site(name: str) -> tuple[Tensor, Tensor]:
    return rows(8, sites().index(name) + 1)


def sites() -> list[str]:
    return [*HONEST, *ROGUES]


def test() -> tuple[Tensor, Tensor]:
    return rows(60, 0)
