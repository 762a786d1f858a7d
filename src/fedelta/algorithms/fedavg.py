"""Federated averaging (McMahan et al., AISTATS 2017, Algorithm 1).

Every site of the cohort trains from the global model on its own examples; the new global model is the mean of theirs,
weighted by their numbers of examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, delta, delta_many, loaded, moved
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """`task` is what is trained, `training` how a site trains in a round."""

    kind: ClassVar[Kind] = "difference"
    rule: ClassVar[Rule] = Mean()
    at_once: ClassVar[bool] = True
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
        return delta(self.task, self.training, incoming, site)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        return delta_many(self.task, self.training, incoming, sites)

    def step(self, state: Parameters, total: Update, round: int) -> Parameters:
        return moved(state, total)
