"""FedBPT (Sun et al., "FedBPT: Efficient Federated Black-box Prompt Tuning for Large Language Models", ICML 2024,
arXiv 2310.01467, section 4): sites that can only run inference search for a prompt, with no gradient anywhere.

The prompt is p0 + A z: p0 the embeddings that it starts as, A a random matrix that is never changed, z a few hundred
numbers. Every site goes on with the coordinator's search distribution over z, by CMA-ES on its own loss, and sends the
mean at which it ends, the steps it took and its loss there. The coordinator takes these means for solutions that it
drew itself: it ranks them by their losses, corrects its step (equation 6), and makes one generation of its own CMA-ES.
Against overfitting under label skew a site minimises its loss divided by that of the same texts with a share of their
tokens replaced by random ones, whose labels nobody should be able to tell (equation 7).

What differs, or is from the authors' program (NVFlare, research/fed-bpt) where the paper's section 4 does not say:
- the ratio of equation 7 is that of the mean losses, as in their program, and not the mean of each text's, whose
  denominator may be 0; the loss that is sent is this ratio;
- the step of the next broadcast is the last one times what the coordinator's generation made of the corrected one;
- means further away than the distribution draws are shortened, which their library for CMA-ES does (see `cma_es.py`);
- their program gives all sites a share of the mean; here the better half has one, as equation 6 presumes;
- A is drawn by every party from a seed, and does not travel. Its scale is as in their program, from the spread of the
  embeddings, but of those that the prompt starts as, not of all in the vocabulary.

What is trained besides a prompt (a classifier's head) stays as it is: start from a model that has a pre-trained one, or
give the federation `start`, which solves it in closed form and needs inference alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedelta.adapters.cma_es import Search
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany
from fedelta.core.errors import BadInput, TooFewSites, TrainingFailed
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Sight, Site
from fedelta.core.seeds import generator
from fedelta.learning.flat import FlatModel
from fedelta.learning.optimizers import SGD
from fedelta.learning.task import Task
from fedelta.learning.training import Training, evaluate

_PROMPT = "prompt_encoder.default.embedding.weight"  # as peft calls it


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """The results of all sites, each a row: what a search at the coordinator compares."""

    needs: ClassVar[Sight] = Sight.EACH

    def refuse(self, update: Update) -> str | None:
        finite = bool(torch.isfinite(update.values.vector).all()) and bool((update.values["steps"] > 0).all())
        return None if finite else "its result is no search: a number is not finite, or a step not above 0"

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        arrived = list(updates)
        if len(arrived) < 2:
            raise TooFewSites(
                f"{len(arrived)} of {cohort} sites answered, and a search compares two or more; set min_sites=2"
            )
        rows = {name: torch.stack([update.values[name] for update in arrived]) for name in arrived[0].values}
        names = arrived[0].sums
        return Update(
            values=Parameters(Layout.of(rows), torch.cat([row.flatten() for row in rows.values()])),
            kind="value",
            weight=math.fsum(update.weight for update in arrived),
            sums={name: math.fsum(update.sums[name] for update in arrived) for name in names},
            count=sum(update.count for update in arrived),
        )


@dataclass(frozen=True, kw_only=True)
class FedBPTState:
    parameters: Parameters  # as they are where z is 0
    search: Search


@dataclass(frozen=True, kw_only=True)
class FedBPT:
    """`task` has a model with a prompt (`Prompt()` as its tuning). The defaults are those of the paper, section 5.1.

    A federation needs `min_sites=2` at least. A round costs every site `iterations * population + 1` passes over its
    examples, twice that where tokens are replaced. It gets `dimension**2` numbers in float64 and the prompt that the
    search starts from, and answers with `dimension + iterations + 1` numbers in float32.
    """

    kind: ClassVar[Kind] = "value"
    rule: ClassVar[Rule] = SideBySide()
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = False
    steady: ClassVar[bool] = True

    task: Task
    dimension: int = 500  # of z
    sigma: float = 1.0  # first step of the search: the standard deviation of a number in z
    iterations: int = 8  # generations at a site in a round
    population: int = 5  # solutions in one of them
    replaced: float = 0.5  # share of the tokens that are replaced; 0: plain losses are minimised
    scale: float = 1.0  # of A: with 1, a first draw adds to the prompt about as much as is there
    seed: int = 0  # of A

    def __post_init__(self) -> None:
        for name, least in (("dimension", 1), ("iterations", 1), ("population", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"FedBPT.{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("sigma", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"FedBPT.{name} must be a finite number > 0, got {getattr(self, name)}")
        if not 0 <= self.replaced < 1:
            raise BadInput(f"FedBPT.replaced must be in [0, 1), got {self.replaced}")

    @property
    def training(self) -> Training:
        """No step of it is ever taken: a forecast reads from it how often a site passes over its examples."""
        return Training(optimizer=SGD(lr=1.0), batch=256, epochs=self.iterations * self.population)

    def init(self, parameters: Parameters) -> FedBPTState:
        _prompt(parameters.layout)
        n = self.dimension
        start = Search.at(torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64), self.sigma)
        return FedBPTState(parameters=parameters, search=start)

    def parameters(self, state: FedBPTState) -> Parameters:
        return self._prompted(state.parameters, state.search.mean)

    def broadcast(self, state: FedBPTState, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        search = state.search
        step = torch.tensor(search.step, dtype=torch.float64)
        found = {"mean": search.mean, "covariance": search.covariance, "step": step}
        return {"parameters": state.parameters.vector, **found}, {}

    def layout(self, state: FedBPTState, party: PartyId) -> Layout:
        return self._answer

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        self.task.check(examples)
        model = self.task.flat(incoming.seed, incoming.plan)
        model.load(self._prompted(Parameters(model.layout, incoming.tensors["parameters"]), incoming.tensors["mean"]))
        return model, examples

    @torch.no_grad()
    def local(self, incoming: Incoming, site: Site) -> Update:
        data = site.data().train
        self.task.check(data)
        if not len(data):
            raise BadInput("this site has no training examples")
        tensors, seed = incoming.tensors, incoming.local_seed
        model = self.task.flat(incoming.seed, incoming.plan)
        start = Parameters(model.layout, tensors["parameters"])
        confused = _confused(data, self.replaced, model.module, generator(seed, "replaced")) if self.replaced else None

        def measured(z: Tensor) -> tuple[float, dict[str, float]]:
            model.load(self._prompted(start, z))
            sums = evaluate(model, data, self.task.objective, incoming.plan)
            if confused is None:
                return _mean_loss(sums), sums
            untold = _mean_loss(evaluate(model, confused, self.task.objective, incoming.plan))
            return _mean_loss(sums) / untold if untold else math.inf, sums

        search = Search.at(tensors["mean"], tensors["covariance"], float(tensors["step"]))
        draws, steps = generator(seed, "solutions"), []
        for _ in range(self.iterations):
            steps.append(search.step)
            solutions = search.drawn(self.population, draws)
            losses = torch.tensor([measured(z)[0] for z in solutions], dtype=torch.float64)
            search = search.after(solutions, losses.nan_to_num(nan=math.inf))
        loss, sums = measured(search.mean)
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss of its prompt became {loss}; lower FedBPT.sigma or FedBPT.scale")
        found = torch.cat([search.mean, torch.tensor([*steps, loss], dtype=torch.float64)])
        return Update(values=Parameters(self._answer, found.float()), kind="value", weight=float(len(data)), sums=sums)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("FedBPT has its sites search one by one")

    def step(self, state: FedBPTState, total: Update, round: int) -> FedBPTState:
        """One generation of the coordinator's CMA-ES, whose solutions are the means of the sites."""
        losses, steps = total.values["loss"].flatten(), total.values["steps"].double()
        best = losses.argsort(stable=True)[: len(losses) // 2]
        corrected = 2 * math.sqrt(float(steps[best].square().sum()) / (len(losses) * self.population))  # equation 6
        search = replace(state.search, step=corrected).after(total.values["mean"], losses, clip=True)
        return replace(state, search=replace(search, step=state.search.step * search.step / corrected))

    @property
    def _answer(self) -> Layout:
        sizes = {"mean": self.dimension, "steps": self.iterations, "loss": 1}
        return Layout.of({name: torch.empty(size) for name, size in sizes.items()})

    def _prompted(self, start: Parameters, z: Tensor) -> Parameters:
        """`start` with the prompt at `z`."""
        name = _prompt(start.layout)
        spread = float(start[name].std())
        if not spread > 0:
            raise BadInput("the prompt starts as one number everywhere, which gives the search no scale; draw it anew")
        matrix = _matrix(start[name].numel(), self.dimension, self.seed)
        change = (matrix @ z.float()).view(start[name].shape)
        moved = start.like(start.vector.clone())
        moved[name].add_(change, alpha=self.scale * spread / (math.sqrt(self.dimension) * self.sigma))
        return moved


def _prompt(layout: Layout) -> str:
    names = [entry.name for entry in layout.entries if entry.name.endswith(_PROMPT)]
    if len(names) != 1:
        raise BadInput("FedBPT searches for a prompt, and its model has none; give it one by tuning=Prompt()")
    return names[0]


def _mean_loss(sums: Mapping[str, float]) -> float:
    return sums["loss"] / sums["examples"] if sums["examples"] else math.nan


def _confused(data: Examples, share: float, module: nn.Module, draws: torch.Generator) -> Examples:
    """The same texts with about `share` of their tokens replaced by random ones of the vocabulary."""
    ids = data.inputs.get("input_ids")
    if ids is None:
        raise BadInput(f"only tokens can be replaced, and these examples have {sorted(data.inputs)}; use replaced=0")
    mask = data.inputs.get("attention_mask", torch.ones_like(ids))
    chosen = (torch.rand(ids.shape, generator=draws) < share) & mask.bool()
    words = torch.randint(0, _vocabulary(module), ids.shape, generator=draws)
    return Examples({**data.inputs, "input_ids": torch.where(chosen, words.to(ids.dtype), ids)}, data.targets)


def _vocabulary(module: nn.Module) -> int:
    config: Any = next(part.config for part in module.modules() if hasattr(part, "config"))  # peft needs one as well
    return int(config.get_text_config().vocab_size)


@lru_cache(maxsize=1)
def _matrix(size: int, dimension: int, seed: int) -> Tensor:
    """A without its scale, float32 [size, dimension]: standard normal numbers."""
    return torch.randn(size, dimension, generator=generator(seed, "projection"))
