"""Where the randomness comes from on which a privacy guarantee rests.

In a simulation it is derived from the seed, as all else is, so that a run can be repeated. Whoever knows the seed can
take such noise away again: where a guarantee is meant, it has to come from the operating system of the party that is
protected.
"""

from typing import Protocol

import torch
from torch import Tensor

from fedelta.core.seeds import Part, generator


class Noise(Protocol):
    """A source of independent draws; every call goes on where the last one ended."""

    def add_normal(self, values: Tensor, std: float) -> None:
        """Add N(0, std^2) to each element of `values` (float32 or float64, on the CPU), in place."""
        ...

    def chosen(self, n: int, rate: float) -> Tensor:
        """Those of 0..n-1, in order (int64), that are drawn when each is with probability `rate`, independently."""
        ...


class SeededNoise:
    """A function of (seed, path): for simulations."""

    def __init__(self, seed: int, *path: Part) -> None:
        self._generator = generator(seed, *path)

    def add_normal(self, values: Tensor, std: float) -> None:
        values.add_(torch.randn(values.shape, generator=self._generator, dtype=values.dtype), alpha=std)

    def chosen(self, n: int, rate: float) -> Tensor:
        draws = torch.rand(n, generator=self._generator, dtype=torch.float64)
        return (draws < rate).nonzero().squeeze(1)
