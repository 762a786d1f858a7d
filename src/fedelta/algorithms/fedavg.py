"""Federated averaging (McMahan et al., AISTATS 2017, Algorithm 1).

Every site of the cohort trains from the global model on its own examples; the new global model is the mean of theirs,
weighted by their numbers of examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedelta.algorithms.algorithm import Incoming, IncomingMany, delta, delta_many, moved
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Parameters
from fedelta.core.program import Site
from fedelta.learning.task import Task
from fedelta.learning.training import Training


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    kind: ClassVar[Kind] = "difference"

    task: Task
    training: Training

    def init(self, parameters: Parameters) -> Parameters:
        return parameters

    def parameters(self, state: Parameters) -> Parameters:
        return state

    def broadcast(self, state: Parameters, to: Sequence[PartyId]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        return {"parameters": state.vector}, {}

    def local(self, incoming: Incoming, site: Site) -> Update:
        return delta(self.task, self.training, incoming, site)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        return delta_many(self.task, self.training, incoming, sites)

    def step(self, state: Parameters, total: Update) -> Parameters:
        return moved(state, total)
