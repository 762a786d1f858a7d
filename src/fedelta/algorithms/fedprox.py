"""FedProx (Li et al., MLSys 2020, Algorithm 2): federated averaging with a proximal term in the local objective.

A site minimises its loss plus mu/2 * ||w - w_global||^2, which keeps it near the global model when the data of the
sites differ. With mu = 0 it is FedAvg.

The paper samples sites by their share of the data and averages them uniformly; here sampling and weights are FedAvg's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, delta, delta_many, loaded, moved
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training


@dataclass(frozen=True, kw_only=True)
class FedProx:
    """As FedAvg, with mu/2 times the squared distance from the global model added to the loss of each batch."""

    kind: ClassVar[Kind] = "difference"
    rule: ClassVar[Rule] = Mean()
    at_once: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    task: Task
    training: Training
    mu: float  # >= 0; the paper tries 0.001 to 1

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf"):
            raise BadInput(f"FedProx.mu must be a finite number >= 0, got {self.mu}")

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
        return delta(self.task, self.training, incoming, site, proximal=self.mu)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        return delta_many(self.task, self.training, incoming, sites, proximal=self.mu)

    def step(self, state: Parameters, total: Update, round: int) -> Parameters:
        return moved(state, total)
