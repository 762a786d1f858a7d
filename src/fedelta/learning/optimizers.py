"""Local optimisers and learning-rate schedules over rounds, as values. PyTorch does the mathematics."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fedelta.core.errors import BadInput


class Optimizer(Protocol):
    @property
    def lr(self) -> float: ...

    def make(self, weights: nn.Parameter, lr: float) -> torch.optim.Optimizer:
        """A fresh optimiser for `weights`, at `lr` instead of its own."""
        ...


@dataclass(frozen=True, kw_only=True)
class SGD:
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

    def make(self, weights: nn.Parameter, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [weights], lr=lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


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

    def make(self, weights: nn.Parameter, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([weights], lr=lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


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
