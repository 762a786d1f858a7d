"""A task: a model and what it is trained for."""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.seeds import seeded
from fedelta.learning.flat import FlatModel
from fedelta.learning.objectives import Objective


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """`model` builds the module, with `requires_grad` set on what is trained and shared.

    It must build the same module whenever PyTorch's global generators are seeded alike: what is frozen does not travel.
    """

    model: Callable[[], nn.Module]
    objective: Objective

    def build(self, seed: int) -> nn.Module:
        """A new module, its random weights drawn for `seed`."""
        with seeded(seed, "model"):
            return self.model()

    def flat(self, seed: int, device: torch.device | str = "cpu", *, channels_last: bool = False) -> FlatModel:
        """This process's working copy of the model: built once, and overwritten by whoever loads into it."""
        copies = _working_copies.setdefault(self, {})
        key = (seed, str(device), channels_last)
        if key not in copies:
            copies.clear()  # a sweep over seeds keeps one model, not all
            copies[key] = FlatModel(self.build(seed), device, channels_last=channels_last)
        return copies[key]

    def check(self, examples: Examples) -> None:
        """Raise BadInput if these examples cannot be learned."""
        for name, tensor in examples.inputs.items():
            if tensor.dtype == torch.float64:
                raise BadInput(
                    f"input {name!r} is float64, and models are trained in float32; convert it with .float()"
                )
        self.objective.check(examples.targets)


_working_copies: WeakKeyDictionary[Task, dict[tuple[int, str, bool], FlatModel]] = WeakKeyDictionary()
