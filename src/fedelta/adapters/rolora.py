"""RoLoRA (Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", 2025, section 3).

In odd rounds sites train B, in even rounds A, the other half being fixed and common to all. Averaging one half is then
exact, and half as much travels as with FedIT, while both halves learn. The head is trained in every round.

A site keeps both halves as it got them. One that took part in the last round lacks only the half that was trained
then; any other gets both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedelta.adapters.factors import check_new, place
from fedelta.aggregation.factors import half
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, moved, trained
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.adapted import Halved
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training

Half = Literal["A", "B"]
_OTHER: Mapping[Half, Half] = {"A": "B", "B": "A"}


@dataclass(frozen=True, kw_only=True)
class RoLoRAState:
    parameters: Parameters
    next: Half = "B"  # the half that is trained in the next round
    last: int = -1  # the round before that in which something was trained


@dataclass(frozen=True, kw_only=True)
class RoLoRA:
    """`task` has a model that is tuned by LoRA."""

    kind: ClassVar[Kind] = "difference"
    rule: ClassVar[Rule] = Mean()
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = False

    task: Task
    training: Training

    @cached_property
    def _local(self) -> Mapping[Half, Task]:
        halves: tuple[Half, Half] = ("A", "B")
        return {own: replace(self.task, model=Halved(model=self.task.model, trained=own)) for own in halves}

    def init(self, parameters: Parameters) -> RoLoRAState:
        check_new("RoLoRA", parameters)
        return RoLoRAState(parameters=parameters)

    def parameters(self, state: RoLoRAState) -> Parameters:
        return state.parameters

    def broadcast(self, state: RoLoRAState, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        trains, fixed = state.next, _OTHER[state.next]
        vectors = {
            part: state.parameters.part(_only(state.parameters.layout, part)).vector for part in ("A", "B", None)
        }
        late = [party for party, base in to.items() if base < max(state.last, 0)]
        missing = {f"trained/{trains}": vectors[trains]}
        return {"rest": vectors[None], f"fixed/{fixed}": vectors[fixed]}, dict.fromkeys(late, missing)

    def layout(self, state: RoLoRAState, party: PartyId) -> Layout:
        return _only(state.parameters.layout, state.next, None)

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        trains, halves = _halves(incoming, site)
        task = self._local[trains]
        task.check(examples)
        model, rows = task.flat_on(examples, incoming.seed, incoming.plan)
        start = Parameters.zeros(model.layout)
        for part, vector in ((None, incoming.tensors["rest"]), (trains, halves[trains])):
            start = start.with_part(Parameters(_only(model.layout, part), vector))
        model.load(start)
        frozen = Layout.of({name: p for name, p in model.module.named_parameters() if half(name) == _OTHER[trains]})
        place(model.module, Parameters(frozen, halves[_OTHER[trains]]))
        return model, rows

    def local(self, incoming: Incoming, site: Site) -> Update:
        data = site.data().train
        model, rows = self.received(incoming, site, data)
        start = model.read()
        sums = trained(model, rows, self.task, self.training, incoming)
        end = model.read()
        torch.sub(end.vector, start.vector, out=end.vector)
        site.memory.commit(
            incoming.base, incoming.round, {str(own): v for own, v in _halves(incoming, site)[1].items()}
        )
        return Update(values=end, weight=float(len(data)), sums=sums)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("RoLoRA trains its sites one by one")

    def step(self, state: RoLoRAState, total: Update, round: int) -> RoLoRAState:
        part = state.parameters.part(self.layout(state, ""))
        parameters = state.parameters.with_part(moved(part, total))
        return RoLoRAState(parameters=parameters, next=_OTHER[state.next], last=round)


def _halves(incoming: Incoming, site: Site) -> tuple[Half, dict[Half, Tensor]]:
    """The half that is trained, and both as the site has them now."""
    trains: Half = "B" if "fixed/A" in incoming.tensors else "A"
    fixed = _OTHER[trains]
    mine = incoming.tensors.get(f"trained/{trains}")
    if mine is None:
        mine = site.memory.at(incoming.base)[trains]
    return trains, {trains: mine, fixed: incoming.tensors[f"fixed/{fixed}"]}


def _only(layout: Layout, *halves: str | None) -> Layout:
    return layout.only(lambda name: half(name) in halves)
