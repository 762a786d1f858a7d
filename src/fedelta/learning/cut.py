"""A frozen feature extractor, cut from its head: features are computed once, and only the head is trained on them.

Where a tuning trains the head alone (`Head`), the rest of the model is in evaluation mode and never changes: what it
computes of a row is always the same. Training on stored features gives what training the whole model gives, to
rounding, dropout of the head included, at the cost of the head.

Limits: a model whose head does not get one tensor of one size per row (RoBERTa's reads all tokens) is not cut.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fedelta.core.digest import digest
from fedelta.core.examples import Examples
from fedelta.core.parameters import Layout, trainable, travelling_buffers
from fedelta.learning.features import NoFeatures, feature_shape, features
from fedelta.learning.plan import Plan
from fedelta.learning.structure import is_hugging_face, within
from fedelta.learning.training import autocast, predict, prepared
from fedelta.learning.tuning import evaluates, train_mode


class _Head(nn.Module):
    """The last parts of a model, called one after the other, under the names that they have in it."""

    def __init__(self, module: nn.Module, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts
        for name, part in module.named_modules():  # in the order of the model, and so of its layout
            if name in parts:
                self._place(name, copy.deepcopy(part))

    def _place(self, name: str, part: nn.Module) -> None:
        *path, last = name.split(".")
        owner: nn.Module = self
        for step in path:
            if step not in dict(owner.named_children()):
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        owner.add_module(last, part)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.parts:
            x = self.get_submodule(name)(x)
        return x


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model in two. `body` computes features, and is the whole model; `parts` of it are the head."""

    body: nn.Module
    parts: tuple[str, ...]
    shape: torch.Size  # of the features of a row
    plan: Plan
    folder: Path | None  # where features are kept; None: in memory
    _known: WeakKeyDictionary[Examples, Examples] = field(default_factory=WeakKeyDictionary, repr=False)

    @classmethod
    def of(cls, body: nn.Module, examples: Examples, plan: Plan, folder: Path | None) -> "Cut | None":
        """The cut of `body`; None if more than its head is trained, or if its head cannot be told apart.

        `examples` are some that it reads; there is at least one.
        """
        train_mode(body)
        names = _active(body)
        if not names:
            return None
        try:
            found = _found(body, names, examples, plan)
        finally:
            train_mode(body)
        return None if found is None else cls(body=body, parts=found[0], shape=found[1], plan=plan, folder=folder)

    def head(self) -> nn.Module:
        """A new module that is the head alone; its parameters have the names that they have in the whole."""
        return _Head(self.body, self.parts)

    def rows(self, examples: Examples) -> Examples:
        """Features float32 [n, ...] in place of the inputs, computed once for the same object."""
        known = self._known.get(examples)
        if known is None:
            known = self._known[examples] = Examples({"x": self._features(examples)}, examples.targets)
        return known

    def _features(self, examples: Examples) -> Tensor:
        shape = (len(examples), *self.shape)
        if self.folder is None or not len(examples):
            return features(self.body, self.parts, examples, self.plan, torch.empty(shape))
        path = self.folder / f"{self._key(examples)}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".part-") as part:
                unfinished = Path(part) / path.name
                mapped = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
                features(self.body, self.parts, examples, self.plan, torch.from_numpy(mapped))
                mapped.flush()
                os.replace(unfinished, path)  # two processes that compute the same write the same
        return torch.from_numpy(np.load(path, mmap_mode="c"))  # pages that nobody writes to are shared

    def _key(self, examples: Examples) -> str:
        arithmetic = [self.plan.bf16, bool(self.plan.channels_last), torch.device(self.plan.device).type]
        return digest([self._body_digest, examples.digest(), list(self.parts), arithmetic])[:32]

    @property
    def _body_digest(self) -> str:
        if self.body not in _digests:
            travelling = trainable(self.body).keys() | travelling_buffers(self.body).keys()
            weights = {name: value for name, value in self.body.state_dict().items() if name not in travelling}
            # the same weights compute other features where a module has other settings
            settings = {
                name: _settings(part) for name, part in self.body.named_modules() if not within(name, self.parts)
            }
            _digests[self.body] = digest([weights, settings])
        return _digests[self.body]


_digests: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _layout(head: nn.Module) -> Layout:
    return Layout.of(trainable(head), travelling_buffers(head))


def _settings(part: nn.Module) -> list[object]:
    """The class of `part`, and what it knows besides tensors and parts: plain values, a Hugging Face configuration."""
    plain = {
        name: value
        for name, value in vars(part).items()
        if not name.startswith("_")
        and name not in ("training", "name_or_path")
        and isinstance(value, bool | int | float | str | tuple | None)
    }
    config: Any = part.config if is_hugging_face(part) else None
    public = {name: value for name, value in config.to_dict().items() if not name.startswith("_")} if config else {}
    return [f"{type(part).__module__}.{type(part).__qualname__}", _as_text(plain), _as_text(public)]


def _as_text(values: Mapping[str, object]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _found(
    body: nn.Module, names: set[str], examples: Examples, plan: Plan
) -> tuple[tuple[str, ...], torch.Size] | None:
    """The parts of `body` that make its head, in order, and the shape of what they get of a row; None if none do."""
    parts = _called(body, names, examples[:1], plan)
    if parts is None or Layout.of(trainable(body), travelling_buffers(body)) != _layout(_Head(body, parts)):
        return None
    try:
        with _shaken(body):
            shape = feature_shape(body, parts, examples, plan)
    except NoFeatures:
        return None
    if len(shape) > 1 and "attention_mask" in examples.inputs:  # as wide as the longest row of a batch
        return None
    return (parts, shape) if _steady(body, parts[0], examples[:1], plan) else None


@contextmanager
def _shaken(module: nn.Module) -> Iterator[None]:
    """Move what is trained a little: of a head that begins at 0, anything would explain the outputs."""
    weights = trainable(module).values()
    before = [weight.detach().clone() for weight in weights]
    drawn = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn(weight.shape, generator=drawn).to(weight), alpha=0.02)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


@torch.no_grad()
def _steady(module: nn.Module, part: str, examples: Examples, plan: Plan) -> bool:
    """Whether `part` gets in training what it gets in evaluation, so that no dropout is called as a function before."""
    inputs = prepared(examples, plan).inputs
    got: list[Tensor] = []

    def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        got.append(given[0].clone())
        raise _Reached

    hook = module.get_submodule(part).register_forward_pre_hook(stop)
    try:
        with torch.random.fork_rng(devices=[]):
            modes: list[Callable[[nn.Module], object]] = [nn.Module.eval, train_mode]
            for mode in modes:
                mode(module)
                with suppress(_Reached), autocast(plan):
                    predict(module, inputs)
    finally:
        hook.remove()
    return len(got) == 2 and torch.equal(*got)


class _Reached(Exception):
    """The forward pass has come to the part that it was to come to."""


def _active(module: nn.Module) -> set[str]:
    """The outermost parts that are trained; none if `Head` has not set the rest apart."""
    if not any(evaluates(part) for part in module.modules()):
        return set()
    active: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{other}.") for other in active)
        if name and not inside and part.training and not any(evaluates(other) for other in part.modules()):
            active.append(name)
    return set(active)


@torch.no_grad()
def _called(module: nn.Module, names: set[str], examples: Examples, plan: Plan) -> tuple[str, ...] | None:
    """`names` in the order in which a forward pass calls them; None if it calls one twice."""
    order: list[str] = []
    by_part = {module.get_submodule(name): name for name in names}
    hooks = [part.register_forward_hook(lambda part, *_: order.append(by_part[part])) for part in by_part]
    try:
        module.eval()
        predict(module, prepared(examples, plan).inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(order) if order and len(set(order)) == len(order) else None
