"""FedEx-LoRA (Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models", ACL 2025, section 3).

The factors are averaged as in FedIT, and what the average misses goes into the base: the mean of the products less the
product of the means. That residual is sum_i p_i (B_i - B)(A_i - A), so its rank is at most the sum of the sites', and
it travels as factors. Exact, and sites go on from the factors that they had.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from fedelta.adapters.factors import Tiers, check_new, scaled, unscaled
from fedelta.adapters.moving import Moving, catch_up_each, fixed, merged, movable, weights_at, without_base
from fedelta.aggregation.factors import Product, stacked
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.products import WHOLE, aggregated
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, trained
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Sight, Site
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training

RESIDUAL = "residual"  # the name of the adapter that holds it


@dataclass(frozen=True, kw_only=True)
class MeanAndResidual:
    """The means of A and of B, and beside them the factors of what their product misses."""

    needs: ClassVar[Sight] = Sight.EACH

    mean: Mean = WHOLE  # of all that is no factor

    def refuse(self, update: Update) -> str | None:
        return self.mean.refuse(update)

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        return aggregated(updates, cohort, self._layer, self.mean)

    def _layer(self, shares: Sequence[float], products: Sequence[Product]) -> dict[str, Product]:
        wide = [(b.double(), a.double()) for b, a in products]
        mean_b = sum(share * b for share, (b, _) in zip(shares, wide, strict=True))
        mean_a = sum(share * a for share, (_, a) in zip(shares, wide, strict=True))
        apart = [(share * (b - mean_b), a - mean_a) for share, (b, a) in zip(shares, wide, strict=True)]
        assert isinstance(mean_b, Tensor)
        assert isinstance(mean_a, Tensor)
        return {"": (mean_b, mean_a), RESIDUAL: stacked(apart)}


@dataclass(frozen=True, kw_only=True)
class FedExLoRA:
    """`task` has a model that is tuned by LoRA; all sites work at its rank."""

    kind: ClassVar[Kind] = "value"
    rule: ClassVar[Rule] = MeanAndResidual()
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = False

    task: Task
    training: Training

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", movable(self.task))
        _ = self._tiers.layers  # checked here, and not in the first round

    @cached_property
    def _tiers(self) -> Tiers:
        return Tiers(fixed(self.task), {})

    def init(self, parameters: Parameters) -> Moving:
        check_new("FedEx-LoRA", parameters)
        return Moving(parameters=parameters)

    def parameters(self, state: Moving) -> Parameters:
        return state.parameters

    def broadcast(self, state: Moving, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        shared, _ = self._tiers.broadcast(state.parameters.part(self.layout(state, "")), ())
        return shared, catch_up_each(state, to, self._tiers.layers)

    def layout(self, state: Moving, party: PartyId) -> Layout:
        return without_base(state.parameters.layout, self._tiers.layers)

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        model, rows = self._tiers.received(incoming, site, examples)
        weights_at(model, incoming.tensors, site, incoming.base, self._tiers.layers)
        return model, rows

    def local(self, incoming: Incoming, site: Site) -> Update:
        data = site.data().train
        model, rows = self._tiers.received(incoming, site, data)
        weights = weights_at(model, incoming.tensors, site, incoming.base, self._tiers.layers)
        sums = trained(model, rows, self.task, self.training, incoming)
        site.memory.commit(incoming.base, incoming.round, weights)
        values = scaled(model.read(), self._tiers.layers)
        return Update(values=values, kind="value", weight=float(len(data)), sums=sums)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("FedExLoRA trains its sites one by one")

    def step(self, state: Moving, total: Update, round: int) -> Moving:
        own = self.layout(state, "")
        missed = total.values.part(total.values.layout.only(lambda name: name not in own.by_name))
        parameters = state.parameters.with_part(unscaled(total.values.part(own), self._tiers.layers))
        return merged(state, parameters, missed, round, self._tiers.layers)
