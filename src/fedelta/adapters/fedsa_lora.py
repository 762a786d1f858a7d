"""FedSA-LoRA (Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, section 4).

Sites train A and B and share A alone: it learns what is common, B what is a site's own. B stays in the site's memory
from round to round. The head, and whatever else is trained, is shared as A is.

The coordinator has no whole model: it is evaluated at the sites, and saved there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedelta.adapters.factors import check_new
from fedelta.aggregation.factors import half
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, moved, trained
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training


@dataclass(frozen=True, kw_only=True)
class FedSALoRA:
    """`task` has a model that is tuned by LoRA; its state has A, and the B that every site starts with."""

    kind: ClassVar[Kind] = "difference"
    rule: ClassVar[Rule] = Mean()
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = True
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    task: Task
    training: Training

    def init(self, parameters: Parameters) -> Parameters:
        check_new("FedSA-LoRA", parameters, embeddings=False)
        return parameters

    def parameters(self, state: Parameters) -> Parameters:
        return state

    def broadcast(self, state: Parameters, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        return {"parameters": self._shared(state).vector}, {}

    def layout(self, state: Parameters, party: PartyId) -> Layout:
        return _without_b(state.layout)

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        self.task.check(examples)
        model, rows = self.task.flat_on(examples, incoming.seed, incoming.plan)
        layout = _without_b(model.layout)
        whole = Parameters.zeros(model.layout)  # the B that LoRA starts with
        for name, values in site.memory.at(incoming.base).items():
            whole[name].copy_(values)
        model.load(whole.with_part(Parameters(layout, incoming.tensors["parameters"])))
        return model, rows

    def local(self, incoming: Incoming, site: Site) -> Update:
        data = site.data().train
        model, rows = self.received(incoming, site, data)
        sums = trained(model, rows, self.task, self.training, incoming)
        end = model.read()
        site.memory.commit(incoming.base, incoming.round, {name: end[name] for name in end if half(name) == "B"})
        shared = self._shared(end)
        torch.sub(shared.vector, incoming.tensors["parameters"], out=shared.vector)
        return Update(values=shared, weight=float(len(data)), sums=sums)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("FedSALoRA trains its sites one by one")

    def step(self, state: Parameters, total: Update, round: int) -> Parameters:
        return state.with_part(moved(self._shared(state), total))

    def _shared(self, whole: Parameters) -> Parameters:
        return whole.part(_without_b(whole.layout))


def _without_b(layout: Layout) -> Layout:
    return layout.only(lambda name: half(name) != "B")
