"""FFA-LoRA (Sun et al., "Improving LoRA in privacy-preserving federated learning", ICLR 2024, section 4).

A is drawn once and never trained; sites train and send B (and the head). The mean of B times A is the mean of the
products, so that averaging is exact, half as much travels, and noise that is added to B stays linear.

The A of every party is that of the run's seed; it does not travel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from fedelta.adapters.factors import check_new
from fedelta.aggregation.factors import half
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, delta, delta_many, loaded, moved
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.adapted import Halved
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training


@dataclass(frozen=True, kw_only=True)
class FFALoRA:
    """`task` has a model that is tuned by LoRA; its state has A and B."""

    kind: ClassVar[Kind] = "difference"
    rule: ClassVar[Rule] = Mean()
    at_once: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    task: Task
    training: Training

    @cached_property
    def _local(self) -> Task:
        return replace(self.task, model=Halved(model=self.task.model, trained="B"))

    def init(self, parameters: Parameters) -> Parameters:
        check_new("FFA-LoRA", parameters, embeddings=False)
        return parameters

    def parameters(self, state: Parameters) -> Parameters:
        return state

    def broadcast(self, state: Parameters, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        return {"parameters": self._sent(state).vector}, {}

    def layout(self, state: Parameters, party: PartyId) -> Layout:
        return state.layout.only(lambda name: half(name) != "A")

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        return loaded(self._local, incoming, examples)

    def local(self, incoming: Incoming, site: Site) -> Update:
        return delta(self._local, self.training, incoming, site)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        return delta_many(self._local, self.training, incoming, sites)

    def step(self, state: Parameters, total: Update, round: int) -> Parameters:
        return state.with_part(moved(self._sent(state), total))

    def _sent(self, state: Parameters) -> Parameters:
        return state.part(self.layout(state, ""))
