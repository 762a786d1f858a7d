"""A task: a model and what it is trained for."""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.seeds import seeded
from fedelta.learning.cohort import CohortModel
from fedelta.learning.flat import FlatModel
from fedelta.learning.objectives import Objective
from fedelta.learning.plan import Plan


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

    def flat(self, seed: int, plan: Plan) -> FlatModel:
        """This process's working copy of the model: built once, and overwritten by whoever loads into it."""
        copies = _working_copies.setdefault(self, {})
        key = (seed, plan.device, bool(plan.channels_last))
        if key not in copies:
            copies.clear()  # a sweep over seeds keeps one model, not all
            copies[key] = FlatModel(self.build(seed), plan.device, channels_last=bool(plan.channels_last))
        return copies[key]

    def cohort(self, seed: int, plan: Plan) -> CohortModel:
        """As `flat`, for many sites at once. Raises BadInput if they have to be trained one by one."""
        models = _cohort_models.setdefault(self, {})
        key = (seed, plan.device)
        if key not in models:
            models.clear()
            models[key] = CohortModel(self.build(seed), plan.device)
        return models[key]

    def check(self, examples: Examples) -> tuple[object, ...]:
        """The form of these examples; raises BadInput if they cannot be learned. The same object is checked once."""
        checked = _checked.setdefault(self, WeakKeyDictionary())
        form = checked.get(examples)
        if form is not None:
            return form
        for name, tensor in examples.inputs.items():
            if tensor.dtype == torch.float64:
                raise BadInput(
                    f"input {name!r} is float64, and models are trained in float32; convert it with .float()"
                )
        self.objective.check(examples.targets)
        return checked.setdefault(examples, examples.form)


_working_copies: WeakKeyDictionary[Task, dict[tuple[int, str, bool], FlatModel]] = WeakKeyDictionary()
_cohort_models: WeakKeyDictionary[Task, dict[tuple[int, str], CohortModel]] = WeakKeyDictionary()
_checked: WeakKeyDictionary[Task, WeakKeyDictionary[Examples, tuple[object, ...]]] = WeakKeyDictionary()
