"""FlexLoRA (Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, section 3).

Every site has factors of its own rank. The weighted sum of their products is taken apart by an SVD, U S V^T; a site of
rank r gets the r largest: B = U S, A = V^T. The SVD is made of the stacked factors (`aggregation/factors.py`): the
sum itself is a matrix of the layer's size, and does not come to be.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch

from fedelta.adapters.factors import Tiers, check_new, scaled, unscaled
from fedelta.aggregation.factors import Product, spectrum
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


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """The best product of rank `rank` for the weighted mean of products (Eckart and Young, 1936)."""

    needs: ClassVar[Sight] = Sight.EACH

    rank: int
    mean: Mean = WHOLE  # of all that is no factor

    def refuse(self, update: Update) -> str | None:
        return self.mean.refuse(update)

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        return aggregated(updates, cohort, self._layer, self.mean)

    def _layer(self, shares: Sequence[float], products: Sequence[Product]) -> dict[str, Product]:
        weighted = [(share * b.double(), a) for share, (b, a) in zip(shares, products, strict=True)]
        short = self.rank - sum(len(a) for _, a in products)
        if short > 0:  # as the SVD of the sum, it has to give directions beyond: where B and A are 0, neither learns
            b, a = weighted[0]
            weighted.append((b.new_zeros(len(b), short), torch.eye(short, a.shape[1])))
        u, s, vh = spectrum(weighted, self.rank)
        return {"": (u * s, vh)}


@dataclass(frozen=True, kw_only=True)
class FlexLoRA:
    """`task` has a model that is tuned by LoRA, with the largest rank.

    `ranks` has, by tier, the rank of its sites; a site's tier is what its name begins with. All others have the largest
    rank.
    """

    kind: ClassVar[Kind] = "value"
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    task: Task
    training: Training
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self._tiers  # checked here, and not in the first round

    @property
    def rule(self) -> Rule:
        return Truncated(rank=self._tiers.largest)

    @cached_property
    def _tiers(self) -> Tiers:
        return Tiers(self.task, self.ranks)

    def init(self, parameters: Parameters) -> Parameters:
        check_new("FlexLoRA", parameters)
        return parameters

    def parameters(self, state: Parameters) -> Parameters:
        return state

    def broadcast(self, state: Parameters, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        return self._tiers.broadcast(state, to)

    def layout(self, state: Parameters, party: PartyId) -> Layout:
        return self._tiers.layout(state.layout, party)

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        return self._tiers.received(incoming, site, examples)

    def local(self, incoming: Incoming, site: Site) -> Update:
        data = site.data().train
        model, rows = self.received(incoming, site, data)
        sums = trained(model, rows, self.task, self.training, incoming)
        return Update(values=scaled(model.read(), self._tiers.layers), kind="value", weight=float(len(data)), sums=sums)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("FlexLoRA trains its sites one by one")

    def step(self, state: Parameters, total: Update, round: int) -> Parameters:
        return unscaled(total.values.part(state.layout), self._tiers.layers)
