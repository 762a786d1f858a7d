"""Norms of the gradients of single examples, and their clipped sum, in one backward pass.

The gradient of one example is never held where it is large. Of a linear layer with inputs X and gradients of its
outputs Y, both [tokens, ...], it is Y^T X, and its squared norm is the sum of all elements of (X X^T) * (Y Y^T)
(Goodfellow, 2015; Li et al., ICLR 2022, section 4.1). The sum of the clipped gradients is then one more product, from
what the norms were computed from (Bu et al., ICML 2023: book-keeping), so that the backward pass computes no gradient
of a weight at all. Where it is cheaper, a layer's own gradient of each example is computed and kept instead.

Limits: the trained parameters belong to layers that are known here, each called once in a forward pass, with its rows
in the first dimension. Everything else is refused (`NotGhost`) or caught by a comparison (see `per_example.py`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call
from torch.nn import functional
from torch.nn.grad import conv2d_weight

# From the norms [n] of n gradients to the factors [n] of their sum; None: nothing is to be added.
Scale = Callable[[Tensor], Tensor | None]
# Of one parameter: the norms [n] of its gradients, and what adds their sum, times factors [n], to its gradient.
_Kept = tuple[Tensor, Callable[[Tensor], object]]
# From a layer, its inputs [n, ...] and the gradients of its outputs [n, ...], all for n rows.
_Rule = Callable[[Any, Tensor, Tensor, "_Wanted"], list[_Kept]]
_Wanted = frozenset[str]  # which of a layer's own parameters are trained: "weight", "bias"

_MOVED = 10  # multiplications and additions in the time in which one number is written to memory or read from it
_PAIRS = 2**22  # of tokens of one row, held at a time: 16 MB, twice
_PATCHES = 2**24  # elements of what the places of a convolution see, held at a time: 64 MB


class NotGhost(Exception):
    """This model, or this call of it, is not one for which the norms are known to be right."""


class Ghost:
    """The layers of `module` that have `trained` parameters; these all have a `.grad`, to which sums are added."""

    def __init__(self, module: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        """Raises NotGhost if a parameter belongs to no known layer, or to two."""
        self._parameters = list(trained.values())
        self._layers: dict[nn.Module, tuple[_Rule, _Wanted]] = {}
        ids = {id(parameter) for parameter in self._parameters}
        owned = 0
        for part in module.modules():
            names = [name for name, own in part._parameters.items() if own is not None and id(own) in ids]
            if names:
                owned += len(names)
                self._layers[part] = (_rule(part, names), frozenset(names))
        if owned != len(ids):
            raise NotGhost("a parameter is shared by two layers")
        self.expected: frozenset[nn.Module] | None = None  # the layers that a call has to reach; None: any

    def add(self, losses: Callable[[], Tensor], n: int, scale: Scale) -> Tensor:
        """Add sum_i factor_i * gradient_i of the n `losses()` to the gradients; returns the norms [n].

        Raises NotGhost, and adds nothing, if the call of the model was not as it has to be.
        """
        with self._frozen(), _Tape(self._layers, n) as tape:
            losses().sum().backward()  # type: ignore[no-untyped-call]
        if self.expected is None:
            self.expected = frozenset(tape.called)
        elif self.expected != tape.called:
            raise NotGhost("another call of the model reaches other layers")
        kept = tape.kept
        norms: Tensor = torch.linalg.vector_norm(torch.stack([norms for norms, _ in kept]), dim=0)
        factors = scale(norms)
        if factors is not None:
            for _, add in kept:
                add(factors)
        return norms

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Autograd computes gradients of activations alone."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(True)


class _Tape:
    """What is seen of the layers in one forward and backward pass over n rows."""

    def __init__(self, layers: Mapping[nn.Module, tuple[_Rule, _Wanted]], n: int) -> None:
        self.kept: list[_Kept] = []
        self.called: set[nn.Module] = set()
        self._layers = layers
        self._n = n
        self._anchor = torch.zeros((), requires_grad=True)  # what makes the first layer's outputs part of a graph
        self._hooks: list[Any] = []
        self._inside = False

    def __enter__(self) -> "_Tape":
        for layer in self._layers:
            if isinstance(layer, nn.Embedding):
                self._hooks.append(layer.register_forward_pre_hook(self._per_row))
            self._hooks.append(layer.register_forward_hook(self._after, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _per_row(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Positions are often embedded once for all rows; each row needs its own."""
        if given and given[0].ndim > 1 and len(given[0]) == 1 < self._n:
            return (given[0].expand(self._n, *given[0].shape[1:]), *given[1:])
        return None

    def _after(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> Any:
        if self._inside:
            return None
        x = given[0] if given else next(iter(named.values()))
        if layer in self.called:
            raise NotGhost("a layer is called twice")
        if not isinstance(outputs, Tensor) or not isinstance(x, Tensor) or not len(x) == len(outputs) == self._n:
            raise NotGhost("a layer gets something else than one row of inputs for each example")
        self.called.add(layer)
        if not outputs.requires_grad:
            outputs = _Anchored.apply(outputs.detach(), self._anchor)  # type: ignore[no-untyped-call]
        x, version = x.detach(), x._version
        rule, wanted = self._layers[layer]

        def record(gradient: Tensor) -> None:
            if x._version != version:
                raise NotGhost("the inputs of a layer are overwritten")
            self._inside = True
            self.kept += rule(layer, x, gradient, wanted)
            self._inside = False

        outputs.register_hook(record)
        return outputs


class _Anchored(Function):
    """The same tensor, not a copy, as something whose gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _rule(layer: nn.Module, names: Iterable[str]) -> _Rule:
    """How gradients of `layer` are computed. It is known by its code: a sub-class may compute something else."""
    code = type(layer).forward
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
        raise NotGhost("an embedding has gradients of its own kind")
    if code in _RULES and set(names) <= {"weight", "bias"}:
        return _RULES[code]
    if type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils":
        return _transposed_linear
    if list(names) == ["weight"] == list(layer._parameters) and layer.weight.ndim == 1 and not layer._modules:
        return _scaling
    raise NotGhost(f"{type(layer).__name__} has parameters of its own")


def _linear(layer: nn.Linear, x: Tensor, gradient: Tensor, wanted: _Wanted) -> list[_Kept]:
    return _of_linear(x, gradient, wanted, layer.weight, layer.bias)


def _transposed_linear(layer: Any, x: Tensor, gradient: Tensor, wanted: _Wanted) -> list[_Kept]:
    return _of_linear(x, gradient, wanted, layer.weight, layer.bias, transposed=True)


def _of_linear(
    x: Tensor, gradient: Tensor, wanted: _Wanted, weight: Tensor, bias: Tensor | None, *, transposed: bool = False
) -> list[_Kept]:
    x, gradient = (part.reshape(len(part), math.prod(part.shape[1:-1]), part.shape[-1]) for part in (x, gradient))
    kept = []
    if "weight" in wanted:
        kept.append(_product(gradient, x, weight) if transposed else _product(x, gradient, weight))
    if "bias" in wanted and bias is not None:
        kept.append(_each(gradient.sum(1), bias))
    return kept


def _conv2d(layer: nn.Conv2d, x: Tensor, gradient: Tensor, wanted: _Wanted) -> list[_Kept]:
    kept = []
    if "bias" in wanted and layer.bias is not None:
        kept.append(_each(gradient.sum((2, 3)), layer.bias))
    if "weight" not in wanted:
        return kept
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    groups, places = layer.groups, gradient.shape[2:]
    out, d = layer.out_channels // groups, layer.weight[0].numel()
    small = groups > 1 or _cheap(places.numel(), d, out)
    found = []
    size = max(1, _PATCHES // max(1, groups * d * places.numel()))
    for some, outer in zip(torch.split(x, size), torch.split(gradient, size), strict=True):
        outputs = outer.reshape(len(some) * groups, out, places.numel())
        patches = _patches(some, layer, places).view(len(some) * groups, d, places.numel()).transpose(1, 2)
        if small:
            found.append(torch.bmm(outputs, patches).view(len(some), -1))
        else:
            found.append(_gram_norms(patches, outputs.transpose(1, 2)))
    rows = found[0] if len(found) == 1 else torch.cat(found)
    if small:
        return [*kept, _each(rows, layer.weight)]

    def add(factors: Tensor) -> None:  # from the inputs, which are smaller than the patches
        weighted = gradient * factors.view(-1, 1, 1, 1)
        shape, stride, dilation = layer.weight.shape, layer.stride, layer.dilation
        _gradient(layer.weight).add_(conv2d_weight(x, shape, weighted, stride, dilation=dilation))  # type: ignore[no-untyped-call]

    return [*kept, (rows, add)]


def _patches(x: Tensor, layer: nn.Conv2d, places: torch.Size) -> Tensor:
    """What each place of the outputs sees of padded inputs, [n, channels * kernel, places].

    As one copy of a view with windows that overlap; `functional.unfold` takes several times as long.
    """
    x = x.contiguous()
    n, channel, row, column = x.stride()
    (down, right), (below, beside) = layer.stride, layer.dilation
    strides = (n, channel, row * below, column * beside, row * down, column * right)
    windows = x.as_strided((*x.shape[:2], *layer.kernel_size, *places), strides)
    return windows.reshape(len(x), -1, math.prod(places))


def _embedding(layer: nn.Embedding, ids: Tensor, gradient: Tensor, wanted: _Wanted) -> list[_Kept]:
    ids = ids.reshape(len(ids), -1)
    gradient = gradient.reshape(*ids.shape, -1)
    if layer.padding_idx is not None:
        gradient = gradient.masked_fill((ids == layer.padding_idx).unsqueeze(2), 0.0)
    norms = _gram_norms(ids.unsqueeze(2), gradient)

    def add(factors: Tensor) -> None:
        _gradient(layer.weight).index_add_(0, ids.flatten(), (gradient * factors.view(-1, 1, 1)).flatten(0, 1))

    return [(norms, add)]


def _layer_norm(layer: nn.LayerNorm, x: Tensor, gradient: Tensor, wanted: _Wanted) -> list[_Kept]:
    normal = functional.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    of = {"weight": gradient * normal, "bias": gradient}
    shape = (len(x), -1, *layer.normalized_shape)
    return [_each(of[name].reshape(shape).sum(1), getattr(layer, name)) for name in sorted(wanted)]


def _group_norm(layer: nn.GroupNorm, x: Tensor, gradient: Tensor, wanted: _Wanted) -> list[_Kept]:
    normal = functional.group_norm(x, layer.num_groups, None, None, layer.eps)
    of = {"weight": gradient * normal, "bias": gradient}
    shape = (*x.shape[:2], -1)
    return [_each(of[name].reshape(shape).sum(2), getattr(layer, name)) for name in sorted(wanted)]


def _scaling(layer: nn.Module, x: Tensor, gradient: Tensor, wanted: _Wanted) -> list[_Kept]:
    """A layer that multiplies what it makes of the last dimension by its weight, as the RMSNorms of models do.

    Some multiply by 1 + weight, so what is multiplied is the difference that a weight of 1 makes to one of 0. That this
    is what a layer does, is seen in a comparison.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if x.shape != gradient.shape or x.shape[-1:] != weight.shape:
        raise NotGhost(f"{type(layer).__name__} does not scale its last dimension")
    one, zero = (functional_call(layer, {"weight": value}, (x,)) for value in (torch.ones_like(weight), 0 * weight))
    return [_each((gradient * (one - zero)).reshape(len(x), -1, len(weight)).sum(1), weight)]


def _product(x: Tensor, gradient: Tensor, weight: Tensor) -> _Kept:
    """Of a weight [p, d] whose gradient is gradient^T x for each row; x is [n, tokens, d], gradient [n, tokens, p]."""
    tokens, d = x.shape[1:]
    if tokens > 1 and _cheap(tokens, d, gradient.shape[2]):
        return _each(torch.bmm(gradient.transpose(1, 2), x), weight)
    if tokens == 1:  # in float64, as one norm may be so small that its square is 0, and the other large
        lengths = [torch.linalg.vector_norm(part, dim=(1, 2), dtype=torch.float64) for part in (x, gradient)]
        norms = (lengths[0] * lengths[1]).to(x.dtype)
    else:
        norms = _gram_norms(x, gradient)

    def add(factors: Tensor) -> None:
        weighted = (gradient * factors.view(-1, 1, 1)).flatten(0, 1)
        _gradient(weight).addmm_(weighted.T, x.flatten(0, 1))

    return norms, add


def _each(gradients: Tensor, parameter: Tensor) -> _Kept:
    """Of a parameter whose gradients of each row, [n, ...], are at hand."""
    rows = gradients.flatten(1)

    def add(factors: Tensor) -> None:
        _gradient(parameter).add_((factors @ rows).view(parameter.shape))

    return torch.linalg.vector_norm(rows, dim=1), add


def _cheap(tokens: int, d: int, p: int) -> bool:
    """Whether gradients [p, d] of single rows take less time than pairs of tokens, and less memory than the rows."""
    by_pairs = tokens * tokens * (d + p + 4 * _MOVED)
    return 3 * _MOVED * d * p <= by_pairs and d * p <= tokens * (d + p)


def _gram_norms(x: Tensor, gradient: Tensor) -> Tensor:
    """The norms of gradient^T x for each row; with integer x [n, tokens, 1], those of a sum by x instead.

    Rounding can hide a norm that is small beside what cancels in it, and products that are too small for a float are 0.
    What both may amount to is added, so that no example gets more weight than it may have.
    """
    squares = []
    size = max(1, _PAIRS // max(1, x.shape[1] ** 2))
    for some, outer in zip(torch.split(x, size), torch.split(gradient, size), strict=True):
        pairs = torch.bmm(outer, outer.transpose(1, 2))
        alike = some @ some.transpose(1, 2) if x.is_floating_point() else (some == some.transpose(1, 2)).to(pairs)
        most = [part.diagonal(dim1=1, dim2=2).sum(1) for part in (pairs, alike)]
        finfo, tokens = torch.finfo(pairs.dtype), x.shape[1]
        lost = finfo.tiny * tokens * (outer.shape[2] * most[1] + x.shape[2] * most[0] + tokens)
        rounding = finfo.eps * most[0] * most[1] + lost
        squares.append(pairs.mul_(alike).sum((1, 2)).clamp_(min=0.0).add_(rounding))
    return torch.cat(squares).sqrt_()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


_RULES: dict[object, _Rule] = {
    nn.Linear.forward: _linear,
    nn.Conv2d.forward: _conv2d,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
    nn.GroupNorm.forward: _group_norm,
}
