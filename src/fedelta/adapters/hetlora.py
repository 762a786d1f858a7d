"""HetLoRA (Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024).

Sites have ranks of their own. Each gets the first ranks of the global factors (truncation), and learns with the term
lambda ||B_tail|| ||A_tail||, summed over layers, in its loss; the tail are its ranks from gamma r on. If that sum is
smaller after training than before, the tail is pruned: the site has rank gamma r from then on, and it never rises
again. The factors, filled up with zeros to the largest rank, are averaged with the weights ||s B A||_F over all layers
(sparsity-weighted aggregation). That is a ratio of two sums, so that it works where only a sum is seen. (The paper is
known here from its abstract and its figure of the aggregation, and from others' descriptions and implementations.)

The head, and all else that is trained, is averaged with the same weights. Ranks may differ in s = alpha / rank, which
the paper does not have: B travels with that scale in it. Every site sends factors of the largest rank, zeros among
them, as otherwise there would be no one sum. A pruned rank is zero in A and in B, so that its gradient is zero and no
optimiser moves it; the layers keep the size, and the scale, of the site's tier.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fedelta.adapters.factors import Tiers, check_new, scaled, unscaled
from fedelta.aggregation.factors import norm, pairs, with_ranks
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, trained
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Penalty, Training

_LEAST = 1e-20  # a norm to divide by: below it the factor adds nothing to the gradient


@dataclass(frozen=True, kw_only=True)
class HetLoRA:
    """`task` has a model that is tuned by LoRA, with the largest rank; `ranks` as in FlexLoRA."""

    kind: ClassVar[Kind] = "value"
    rule: ClassVar[Rule] = Mean(bound=2.0**16, weight_bound=2.0**10)  # of whole weights; norms are small: a fine grid
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    task: Task
    training: Training
    ranks: Mapping[str, int] = field(default_factory=dict)
    decay: float = 0.99  # gamma: what pruning leaves of a rank, rounded down and at least 1; 1: ranks stay
    penalty: float = 0.01  # lambda

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise BadInput(f"HetLoRA.decay must be above 0 and at most 1, got {self.decay}")
        if not 0 <= self.penalty < math.inf:
            raise BadInput(f"HetLoRA.penalty must be a finite number >= 0, got {self.penalty}")
        _ = self._tiers  # checked here, and not in the first round

    @cached_property
    def _tiers(self) -> Tiers:
        return Tiers(self.task, self.ranks)

    def init(self, parameters: Parameters) -> Parameters:
        check_new("HetLoRA", parameters)
        return parameters

    def parameters(self, state: Parameters) -> Parameters:
        return state

    def broadcast(self, state: Parameters, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        return self._tiers.broadcast(state, to)

    def layout(self, state: Parameters, party: PartyId) -> Layout:
        return state.layout

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        model, rows = self._tiers.received(incoming, site, examples)
        _prune(model, self._rank(incoming, site))
        return model, rows

    def local(self, incoming: Incoming, site: Site) -> Update:
        data = site.data().train
        model, rows = self.received(incoming, site, data)
        rank = self._rank(incoming, site)
        kept = max(1, int(self.decay * rank))
        before = _importance(model, kept)
        term = tail_term(model.layout, kept, self.penalty)
        sums = trained(model, rows, self.task, self.training, incoming, penalty=term)
        if _importance(model, kept) < before:
            rank = kept
            _prune(model, rank)
        site.memory.commit(incoming.base, incoming.round, {"rank": torch.tensor([rank])})
        values = self._padded(scaled(model.read(), self._tiers.layers))
        return Update(values=values, kind="value", weight=_size(values), sums=sums)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("HetLoRA trains its sites one by one")

    def step(self, state: Parameters, total: Update, round: int) -> Parameters:
        return unscaled(total.values, self._tiers.layers)

    def _rank(self, incoming: Incoming, site: Site) -> int:
        """That of the site's tier, or what pruning has left of it."""
        left = site.memory.at(incoming.base).get("rank")
        return self._tiers.rank(site.id) if left is None else int(left)

    def _padded(self, values: Parameters) -> Parameters:
        """`values` with factors of the largest rank."""
        layers = self._tiers.layers
        return values.part(with_ranks(values.layout, {pair: layers[pair.layer].rank for pair in pairs(values.layout)}))


def tail_term(layout: Layout, kept: int, strength: float) -> Penalty | None:
    """The term `strength` * sum ||B_tail||_F ||A_tail||_F over the layers, the tail being the ranks from `kept` on.

    Its gradient is taken as 0 where a tail is 0. None where there is nothing to add.
    """
    if not strength or all(layout.by_name[pair.a].shape[0] <= kept for pair in pairs(layout)):
        return None

    def penalty(weights: Tensor, gradient: Tensor) -> None:
        for (b, a), (to_b, to_a) in zip(_tails(layout, weights, kept), _tails(layout, gradient, kept), strict=True):
            size_b, size_a = torch.linalg.vector_norm(b), torch.linalg.vector_norm(a)
            to_b.add_(b * (strength * size_a / size_b.clamp(min=_LEAST)))
            to_a.add_(a * (strength * size_b / size_a.clamp(min=_LEAST)))

    return penalty


def _tails(layout: Layout, vector: Tensor, kept: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each layer the columns of B and the rows of A from `kept` on, as views of a flat vector.

    The vector may be that of a FlatModel in any memory format: in both halves the rank has its place in all of them.
    """
    for pair in pairs(layout):
        a, b = layout.by_name[pair.a], layout.by_name[pair.b]
        rank = a.shape[0]
        columns = vector[b.offset : b.offset + b.numel].view(-1, rank)
        yield columns[:, kept:], vector[a.offset : a.offset + a.numel].view(rank, -1)[kept:]


def _importance(model: FlatModel, kept: int) -> float:
    """What `tail_term` adds to the loss at strength 1, in float64."""
    tails = _tails(model.layout, model.weights.detach().double(), kept)
    return math.fsum(float(torch.linalg.vector_norm(b) * torch.linalg.vector_norm(a)) for b, a in tails)


def _prune(model: FlatModel, rank: int) -> None:
    for tail in _tails(model.layout, model.weights.detach(), rank):
        for half in tail:
            half.zero_()


def _size(values: Parameters) -> float:
    """The Frobenius norm of all products together."""
    return math.hypot(*(norm([pair.of(values)]) for pair in pairs(values.layout)))
