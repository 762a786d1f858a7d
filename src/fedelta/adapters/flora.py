"""FLoRA (Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024, section 3).

In every round each site draws new factors, of its own rank. The coordinator stacks what comes back: the product of the
stacks is the weighted sum of the products, with no error. It is merged into the base, which so moves by more than any
site's rank, and every site merges it too.

The paper's noiseless aggregation, equation 5; the shares are those of the examples. The download grows with the sum of
the cohort's ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from fedelta.adapters.factors import Tiers, check_new, scaled
from fedelta.adapters.moving import Moving, catch_up_each, fixed, merged, movable, weights_at, without_base
from fedelta.aggregation.factors import Product, half, stacked
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.products import WHOLE, aggregated
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, trained
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Sight, Site
from fedelta.core.seeds import seeded
from fedelta.learning.adapted import redraw
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Factors whose product is the weighted mean of products: [p_1 B_1 ... p_k B_k] and [A_1; ...; A_k]."""

    needs: ClassVar[Sight] = Sight.EACH

    mean: Mean = WHOLE  # of all that is no factor

    def refuse(self, update: Update) -> str | None:
        return self.mean.refuse(update)

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        return aggregated(updates, cohort, self._layer, self.mean)

    def _layer(self, shares: Sequence[float], products: Sequence[Product]) -> dict[str, Product]:
        return {"": stacked([(share * b, a) for share, (b, a) in zip(shares, products, strict=True)])}


@dataclass(frozen=True, kw_only=True)
class FLoRA:
    """`task` has a model that is tuned by LoRA, with the largest rank; `ranks` as in FlexLoRA."""

    kind: ClassVar[Kind] = "value"
    rule: ClassVar[Rule] = Stacked()
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = False

    task: Task
    training: Training
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", movable(self.task))
        _ = self._tiers  # checked here, and not in the first round

    @cached_property
    def _tiers(self) -> Tiers:
        return Tiers(fixed(self.task), self.ranks)

    def init(self, parameters: Parameters) -> Moving:
        check_new("FLoRA", parameters)
        return Moving(parameters=parameters)

    def parameters(self, state: Moving) -> Parameters:
        return state.parameters

    def broadcast(self, state: Moving, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        rest = state.parameters.part(self._rest(state.parameters.layout))
        return {"rest": rest.vector}, catch_up_each(state, to, self._tiers.layers)

    def layout(self, state: Moving, party: PartyId) -> Layout:
        return self._tiers.layout(without_base(state.parameters.layout, self._tiers.layers), party)

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        return self._received(incoming, site, examples)[:2]

    def local(self, incoming: Incoming, site: Site) -> Update:
        data = site.data().train
        model, rows, weights = self._received(incoming, site, data)
        sums = trained(model, rows, self.task, self.training, incoming)
        site.memory.commit(incoming.base, incoming.round, weights)
        values = scaled(model.read(), self._tiers.layers)
        return Update(values=values, kind="value", weight=float(len(data)), sums=sums)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("FLoRA trains its sites one by one")

    def step(self, state: Moving, total: Update, round: int) -> Moving:
        factors = total.values.part(total.values.layout.only(lambda name: half(name) is not None))
        rest = total.values.part(total.values.layout.only(lambda name: half(name) is None))
        return merged(state, state.parameters.with_part(rest), factors, round, self._tiers.layers)

    def _received(
        self, incoming: Incoming, site: Site, examples: Examples
    ) -> tuple[FlatModel, Examples, dict[str, Tensor]]:
        task = self._tiers.tasks[self._tiers.rank(site.id)]
        task.check(examples)
        model, rows = task.flat_on(examples, incoming.seed, incoming.plan)
        weights = weights_at(model, incoming.tensors, site, incoming.base, self._tiers.layers)
        rest = Parameters(self._rest(model.layout), incoming.tensors["rest"])
        model.load(Parameters.zeros(model.layout).with_part(rest))
        with seeded(incoming.local_seed, "factors"):
            redraw(model.module)
        return model, rows, weights

    def _rest(self, layout: Layout) -> Layout:
        """What is averaged: the head, and all else that is neither a factor nor beneath one."""
        return without_base(layout, self._tiers.layers).only(lambda name: half(name) is None)
