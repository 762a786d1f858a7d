"""FedOpt (Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithms 1 and 2).

The sites' mean difference is a pseudo-gradient that an optimiser at the coordinator applies: FedAvgM (Hsu et al.,
2019), FedAdagrad, FedYogi, FedAdam. As in Algorithm 2 there is no bias correction, and the second moment starts at
tau**2.

Buffers (BatchNorm's statistics) are averaged plainly: an adaptive step would drive a running variance negative.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Algorithm, Incoming, IncomingMany
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training

Moments = tuple[Tensor, ...]


class ServerOptimizer(Protocol):
    def init(self, size: int) -> Moments:
        """The moments before the first round, each [size]."""
        ...

    def step(self, moments: Moments, delta: Tensor) -> tuple[Moments, Tensor]:
        """New moments, and what is added to the model, given the mean difference `delta` [size]."""
        ...


@dataclass(frozen=True, kw_only=True)
class FedAvgM:
    """Server momentum: v = momentum * v + delta; x = x + lr * v (Hsu et al., 2019, section 4.3)."""

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check("FedAvgM", self.lr, momentum=self.momentum)

    def init(self, size: int) -> Moments:
        return (torch.zeros(size),)

    def step(self, moments: Moments, delta: Tensor) -> tuple[Moments, Tensor]:
        velocity = self.momentum * moments[0] + delta
        return (velocity,), self.lr * velocity


@dataclass(frozen=True, kw_only=True)
class FedAdagrad:
    """v = v + delta**2; x = x + lr * m / (sqrt(v) + tau), m with decay beta1 (0 in the paper's experiments)."""

    lr: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check("FedAdagrad", self.lr, self.tau, beta1=self.beta1)

    def init(self, size: int) -> Moments:
        return _adaptive_init(size, self.tau)

    def step(self, moments: Moments, delta: Tensor) -> tuple[Moments, Tensor]:
        mean, second = moments
        return _adaptive_step(_decayed(mean, delta, self.beta1), second + delta.square(), self.lr, self.tau)


@dataclass(frozen=True, kw_only=True)
class FedAdam:
    """v = beta2 * v + (1 - beta2) * delta**2; x = x + lr * m / (sqrt(v) + tau)."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check("FedAdam", self.lr, self.tau, beta1=self.beta1, beta2=self.beta2)

    def init(self, size: int) -> Moments:
        return _adaptive_init(size, self.tau)

    def step(self, moments: Moments, delta: Tensor) -> tuple[Moments, Tensor]:
        mean, second = moments
        second = self.beta2 * second + (1 - self.beta2) * delta.square()
        return _adaptive_step(_decayed(mean, delta, self.beta1), second, self.lr, self.tau)


@dataclass(frozen=True, kw_only=True)
class FedYogi:
    """v = v - (1 - beta2) * delta**2 * sign(v - delta**2); x = x + lr * m / (sqrt(v) + tau)."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check("FedYogi", self.lr, self.tau, beta1=self.beta1, beta2=self.beta2)

    def init(self, size: int) -> Moments:
        return _adaptive_init(size, self.tau)

    def step(self, moments: Moments, delta: Tensor) -> tuple[Moments, Tensor]:
        mean, second = moments
        square = delta.square()
        second = second - (1 - self.beta2) * square * torch.sign(second - square)
        return _adaptive_step(_decayed(mean, delta, self.beta1), second, self.lr, self.tau)


@dataclass(frozen=True, kw_only=True)
class FedOptState:
    parameters: Parameters
    moments: Moments


@dataclass(frozen=True, kw_only=True)
class FedOpt:
    """`client` (FedAvg, FedProx, …) at the sites, `server` at the coordinator."""

    client: Algorithm[Parameters]
    server: ServerOptimizer

    def __post_init__(self) -> None:
        if self.client.kind != "difference":
            raise BadInput(
                f"a server optimiser follows differences, and {type(self.client).__name__} sends values; use FedAvg or "
                "FedProx as the client"
            )

    @property
    def task(self) -> Task:
        return self.client.task

    @property
    def training(self) -> Training:
        return self.client.training

    @property
    def kind(self) -> Kind:
        return self.client.kind

    @property
    def rule(self) -> Rule:
        return self.client.rule

    @property
    def at_once(self) -> bool:
        return self.client.at_once

    @property
    def personal(self) -> bool:
        return self.client.personal

    @property
    def by_gradient(self) -> bool:
        return self.client.by_gradient

    @property
    def steady(self) -> bool:
        return self.client.steady

    def init(self, parameters: Parameters) -> FedOptState:
        if not isinstance(self.client.init(parameters), Parameters):
            raise BadInput(
                f"a server optimiser moves a model, and {type(self.client).__name__} keeps more than that; use FedAvg "
                "or FedProx as the client"
            )
        return FedOptState(parameters=parameters, moments=self.server.init(parameters.layout.trained))

    def parameters(self, state: FedOptState) -> Parameters:
        return state.parameters

    def broadcast(self, state: FedOptState, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        return self.client.broadcast(state.parameters, to)

    def layout(self, state: FedOptState, party: PartyId) -> Layout:
        return self.client.layout(state.parameters, party)

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        return self.client.received(incoming, site, examples)

    def local(self, incoming: Incoming, site: Site) -> Update:
        return self.client.local(incoming, site)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        return self.client.local_many(incoming, sites)

    def step(self, state: FedOptState, total: Update, round: int) -> FedOptState:
        averaged = self.client.step(state.parameters, total, round)
        moments, increment = self.server.step(state.moments, averaged.trained - state.parameters.trained)
        averaged.trained.copy_(state.parameters.trained + increment)
        return FedOptState(parameters=averaged, moments=moments)


def _adaptive_init(size: int, tau: float) -> Moments:
    return torch.zeros(size), torch.full((size,), tau**2)


def _decayed(mean: Tensor, delta: Tensor, beta1: float) -> Tensor:
    return beta1 * mean + (1 - beta1) * delta


def _adaptive_step(mean: Tensor, second: Tensor, lr: float, tau: float) -> tuple[Moments, Tensor]:
    return (mean, second), lr * mean / (second.sqrt() + tau)


def _check(name: str, lr: float, tau: float = 1.0, **decays: float) -> None:
    if not 0 < lr < float("inf"):
        raise BadInput(f"{name}.lr must be a finite number > 0, got {lr}")
    if not 0 < tau < float("inf"):
        raise BadInput(f"{name}.tau must be a finite number > 0, got {tau}")
    for decay, value in decays.items():
        if not 0 <= value < 1:
            raise BadInput(f"{name}.{decay} must be in [0, 1), got {value}")
