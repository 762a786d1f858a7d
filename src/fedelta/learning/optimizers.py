"""Local optimisers and learning-rate schedules over rounds, as values.

The steps are written out here, over any list of tensors, rather than taken from `torch.optim`: the same code then moves
one site's flat vector or a cohort's [sites, ...] in one kernel an operation, with a learning rate for each site.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedelta.core.errors import BadInput

Rate = float | Tensor  # one for all, or [sites] for tensors of shape [sites, ...]
Step = Callable[[Sequence[Tensor], Sequence[Tensor], Rate], None]


class Optimizer(Protocol):
    @property
    def lr(self) -> float: ...

    def make(self, weights: Sequence[Tensor]) -> Step:
        """A fresh `step(weights, gradients, lr)`, which changes these weights in place and may overwrite the gradients.

        A later call may be for the first rows of each tensor only (sites that have more steps to do than the others):
        once a row is left out it stays out.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent, as in PyTorch; its momentum starts anew in every round."""

    lr: float  # > 0
    momentum: float = 0.0  # in [0, 1)
    weight_decay: float = 0.0  # >= 0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check("SGD", self.lr, self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise BadInput(f"SGD.momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and not self.momentum:
            raise BadInput("SGD.nesterov needs momentum > 0")

    def make(self, weights: Sequence[Tensor]) -> Step:
        kept = [torch.zeros_like(w) if self.momentum else None for w in weights]

        def step(weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: Rate) -> None:
            for weight, gradient, velocity in zip(weights, gradients, kept, strict=True):
                if self.weight_decay:
                    gradient.add_(weight, alpha=self.weight_decay)
                if velocity is not None:
                    velocity = velocity[: len(weight)].mul_(self.momentum).add_(gradient)
                    gradient = gradient.add_(velocity, alpha=self.momentum) if self.nesterov else velocity
                _move(weight, gradient, lr)

        return step


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Loshchilov & Hutter, ICLR 2019. Its moments start anew in every round, as in FedAvg with a stateless client."""

    lr: float  # > 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _check("AdamW", self.lr, self.weight_decay)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"AdamW.betas must be in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise BadInput(f"AdamW.eps must be > 0, got {self.eps}")

    def make(self, weights: Sequence[Tensor]) -> Step:
        kept = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
        done = 0

        def step(weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: Rate) -> None:
            nonlocal done
            done += 1
            unbias, unbias_square = 1 - self.betas[0] ** done, 1 - self.betas[1] ** done
            for weight, gradient, (mean, square) in zip(weights, gradients, kept, strict=True):
                if self.weight_decay:
                    weight.mul_(1 - (_by_site(lr, weight) if isinstance(lr, Tensor) else lr) * self.weight_decay)
                mean = mean[: len(weight)].lerp_(gradient, 1 - self.betas[0])
                square = square[: len(weight)].mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
                root = torch.sqrt(square, out=gradient).div_(math.sqrt(unbias_square)).add_(self.eps)
                _move(weight, torch.div(mean, root, out=root), lr, 1 / unbias)

        return step


def _move(weight: Tensor, direction: Tensor, lr: Rate, factor: float = 1.0) -> None:
    """weight -= lr * factor * direction"""
    if isinstance(lr, Tensor):
        weight.addcmul_(_by_site(lr, weight), direction, value=-factor)
    else:
        weight.add_(direction, alpha=-lr * factor)


def _by_site(lr: Tensor, weight: Tensor) -> Tensor:
    """The rate of each site, so that it multiplies that site's row of `weight`."""
    return lr[: len(weight)].view(-1, *[1] * (weight.ndim - 1))


def _check(name: str, lr: float, weight_decay: float) -> None:
    if not (lr > 0 and math.isfinite(lr)):
        raise BadInput(f"{name}.lr must be a finite number > 0, got {lr}")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise BadInput(f"{name}.weight_decay must be a finite number >= 0, got {weight_decay}")


class Schedule(Protocol):
    def factor(self, round: int) -> float:
        """What the learning rate is multiplied by in `round`, counted from 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    def factor(self, round: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From 1 in round 1 along half a cosine to `floor` after round `rounds` (Loshchilov & Hutter, ICLR 2017)."""

    rounds: int  # >= 1
    floor: float = 0.0  # in [0, 1]

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 <= self.floor <= 1:
            raise BadInput(f"Cosine needs rounds >= 1 and a floor in [0, 1], got {self.rounds} and {self.floor}")

    def factor(self, round: int) -> float:
        done = min(1.0, (round - 1) / self.rounds)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """`decay ** (round - 1)`."""

    decay: float  # in (0, 1]

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise BadInput(f"Exponential.decay must be in (0, 1], got {self.decay}")

    def factor(self, round: int) -> float:
        return self.decay ** (round - 1)
