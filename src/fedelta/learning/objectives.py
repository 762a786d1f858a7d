"""Objectives: what a model is trained for, and how well it does.

An objective turns model outputs and targets into a loss, and into sums over examples that can be added over batches and
sites before they become metrics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fedelta.core.errors import BadInput


class Objective(Protocol):
    @property
    def sums(self) -> tuple[str, ...]:
        """The names of what `measure` gives."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what `summarise` gives."""
        ...

    def check(self, targets: Tensor) -> None:
        """Raise BadInput if these targets cannot be learned."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over a batch: a scalar."""
        ...

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sums over the batch, as float64 scalars; always "examples" and "loss"."""
        ...

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics from added sums; empty if there were no examples."""
        ...


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Cross-entropy over `classes`; outputs are logits [n, classes], targets class indices [n]. Reports accuracy."""

    sums: ClassVar[tuple[str, ...]] = ("examples", "loss", "correct")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise BadInput(f"Classification.classes must be >= 2, got {self.classes}")

    def check(self, targets: Tensor) -> None:
        if targets.dtype != torch.int64 or targets.ndim != 1:
            got = f"{targets.dtype} of shape {list(targets.shape)}"
            raise BadInput(f"class labels are int64 of shape [n], got {got}; convert them with .long()")
        if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < self.classes):
            wrong = targets[(targets < 0) | (targets >= self.classes)][0]
            raise BadInput(f"label {int(wrong)} is outside the classes 0..{self.classes - 1}")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim != 2 or outputs.shape[1] != self.classes:
            shape = list(outputs.shape)
            raise BadInput(
                f"the model gives outputs of shape {shape} for {self.classes} classes, not [n, {self.classes}]"
            )
        return functional.cross_entropy(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        outputs = outputs.detach().float()
        return {
            "examples": torch.tensor(float(len(targets)), dtype=torch.float64),
            "loss": functional.cross_entropy(outputs, targets, reduction="sum").double(),
            "correct": (outputs.argmax(dim=-1) == targets).sum().double(),
        }

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        n = sums.get("examples", 0.0)
        return {"loss": sums["loss"] / n, "accuracy": sums["correct"] / n} if n else {}


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Mean squared error; outputs [n] or [n, k] (a trailing dimension of 1 may be missing in either), targets alike.

    Reports the loss (mean squared error over examples and dimensions) and the mean absolute error.
    """

    sums: ClassVar[tuple[str, ...]] = ("examples", "loss", "absolute")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "mae")

    def check(self, targets: Tensor) -> None:
        if not targets.is_floating_point() or not bool(torch.isfinite(targets).all()):
            raise BadInput("regression targets are finite floating-point numbers")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets = _matrix(outputs), _matrix(targets)
        if outputs.shape != targets.shape:
            raise BadInput(
                f"the model gives {outputs.shape[1]} numbers an example, and a target has {targets.shape[1]}"
            )
        return functional.mse_loss(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        error = (_matrix(outputs).detach() - _matrix(targets)).double()
        return {
            "examples": torch.tensor(float(len(targets)), dtype=torch.float64),
            "loss": error.square().mean(dim=1).sum(),
            "absolute": error.abs().mean(dim=1).sum(),
        }

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        n = sums.get("examples", 0.0)
        return {"loss": sums["loss"] / n, "mae": sums["absolute"] / n} if n else {}


def _matrix(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
