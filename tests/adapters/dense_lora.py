"""A small network that is tuned by LoRA, its data, and slow references in dense float64 matrices.

The reference network has for each adapted layer its whole weight and its factors, and is trained by gradient descent on
all rows at once, so that the order of the rows does not matter. It knows nothing of peft, of layouts and of rules.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fedelta.aggregation.factors import Product
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.sampling import Fixed
from fedelta.algorithms.state import FederationState
from fedelta.core.examples import Examples
from fedelta.core.messages import Update
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Report, SiteData, run
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.lora import LoRA
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.task import Task
from fedelta.learning.training import Training

LR, STEPS, ALPHA = 0.3, 3, 6.0
NAMES = ("phone-1", "phone-2", "server-3", "server-4")
LAYERS = ("0", "2")
HEAD = ("4.weight", "4.bias")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Build:
    """6 inputs, two adapted layers of `width`, 3 classes."""

    rank: int = 4
    width: int = 10
    rslora: bool = False

    def __call__(self) -> nn.Module:
        width = self.width
        net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
        return LoRA(rank=self.rank, alpha=ALPHA, rslora=self.rslora, targets=LAYERS).apply(net)


def task(rank: int = 4, width: int = 10, rslora: bool = False) -> Task:
    return Task(model=Build(rank, width, rslora), objective=Classification(classes=3))


def training() -> Training:
    return Training(optimizer=SGD(lr=LR), batch=1000, epochs=STEPS)


def data(name: str) -> SiteData:
    """Sites of 20 to 35 rows, whose classes are drawn alike and inputs are not; 8 more are held back."""
    number = int(name[-1])
    g = torch.Generator().manual_seed(number)
    x = torch.randn(23 + 5 * number, 6, generator=g) + 0.2 * number
    y = (x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(99))).argmax(1)
    return SiteData(train=Examples({"x": x[8:]}, y[8:]), validation=Examples({"x": x[:8]}, y[:8]))


def federation(algorithm: Any, *, rounds: int = 4, of: int = 3, **options: Any) -> Federation[Any]:
    """Three of the four sites a round; everyone evaluates what it has."""
    return Federation(algorithm=algorithm, rounds=rounds, sampling=Fixed(size=of), validate_at_sites=True, **options)


def history(program: Federation[Any], spill: Path | None = None) -> list[tuple[FederationState[Any], Report]]:
    found = list(run(program, Local(program, data, NAMES, spill=spill)))
    assert all(not report.absent and not report.unmeasured for _, report in found)
    return found


def bits_in_workers(program: Federation[Any]) -> bool:
    """Whether processes give the bits that one process gives: of the model, and of what sites measure."""
    here = history(program)
    with Workers(program, data, NAMES, workers=2) as fleet:
        there = list(run(program, fleet))
    parameters = program.algorithm.parameters
    return all(
        torch.equal(parameters(one.algorithm).vector, parameters(other.algorithm).vector)
        and (first.metrics, first.per_site) == (second.metrics, second.per_site)
        and (first.bytes_up, first.bytes_down) == (second.bytes_up, second.bytes_down)
        for (one, first), (other, second) in zip(here, there, strict=True)
    )


# The dense reference.


@dataclass
class Dense:
    """Weights of the adapted layers, [out, in], and their factors, as `scale * B @ A`; and the head. All float64."""

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    head: dict[str, Tensor]
    scale: float = field(default=1.0)

    @classmethod
    def of(cls, module: nn.Module, scale: float) -> "Dense":
        own = {name.removeprefix(PREFIX): value.detach().double() for name, value in module.named_parameters()}
        return cls(
            weights={layer: own[f"{layer}.base_layer.weight"] for layer in LAYERS},
            biases={layer: own[f"{layer}.base_layer.bias"] for layer in LAYERS},
            a={layer: own[f"{layer}.lora_A.default.weight"] for layer in LAYERS},
            b={layer: own[f"{layer}.lora_B.default.weight"] for layer in LAYERS},
            head={name: own[name] for name in HEAD},
            scale=scale,
        )

    def copy(self) -> "Dense":
        fields = (self.weights, self.biases, self.a, self.b, self.head)
        return Dense(*({name: value.clone() for name, value in one.items()} for one in fields), scale=self.scale)

    def whole(self, layer: str) -> Tensor:
        """The weight with which the layer computes."""
        return self.weights[layer] + self.scale * self.b[layer] @ self.a[layer]

    def logits(self, x: Tensor) -> Tensor:
        for layer in LAYERS:
            x = torch.tanh(x @ self.whole(layer).T + self.biases[layer])
        return x @ self.head["4.weight"].T + self.head["4.bias"]

    def loss(self, examples: Examples) -> Tensor:
        return nn.functional.cross_entropy(self.logits(examples.inputs["x"].double()), examples.targets)

    def trained(self, examples: Examples, halves: str = "AB") -> "Dense":
        """A copy after the local steps of a site on these halves of the factors and the head."""
        own = self.copy()
        parts = [own.head, *([own.a] if "A" in halves else []), *([own.b] if "B" in halves else [])]
        places = [(part, name) for part in parts for name in part]
        for _ in range(STEPS):
            for part, name in places:
                part[name] = part[name].detach().requires_grad_()
            gradients = torch.autograd.grad(own.loss(examples), [part[name] for part, name in places])
            for (part, name), gradient in zip(places, gradients, strict=True):
                part[name] = part[name].detach() - LR * gradient
        return own

    def close_to(self, parameters: Parameters, *, factors: str = "AB", base: bool = False) -> bool:
        """Whether a state's model is this one, to 1e-5; of the factors, only the halves that are named."""
        expected = {f"{PREFIX}{name}": value for name, value in self.head.items()}
        for letter, half in (("A", self.a), ("B", self.b)):
            if letter in factors:
                expected |= {f"{PREFIX}{layer}.lora_{letter}.default.weight": value for layer, value in half.items()}
        if base:
            expected |= {f"{PREFIX}{layer}.base_layer.weight": value for layer, value in self.weights.items()}
        return all(torch.allclose(parameters[name].double(), value, atol=1e-5) for name, value in expected.items())


def start(algorithm: Any, seed: int = 0) -> Dense:
    """The reference of the model with which a run begins."""
    module = algorithm.task.build(seed)
    config = module.peft_config["default"]
    return Dense.of(module, ALPHA / (math.sqrt(config.r) if config.use_rslora else config.r))


def shares(cohort: Sequence[str]) -> dict[str, float]:
    """The share of each site in the examples of all."""
    rows = {name: len(data(name).train) for name in cohort}
    return {name: count / sum(rows.values()) for name, count in rows.items()}


def mean(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted mean of what each site has, name by name."""
    weights = shares(list(parts))
    names = next(iter(parts.values()))
    return {name: sum((weights[site] * part[name] for site, part in parts.items()), torch.zeros(())) for name in names}


def measured_alike(report: Report, model: Callable[[str], Dense]) -> bool:
    """Whether every site, also one that took no part, measured what it has to with this model."""
    assert set(report.per_site) == set(NAMES)
    return all(
        math.isclose(report.per_site[name]["validation_loss"], float(model(name).loss(held_back)), rel_tol=1e-5)
        for name in NAMES
        if (held_back := data(name).validation) is not None
    )


# Random factors for the rules.

A, B, BIAS = "net.lora_A.default.weight", "net.lora_B.default.weight", "net.bias"
# alpha / rank of each site is in its B, so that this is also a test of scales
SCALES = st.floats(0.1, 8.0)


@st.composite
def cohorts(draw: st.DrawFn, ranks: st.SearchStrategy[int] = st.integers(1, 5)) -> list[Update]:
    """One to six sites with factors of one layer, each of a rank of its own, and a bias."""
    out, inside = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    count = draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    found = []
    for rank in draw(st.lists(ranks, min_size=count, max_size=count)):
        tensors = {A: torch.empty(rank, inside), B: torch.empty(out, rank), BIAS: torch.empty(3)}
        values = Parameters(layout := Layout.of(tensors), torch.randn(layout.size, generator=g))
        values[B].mul_(draw(SCALES))
        found.append(Update(values=values, kind="value", weight=draw(st.floats(0.5, 500.0)), sums={"loss": 1.0}))
    return found


def exact(updates: Sequence[Update]) -> Tensor:
    """The weighted mean of the products, [out, in], float64."""
    weight = math.fsum(update.weight for update in updates)
    products = (update.weight / weight * update.values[B].double() @ update.values[A].double() for update in updates)
    return sum(products, torch.zeros((), dtype=torch.float64))


def product(found: Product) -> Tensor:
    b, a = found
    return b.double() @ a.double()


def near(found: Tensor, expected: Tensor, size: Tensor | None = None) -> bool:
    """Whether two matrices are equal to 1e-5 of the norm of `size`, or of the second."""
    reference = expected if size is None else size
    return bool((found - expected).norm() <= 1e-5 * reference.norm())


def mean_bias(updates: Sequence[Update]) -> Tensor:
    weight = math.fsum(update.weight for update in updates)
    return torch.stack([update.weight / weight * update.values[BIAS].double() for update in updates]).sum(0)
