"""FLoRA-NA (Nguyen et al., "Communication-Efficient and Accurate Approach for Aggregation in Federated Low-Rank
Adaptation", arXiv 2509.26399, 2025, equation 6).

As in FedIT, sites send A and B and get A and B, but the coordinator does not average them: it combines the sites' B
with coefficients p and their A with coefficients q such that the product is nearest to the mean of products,
min ||(sum_i p_i B_i)(sum_i q_i A_i) - sum_i w_i B_i A_i||_F, here in each layer by itself. (The paper is known here
from its abstract and its public reviews, which say that it leaves open how p and q are found.)

They are found by alternating least squares from p = q = w, which is FedIT: with one of them fixed the other has a
closed form, so that the error never rises, and is never larger than FedIT's. It ends where neither p alone nor q alone
gains anything; there may be a better point elsewhere. All of it is done with the inner products of the columns of B
and of the rows of A, in float64: as many numbers as the square of the sites' ranks together, and no matrix of the
layer's size. The paper weights all sites alike; here they are weighted by their numbers of examples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedelta.adapters.factors import check_new
from fedelta.aggregation.factors import Product
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.products import WHOLE, aggregated
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, loaded, value
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Sight, Site
from fedelta.learning.adapted import adapted
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training

_SINGULAR = 1e-10  # of the largest eigenvalue: directions below would need huge coefficients
_SETTLED = 1e-12  # of ||sum_i w_i B_i A_i||^2: what a sweep has to gain for another one


@dataclass(frozen=True, kw_only=True)
class NearestCombination:
    """Combinations of the sites' A and of their B, of one rank, whose product is near the mean of products."""

    needs: ClassVar[Sight] = Sight.EACH

    sweeps: int = 100  # at most: of least squares, each for p and then for q
    mean: Mean = WHOLE  # of all that is no factor

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise BadInput(f"NearestCombination.sweeps must be >= 1, got {self.sweeps}")

    def refuse(self, update: Update) -> str | None:
        return self.mean.refuse(update)

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        return aggregated(updates, cohort, self._layer, self.mean)

    def _layer(self, shares: Sequence[float], products: Sequence[Product]) -> dict[str, Product]:
        bs = torch.stack([b.double() for b, _ in products])  # [sites, out, rank]
        as_ = torch.stack([a.double() for _, a in products])  # [sites, rank, in]
        inner_b = torch.einsum("udi,vdj->uivj", bs, bs)
        inner_a = torch.einsum("uin,vjn->uivj", as_, as_)
        weights = torch.tensor(shares, dtype=torch.float64)
        size = float(torch.einsum("u,uivj,uivj,v->", weights, inner_b, inner_a, weights))
        p = q = weights
        for _ in range(self.sweeps):
            p, by_p = _improved(p, inner_b, q, inner_a, weights)
            q, by_q = _improved(q, inner_a, p, inner_b, weights)
            if by_p + by_q <= _SETTLED * size:
                break
        return {"": (torch.tensordot(p, bs, 1), torch.tensordot(q, as_, 1))}


@dataclass(frozen=True, kw_only=True)
class FLoRANA:
    """`task` has a model that is tuned by LoRA; all sites work at its rank."""

    kind: ClassVar[Kind] = "value"
    rule: ClassVar[Rule] = NearestCombination()
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    task: Task
    training: Training

    def __post_init__(self) -> None:
        adapted(self.task.build(0))  # checked here, and not in the first round

    def init(self, parameters: Parameters) -> Parameters:
        check_new("FLoRA-NA", parameters)
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
        return value(self.task, self.training, incoming, site)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("FLoRANA trains its sites one by one")

    def step(self, state: Parameters, total: Update, round: int) -> Parameters:
        return total.values


def _improved(
    own: Tensor, inner_own: Tensor, other: Tensor, inner_other: Tensor, weights: Tensor
) -> tuple[Tensor, float]:
    """The coefficients `own` of one half that are best for `other` of the other half, and what ||error||^2 falls by.

    `inner_own` and `inner_other`, [sites, rank, sites, rank], have the inner products within each half. The equations
    are those of the change, whose right side is the error: where nothing can be gained, nothing changes.
    """
    with_each = torch.einsum("v,viwj->wij", other, inner_other)  # the other half combined, with each site's
    squared = torch.einsum("wij,w->ij", with_each, other)
    normal = torch.einsum("uivj,ij->uv", inner_own, squared)
    target = torch.einsum("uiwj,wij,w->u", inner_own, with_each, weights)
    missing = target - normal @ own
    change = torch.linalg.pinv(normal, rtol=_SINGULAR, hermitian=True) @ missing
    return own + change, float(change @ missing)
