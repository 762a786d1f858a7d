"""A task: a model and what it is trained for."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.parameters import Parameters
from fedelta.core.seeds import seeded
from fedelta.learning.cohort import CohortModel
from fedelta.learning.cut import Cut
from fedelta.learning.flat import FlatModel
from fedelta.learning.objectives import Objective
from fedelta.learning.plan import Plan
from fedelta.learning.structure import is_hugging_face

# settings of transformers: the caches of Llama and the like, those of XLNet, and the SpecAugment of Wav2Vec2
_ASIDE = ("use_cache", "use_mems_eval", "apply_spec_augment")


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """`model` builds the module, with `requires_grad` set on what is trained and shared.

    It must build the same module whenever PyTorch's global generators are seeded alike: what is frozen does not travel.
    Where the head alone is trained (`Head`), it is trained on features that are computed once (see `cut.py`).
    """

    model: Callable[[], nn.Module]
    objective: Objective
    features: Path | None = field(default=None, metadata={"digest": False})  # folder that keeps features; None: memory
    cut: bool = field(default=True, metadata={"digest": False})  # False: the whole model computes in every step

    def build(self, seed: int) -> nn.Module:
        """A new module, its random weights drawn for `seed`."""
        with seeded(seed, "model"):
            return self.model()

    def initial(self, seed: int) -> Parameters:
        """What is trained of a new module. Not to be written into; the last one is kept in this process."""
        known = _initial.get(self)
        if known is None or known[0] != seed:
            known = _initial[self] = (seed, Parameters.of(self.build(seed)))
        return known[1]

    def flat(self, seed: int, plan: Plan) -> FlatModel:
        """This process's working copy of the model: built once, and overwritten by whoever loads into it."""
        copies = _working_copies.setdefault(self, {})
        key = (seed, plan.device, bool(plan.channels_last))
        if key not in copies:
            copies.clear()  # a sweep over seeds keeps one model, not all
            copies[key] = _flat(_bare(self.build(seed)), plan)
        return copies[key]

    def cohort(self, seed: int, plan: Plan) -> CohortModel:
        """As `flat`, for many sites at once. Raises BadInput if they have to be trained one by one."""
        models = _cohort_models.setdefault(self, {})
        key = (seed, plan.device)
        if key not in models:
            models.clear()
            models[key] = CohortModel(_bare(self.build(seed)), plan.device)
        return models[key]

    def flat_on(self, examples: Examples, seed: int, plan: Plan) -> tuple[FlatModel, Examples]:
        """What is trained on which rows: `flat` on the examples, or a copy of its head on their features."""
        halves = self._halves(examples, seed, plan, self.flat)
        return (self.flat(seed, plan), examples) if halves is None else (halves.flat, halves.cut.rows(examples))

    def cohort_on(self, sites: Sequence[Examples], seed: int, plan: Plan) -> tuple[CohortModel, list[Examples]]:
        """As `flat_on`, for sites that are trained at once, with examples of one form; there is at least one."""
        halves = self._halves(sites[0], seed, plan, self.cohort)
        if halves is None:
            return self.cohort(seed, plan), list(sites)
        return halves.cohort, [halves.cut.rows(examples) for examples in sites]

    def _halves(
        self, examples: Examples, seed: int, plan: Plan, whole: Callable[[int, Plan], FlatModel | CohortModel]
    ) -> "_Halves | None":
        """The model in two, where it can be cut and is to be; decided on the first examples that it meets.

        The same for sites one by one and at once, so that features are computed once for both.
        """
        if not self.cut or not len(examples):
            return None
        known = _cuts.setdefault(self, {})
        key = (seed, plan.device, bool(plan.channels_last), plan.bf16)
        if key not in known:
            known.clear()
            cut = Cut.of(whole(seed, plan).module, examples, plan, self.features)
            known[key] = None if cut is None else _Halves(cut)
        return known[key]

    def check(self, examples: Examples) -> str:
        """The form of these examples; raises BadInput if they cannot be learned. The same object is checked once."""
        checked = _checked.get(self)
        if checked is None:
            checked = _checked[self] = WeakKeyDictionary()
        form = checked.get(examples)
        if form is not None:
            return form
        for name, tensor in examples.inputs.items():
            if tensor.dtype == torch.float64:
                raise BadInput(
                    f"input {name!r} is float64, and models are trained in float32; convert it with .float()"
                )
        self.objective.check(examples.targets)
        return checked.setdefault(examples, str(examples.form))


@dataclass(frozen=True)
class _Halves:
    """A cut, and its head in the forms in which it is trained."""

    cut: Cut

    @cached_property
    def flat(self) -> FlatModel:
        return _flat(self.cut.head(), self.cut.plan)

    @cached_property
    def cohort(self) -> CohortModel:
        return CohortModel(self.cut.head(), self.cut.plan.device)


def _flat(module: nn.Module, plan: Plan) -> FlatModel:
    return FlatModel(module, plan.device, channels_last=bool(plan.channels_last))


def _bare(module: nn.Module) -> nn.Module:
    """The module without what it does besides its outputs: caches, and masks from NumPy's global generator.

    That is for the copies that are trained and evaluated; what is saved keeps its settings.
    """
    configs = {id(part.config): part.config for part in module.modules() if is_hugging_face(part)}
    bare = {key: copy.copy(config) for key, config in configs.items()}  # a builder may give one to all its models
    for config in bare.values():
        for name in _ASIDE:
            if getattr(config, name, False) is True:
                setattr(config, name, False)
    for part in module.modules():
        own = getattr(part, "config", None)
        if id(own) in bare:
            part.config = bare[id(own)]
    return module


_initial: WeakKeyDictionary[Task, tuple[int, Parameters]] = WeakKeyDictionary()
_working_copies: WeakKeyDictionary[Task, dict[tuple[int, str, bool], FlatModel]] = WeakKeyDictionary()
_cohort_models: WeakKeyDictionary[Task, dict[tuple[int, str], CohortModel]] = WeakKeyDictionary()
_checked: WeakKeyDictionary[Task, WeakKeyDictionary[Examples, str]] = WeakKeyDictionary()
_cuts: WeakKeyDictionary[Task, dict[tuple[int, str, bool, bool], _Halves | None]] = WeakKeyDictionary()
