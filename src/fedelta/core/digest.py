"""A canonical description of a program, and its digest, by which parties know that they run the same experiment.

Equal descriptions mean: equal values in all fields, equal tensors, and equal source of every class and function that is
not from an installed package, with what that source refers to: closures, defaults, bases, module-level names. Comments,
formatting and the name and place of the user's file do not count. What is installed (the standard library, fedelta,
site-packages) counts by its qualified name; parties compare versions apart. A field with the metadata
`{"digest": False}` is left out: how a run is executed and when it stops is not what the experiment is.

Limits: of a module-level name whose value has no description only the class counts; a name within an imported module
counts with the whole module if it is the user's, and not at all if it is installed. Paths count as written.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedelta.core.errors import BadExperiment
from fedelta.core.parameters import Parameters
from fedelta.core.source import Sources, canonical, home, is_installed, methods, outer_names

_Symbol = torch.dtype | torch.device | torch.layout | torch.memory_format | range | complex
_Descriptor = types.MethodDescriptorType | types.WrapperDescriptorType | types.GetSetDescriptorType


def digest(value: object) -> str:
    """SHA-256 of `describe(value)`, in hexadecimal."""
    return hashlib.sha256(describe(value).encode()).hexdigest()


def describe(value: object) -> str:
    """`value` as text that is the same in every process. Raises BadExperiment for an object that has no such text."""
    try:
        return _Describer(Sources()).value(value)
    except RecursionError:
        raise BadExperiment(f"a {_name(type(value))} that contains itself has no digest; break the circle") from None


class _Describer:
    """One description; a class or function is described where it first occurs, and by its number after that."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._seen: dict[int, tuple[int, object]] = {}  # by id; holds the object, so that no other takes its id

    def value(self, value: object) -> str:
        match value:
            case type() | types.FunctionType() | types.ModuleType():
                return self._code(value)
            case Enum():
                return f"{self.value(type(value))}.{value.name}"
            case None | bool():
                return repr(value)
            case int():
                return int.__repr__(value)
            case float():
                return float.__repr__(value)  # numpy's float64 is a float, too
            case str():
                return json.dumps(value)
            case bytes() | bytearray():
                return f"bytes({value.hex()})"
            case Parameters():
                return f"parameters({value.layout.digest}, {self.value(value.vector)})"
            case Tensor():
                return _tensor(value)
            case np.ndarray() | np.generic():
                return _array(np.asarray(value))
            case nn.Module():
                return self._module(value)
            case PurePath():
                return f"path({json.dumps(value.as_posix())})"
        if isinstance(value, _Symbol):
            return str(value)
        if dataclasses.is_dataclass(value):
            fields = [field for field in dataclasses.fields(value) if field.metadata.get("digest", True)]
            return f"{self.value(type(value))}({self._named((f.name, getattr(value, f.name)) for f in fields)})"
        return self._collection(value)

    def _collection(self, value: object) -> str:
        match value:
            case list() | tuple():
                items = ", ".join(self.value(item) for item in value)
                kind = "" if type(value) in (list, tuple) else self.value(type(value))
                return f"{kind}[{items}]" if isinstance(value, list) else f"{kind}({items})"
            case set() | frozenset():
                return f"set({', '.join(sorted(self._alone(item) for item in value))})"
            case Mapping():
                keys = sorted((self._alone(key), i, key) for i, key in enumerate(value))
                return f"{{{', '.join(f'{text}: {self.value(value[key])}' for text, _, key in keys)}}}"
        return self._callable(value)

    def _callable(self, value: object) -> str:
        match value:
            case functools.partial():
                return f"partial({self.value([value.func, value.args, value.keywords])})"
            case types.MethodType():
                return f"method({self.value(value.__func__)}, {self.value(value.__self__)})"
            case types.BuiltinFunctionType():
                owner = value.__module__ if value.__self__ is None else self.value(value.__self__)
                return f"{owner}.{value.__name__}"
            case np.ufunc():
                return f"numpy.{value.__name__}"
        if isinstance(value, _Descriptor):
            return f"{self.value(value.__objclass__)}.{value.__name__}"
        if callable(value) and hasattr(value, "__wrapped__"):  # functools.cache and its like
            return f"wrapped({self.value(type(value))}, {self.value(value.__wrapped__)})"
        raise BadExperiment(
            f"a {_name(type(value))} has no digest, so two parties could not compare it; make it a dataclass, or leave "
            'its field out with field(metadata={"digest": False})'
        )

    def _alone(self, value: object) -> str:
        """`value` described by itself, so that the order of a set or of a mapping's keys makes no difference."""
        return _Describer(self._sources).value(value)

    def _named(self, items: Iterable[tuple[str, object]]) -> str:
        return ", ".join(f"{name}={self.value(value)}" for name, value in items)

    def _module(self, value: nn.Module) -> str:
        """A module by its parts (their classes and plain attributes) and its weights."""
        parts = {
            name: [type(part), {key: item for key, item in vars(part).items() if _is_setting(key, item)}]
            for name, part in value.named_modules()
        }
        weights = {name: [tensor, tensor.requires_grad] for name, tensor in value.named_parameters()}
        return f"module({self.value([parts, weights, dict(value.named_buffers())])})"

    def _code(self, value: type | types.FunctionType | types.ModuleType) -> str:
        """Something that has source: by name if it is installed, otherwise by its syntax and what that refers to."""
        # A function made by an installed one (a schedule, a lambda) is told from its like by what it closes over.
        made = isinstance(value, types.FunctionType) and "<" in value.__qualname__
        if is_installed(value) and not made:
            return value.__name__ if isinstance(value, types.ModuleType) else _name(value)
        if id(value) in self._seen:
            return f"#{self._seen[id(value)][0]}"
        number = len(self._seen)
        self._seen[id(value)] = (number, value)
        match value:
            case types.ModuleType():
                return f"#{number} {value.__name__}@{_hash(self._sources.of_module(value))}"
            case types.FunctionType():
                nodes = self._sources.of_function(value)
                own = _closure([value]) | {"()": [value.__defaults__, value.__kwdefaults__]}
                outer: Mapping[str, object] = {} if is_installed(value) else value.__globals__
            case _:
                nodes = self._sources.of_class(value)
                own = _closure(methods(value)) | {"()": [base for base in value.__bases__ if base is not object]}
                own |= {f".{name}": item for name, item in vars(value).items() if _is_setting(name, item)}
                _, outer = home(value)
        names = sorted(set().union(*(outer_names(node) for node in nodes)) - own.keys())
        inside = self._named(sorted(own.items()))
        outside = ", ".join(f"{name}={self._outer(outer[name])}" for name in names if name in outer)
        return f"#{number} {value.__qualname__}@{_hash(nodes)}{{{inside}; {outside}}}"

    def _outer(self, value: object) -> str:
        """The value of a module-level name: source may mention anything, so what has no description is no error."""
        seen = dict(self._seen)
        try:
            return self.value(value)
        except BadExperiment:
            self._seen = seen
        try:
            return f"a {self.value(type(value))}"
        except BadExperiment:
            self._seen = seen
            return f"a {type(value).__qualname__}"


def _tensor(value: Tensor) -> str:
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise BadExperiment("a tensor that is sparse, quantised or has no data has no digest; convert it")
    plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    memory = plain.reshape(-1).view(torch.uint8).numpy().data
    return f"tensor({value.dtype}, {tuple(value.shape)}, {hashlib.sha256(memory).hexdigest()})"


def _array(value: "np.ndarray[Any, np.dtype[Any]]") -> str:
    if value.dtype.hasobject:
        raise BadExperiment("an array of Python objects has no digest; convert it to numbers, or use a list")
    return f"array({value.dtype.str}, {value.shape}, {hashlib.sha256(value.tobytes()).hexdigest()})"


def _is_setting(name: str, value: object) -> bool:
    """Whether an attribute is a plain public value; whether a module is in training mode is no setting."""
    return not name.startswith("_") and name != "training" and _is_plain(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _closure(found: Iterable[types.FunctionType]) -> dict[str, object]:
    """The variables of enclosing functions that the given functions use; one that has no value yet is left out."""
    variables: dict[str, object] = {}
    for function in found:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                variables[name] = cell.cell_contents
            except ValueError:
                continue
    return variables


def _hash(nodes: list[ast.AST]) -> str:
    return hashlib.sha256("".join(canonical(node) for node in nodes).encode()).hexdigest()


def _name(value: type | types.FunctionType) -> str:
    return f"{value.__module__}.{value.__qualname__}"
