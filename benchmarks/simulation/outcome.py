"""What a contestant is asked for, and what it gives back."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.simulation.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Settings:
    device: str  # "cpu" or "cuda"
    cores: int  # that a contestant may keep busy


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run from a fresh model: `ends[i]` are the seconds from its start to the end of round i + 1."""

    ends: list[float]
    model: Tensor  # the trained values after the last round, as one vector in the order of the module
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds that the contestant itself tells


@dataclass(frozen=True, kw_only=True)
class Contestant:
    packages: tuple[str, ...]  # distributions whose versions matter
    run: Callable[[Workload, int, Settings], Outcome]  # a workload for a number of rounds


class Clock:
    """Seconds since it was made; waits for the device before it reads the time."""

    def __init__(self, device: str) -> None:
        self._cuda = device != "cpu"
        self._start = self._now()
        self.ends: list[float] = []

    def mark(self, *_: Any) -> None:
        """A round has ended."""
        self.ends.append(self._now() - self._start)

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
