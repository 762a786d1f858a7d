"""Sums of the gradients of single examples, each scaled by what its norm says: three ways.

`Ghost` does it in one backward pass, for models of layers that it knows. `Mapped` holds the gradients of a few examples
at a time (`torch.func.vmap`), for models whose code does not look at values. `OneByOne` is plain autograd, one example
after the other, and works for every model. Which one a model gets is settled when it is first trained: a way is taken
if, on a few examples, it computes what `OneByOne` does.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedelta.core.examples import Examples
from fedelta.core.parameters import trainable
from fedelta.core.seeds import seeded
from fedelta.learning.flat import FlatModel
from fedelta.learning.ghost import Ghost, NotGhost, Scale
from fedelta.learning.objectives import Objective
from fedelta.learning.plan import Plan
from fedelta.learning.training import by_length, predict, prepared

_COMPARED = 4  # examples
_TOLERANCE = 1e-4  # of a norm
_SHAKE = 0.02  # standard deviation of what is added to the weights for the comparison
_HELD = 2**26  # elements of gradients held at a time: 256 MB


class Way(Protocol):
    def most(self, model: FlatModel) -> int | None:
        """How many examples may be given at a time; None: as many as the model can take."""
        ...

    def add(self, model: FlatModel, objective: Objective, batch: Examples, scale: Scale) -> Tensor:
        """Add sum_i factor_i * gradient_i to the gradient of `model`; returns the norms [n] of the gradients, n >= 1.

        gradient_i is that of the mean loss of row i over what counts of it. The factors [n] are what `scale` says of
        the norms; where it says None, nothing is added.
        """
        ...


@dataclass(frozen=True)
class OneByOne:
    def most(self, model: FlatModel) -> int:
        return 1

    def add(self, model: FlatModel, objective: Objective, batch: Examples, scale: Scale) -> Tensor:
        assert len(batch) == 1
        parameters = list(trainable(model.module).values())
        loss = _losses(model.module, objective, batch).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        norms: Tensor = torch.stack([torch.linalg.vector_norm(one) for one in found]).norm().reshape(1)
        factors = scale(norms)
        if factors is not None:
            for parameter, one in zip(parameters, found, strict=True):
                assert parameter.grad is not None
                parameter.grad.add_(one * factors)
        return norms


@dataclass(frozen=True)
class Mapped:
    def most(self, model: FlatModel) -> int:
        return max(1, _HELD // model.layout.trained)

    def add(self, model: FlatModel, objective: Objective, batch: Examples, scale: Scale) -> Tensor:
        parameters = trainable(model.module)

        def loss(weights: dict[str, Tensor], inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
            def call(*args: Any, **kwargs: Any) -> Any:
                return functional_call(model.module, weights, args, kwargs)

            row = Examples({name: tensor.unsqueeze(0) for name, tensor in inputs.items()}, targets.unsqueeze(0))
            return _losses(call, objective, row).sum()

        weights = {name: parameter.detach() for name, parameter in parameters.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop because we have not yet implemented")
            each = vmap(grad(loss), (None, 0, 0), randomness="different")(weights, dict(batch.inputs), batch.targets)
        rows = {name: found.flatten(1) for name, found in each.items()}
        norms: Tensor = torch.linalg.vector_norm(torch.stack([found.norm(dim=1) for found in rows.values()]), dim=0)
        factors = scale(norms)
        if factors is not None:
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                parameter.grad.add_((factors @ rows[name]).view(parameter.shape))
        return norms


@dataclass(frozen=True)
class Booked:
    ghost: Ghost

    def most(self, model: FlatModel) -> None:
        return None

    def add(self, model: FlatModel, objective: Objective, batch: Examples, scale: Scale) -> Tensor:
        return self.ghost.add(lambda: _losses(model.module, objective, batch), len(batch), scale)


class PerExample:
    """The rows of a site, and how the gradients of some of them are added up."""

    def __init__(self, model: FlatModel, examples: Examples, objective: Objective, plan: Plan) -> None:
        """For a `model` in training mode. The first examples that can tell settle the way for all later ones."""
        self._model, self._examples, self._objective, self._plan = model, examples, objective, plan
        self._known = _ways.setdefault(model, {})
        self._kind = tuple(examples.inputs)
        self.way: Way = OneByOne()
        if len(examples) > 1:  # a single row cannot tell, and goes the same way whoever came before
            way = self._known.get(self._kind) or _fitting(model, examples, objective, plan)
            if way is not None:
                self.way = self._known[self._kind] = way

    def add(self, rows: Tensor, clip: float, most: int) -> None:
        """Add the gradients of `rows` to that of the model, those longer than `clip` scaled to it.

        At most `most` rows go through the model at a time. A row whose gradient is not finite adds nothing: it could
        otherwise end the training, which would tell of it.
        """
        for part in rows.tensor_split(-(-len(rows) // most)) if len(rows) else ():
            try:
                self._add_all(part, clip)
            except NotGhost:  # these rows take another way through the model than those that were compared
                self.way = self._known[self._kind] = OneByOne()
                self._add_all(part, clip)

    def _add_all(self, rows: Tensor, clip: float) -> None:
        """Raises NotGhost, and adds nothing, if the way is not one for these rows."""
        for some in torch.split(rows, self.way.most(self._model) or len(rows)):
            self._add(some, clip)

    def _add(self, rows: Tensor, clip: float) -> None:
        def scale(norms: Tensor) -> Tensor | None:
            return (clip / norms).clamp(max=1.0) if bool(norms.isfinite().all()) else None

        while len(rows):
            batch = prepared(self._examples[rows], self._plan)
            finite = self.way.add(self._model, self._objective, batch, scale).isfinite().to(rows.device)
            if bool(finite.all()):
                return
            rows = rows[finite]


def _losses(module: Callable[..., Any], objective: Objective, batch: Examples) -> Tensor:
    """The loss of each row, [n]: the mean over what counts of it, 0 where nothing does."""
    measured = objective.measure(predict(module, batch.inputs), batch.targets)
    return measured["loss"] / measured["examples"].clamp(min=1.0)


def _fitting(model: FlatModel, examples: Examples, objective: Objective, plan: Plan) -> Way | None:
    """The fastest way that computes what `OneByOne` does; None if these examples cannot tell.

    The shortest and the longest are among those compared, each cut to its own length in `OneByOne`: where padding
    changes what is computed of a row, no other way is taken, since one long row would change all others.
    """
    order = by_length(examples)
    rows = order[torch.linspace(0, len(order) - 1, min(_COMPARED, len(order))).long()]
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # only in float32 can ways be told apart
    with seeded(0, "per-example"), _shaken(model), _NoDropout(), exact:
        alone = [prepared(examples[row], plan) for row in torch.split(rows, 1)]
        norms, expected = _weighted(OneByOne(), model, objective, alone)
        if not bool(norms.isfinite().all()) or int((norms > 0).sum()) < 2:
            return None
        together = prepared(examples[rows], plan)
        for way in _ways_for(model):
            most = way.most(model) or len(rows)
            parts = [together[slice(first, first + most)] for first in range(0, len(rows), most)]
            try:
                found, total = _weighted(way, model, objective, parts)
            except Exception:  # whatever it is, the model cannot be trained in this way
                continue
            largest = (1 + len(rows)) * len(rows) / 2  # norm that the sum can have
            near = torch.allclose(found, norms, rtol=_TOLERANCE, atol=_TOLERANCE * float(norms.max()) / 100)
            if near and float((total - expected).norm()) <= _TOLERANCE * largest:
                return way
    return OneByOne()


def _ways_for(model: FlatModel) -> Iterator[Way]:
    """Those that may do for `model`, the fastest first."""
    with suppress(NotGhost):
        yield Booked(Ghost(model.module, trainable(model.module)))
    mapped = Mapped()
    parts = list(model.module.named_modules(remove_duplicate=False))
    once = len({part for _, part in parts}) == len(parts)  # functional_call spoils a part that has two names
    if once and mapped.most(model) > 1:
        yield mapped


def _weighted(way: Way, model: FlatModel, objective: Objective, parts: Sequence[Examples]) -> tuple[Tensor, Tensor]:
    """The norms of the gradients of all rows, and the sum of the gradients, row i scaled to a norm of i + 1."""
    model.gradient.zero_()
    norms: list[Tensor] = []
    for part in parts:
        first = 1 + sum(map(len, norms))

        def scale(norms: Tensor, first: int = first) -> Tensor:
            wanted = torch.arange(first, first + len(norms), device=norms.device)
            return torch.where(norms > 0, wanted / norms, 0.0)

        norms.append(way.add(model, objective, part, scale))
    return torch.cat(norms), model.gradient.clone()


@contextmanager
def _shaken(model: FlatModel) -> Iterator[None]:
    """Move the weights a little: those that begin at 0 hide what is behind them."""
    weights = model.weights.detach()
    before = weights.clone()
    try:
        weights.add_(torch.randn_like(weights), alpha=_SHAKE)
        yield
    finally:
        weights.copy_(before)


class _NoDropout(TorchFunctionMode):
    """Two ways through a model are compared without dropout, whatever calls it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else named["input"]
        if func in _WITH_DROPOUT:
            place = _WITH_DROPOUT[func]
            named |= {"dropout_p": 0.0} if len(args) <= place else {}
            args = (*args[:place], 0.0, *args[place + 1 :]) if len(args) > place else args
        return func(*args, **named)


_DROPOUTS = frozenset(
    {
        torch.dropout,
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
    }
)
# functions that drop out inside -> the place of their argument `dropout_p`
_WITH_DROPOUT = {functional.scaled_dot_product_attention: 4, functional.multi_head_attention_forward: 10}
_ways: WeakKeyDictionary[FlatModel, dict[tuple[str, ...], Way]] = WeakKeyDictionary()
