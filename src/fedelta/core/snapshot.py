"""The state of a program as a file, and back.

A state is made of frozen dataclasses, Parameters, layouts, tensors, enum members, None, bool, int, float, str, tuples,
lists and mappings with text as keys. The file is one message of the codec: the tensors as they are, everything else as
a tree of JSON values. No pickle, and no code: the only classes that a file can ask for are those that the template's
values and their type hints reach.

Limits: a mapping comes back as a dict; a tensor comes back on the CPU and without gradients; one process at a time
writes a path; POSIX.
"""

import dataclasses
import math
import os
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from fedelta.core import codec
from fedelta.core.errors import BadInput, BadTensors, CannotResume
from fedelta.core.messages import Meta, Plain
from fedelta.core.parameters import Layout, Parameters

S = TypeVar("S")

_FORMAT = 1
_EXACT = 2**63  # beyond it an integer is written in hexadecimal: decimal digits cost quadratic time


def save(path: Path | str, state: object, meta: Meta | None = None) -> None:
    """Write `state` and `meta` to `path` in one transaction: a crash leaves the old or the new file, whole.

    Raises BadInput for a state that is made of anything else than this module lists, OSError if the disk refuses.
    """
    path = Path(path)
    writer = _Writer()
    tree = writer.node(state, "state")
    content = {
        "format": _FORMAT,
        "state": tree,
        "layouts": [layout.describe() for layout in writer.layouts],
        "meta": dict(meta or {}),
    }
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            codec.write(file, writer.tensors, typing.cast(Meta, content))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name survives a power cut, too
    finally:
        os.close(folder)


def load(path: Path | str, template: S) -> tuple[S, dict[str, Plain]]:
    """The state and the metadata that `save` wrote. `template` is a state of the same program, such as `init()` gives.

    Raises CannotResume if there is no such file, if it is damaged, or if it holds another kind of state.
    """
    try:
        buffer = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise CannotResume(f"{path} cannot be read ({error.strerror}); name a folder that a run has written") from None
    try:
        # A writer's own file is believed about the length of its header, which the file's length bounds.
        tensors, content = codec.decode(buffer.data, max_header=buffer.size)
        match content:
            case {"format": 1, "state": tree, "layouts": list(plain), "meta": dict(meta)} if len(content) == 4:
                layouts = [Layout.parse(layout) for layout in plain]
            case _:
                raise BadTensors(f"it holds no state of format {_FORMAT}")
    except BadTensors as error:
        raise CannotResume(f"{path} is damaged or no snapshot: {error}") from error
    try:
        state = _Reader(_kinds(template), tensors, layouts).value(tree)
    except CannotResume as error:
        raise CannotResume(f"{path} does not fit this program: {error}") from error
    except RecursionError:
        raise CannotResume(f"{path} does not fit this program: its state is nested too deeply") from None
    if dataclasses.is_dataclass(template) and type(state) is not type(template):
        raise CannotResume(
            f"{path} holds a {type(state).__name__} and the program's state is a {type(template).__name__}; "
            "resume with the program that wrote it"
        )
    return typing.cast(S, state), meta


class _Writer:
    """Turns values into JSON trees; gathers the tensors and layouts that the trees refer to."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.layouts: dict[Layout, int] = {}
        self._names: dict[int, str] = {}  # by id: a broadcast that is part of many requests is written once
        self._kinds: dict[str, type] = {}

    def node(self, value: object, where: str) -> Plain:
        match value:
            case Enum():
                if type(value).__members__.get(value.name) is not value:
                    raise BadInput(f"{where} is {value!r}, a combination of members, which no snapshot holds")
                return {"enum": [self._label(type(value)), value.name]}
            case None | bool() | str():
                return value
            case int():
                return int(value) if abs(value) < _EXACT else {"int": hex(value)}
            case float():
                return float(value) if math.isfinite(value) else {"float": str(float(value))}
            case Tensor():
                return {"tensor": self._tensor(value)}
            case Parameters():
                return {"parameters": [self._layout(value.layout), self._tensor(value.vector)]}
            case Layout():
                return {"layout": self._layout(value)}
            case _ if type(value) is list:
                return [self.node(item, f"{where}[{i}]") for i, item in enumerate(value)]
            case _ if type(value) is tuple:
                return {"tuple": [self.node(item, f"{where}[{i}]") for i, item in enumerate(value)]}
            case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
                names = [field.name for field in dataclasses.fields(value)]
                items = {name: self.node(getattr(value, name), f"{where}.{name}") for name in names}
                return {"record": [self._label(type(value)), items]}
            case Mapping() if all(isinstance(key, str) for key in value):
                return {"map": {key: self.node(item, f"{where}[{key!r}]") for key, item in value.items()}}
        raise BadInput(
            f"{where} is a {type(value).__name__}, which no snapshot holds; use dataclasses, Parameters, tensors, "
            "enums, plain values, tuples, lists and mappings with text as keys"
        )

    def _tensor(self, tensor: Tensor) -> str:
        name = self._names.setdefault(id(tensor), str(len(self._names)))
        self.tensors[name] = tensor
        return name

    def _layout(self, layout: Layout) -> int:
        return self.layouts.setdefault(layout, len(self.layouts))

    def _label(self, kind: type) -> str:
        label = f"{kind.__module__}:{kind.__qualname__}"
        if self._kinds.setdefault(label, kind) is not kind:
            raise BadInput(f"the state holds two different classes called {label}; rename one")
        return label


class _Reader:
    """Builds values from JSON trees, out of given classes only."""

    def __init__(self, kinds: set[type], tensors: Mapping[str, Tensor], layouts: list[Layout]) -> None:
        self._kinds = kinds
        self._tensors = tensors
        self._layouts = layouts

    def value(self, node: object) -> object:
        match node:
            case None | bool() | int() | float() | str():
                return node
            case list():
                return [self.value(item) for item in node]
            case dict() if len(node) == 1:
                ((tag, content),) = node.items()
                return self._tagged(tag, content)
        raise _misfit(node)

    def _tagged(self, tag: str, content: object) -> object:
        match tag, content:
            case "int", str(digits) if digits.lstrip("-").startswith("0x"):
                try:
                    return int(digits, 16)
                except ValueError:
                    raise _misfit(digits) from None
            case "float", "inf" | "-inf" | "nan":
                return float(content)
            case "tuple", list(items):
                return tuple(self.value(item) for item in items)
            case "map", dict(items):
                return {key: self.value(item) for key, item in items.items()}
            case "tensor", str(name) if name in self._tensors:
                return self._tensors[name]
            case "layout", int(index) if 0 <= index < len(self._layouts):
                return self._layouts[index]
            case "parameters", [int(index), str(name)] if 0 <= index < len(self._layouts) and name in self._tensors:
                try:
                    return Parameters(self._layouts[index], self._tensors[name])
                except BadTensors as error:
                    raise CannotResume(str(error)) from error
            case "enum", [str(label), str(name)]:
                return self._member(label, name)
            case "record", [str(label), dict(items)]:
                return self._record(label, {key: self.value(item) for key, item in items.items()})
        raise _misfit({tag: content})

    def _kind(self, label: str) -> type:
        """The given class of that name; only the name of its module may differ, for a user's file may have moved."""
        module, _, name = label.partition(":")
        found = [kind for kind in self._kinds if kind.__qualname__ == name]
        exact = [kind for kind in found if kind.__module__ == module] or found
        if len(exact) != 1:
            raise CannotResume(f"it holds a {codec.short(name)}, and the state of this program has no such class")
        return exact[0]

    def _member(self, label: str, name: str) -> object:
        kind = self._kind(label)
        if not issubclass(kind, Enum) or name not in kind.__members__:
            raise CannotResume(f"{kind.__qualname__} has no member {codec.short(name)}")
        return kind[name]

    def _record(self, label: str, values: dict[str, Any]) -> object:
        kind = self._kind(label)
        fields = {f.name: f for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        if fields.keys() != values.keys():
            odd = sorted(fields.keys() ^ values.keys())
            raise CannotResume(f"its {kind.__qualname__} differs from the program's in the fields {codec.short(odd)}")
        try:
            built = kind(**{name: value for name, value in values.items() if fields[name].init})
        except Exception as error:  # whatever the class's own checks raise
            raise CannotResume(f"its {kind.__qualname__} is refused by that class: {error}") from error
        for name, value in values.items():
            if not fields[name].init:
                object.__setattr__(built, name, value)
        return built


def _misfit(node: object) -> CannotResume:
    return CannotResume(f"{codec.short(node)} is no value that a snapshot writes")


def _kinds(template: object) -> set[type]:
    """The dataclasses and enums of the template's values, and those that the type hints of these dataclasses name."""
    found: set[type] = set()
    pending: list[object] = [type(value) for value in _values(template)]
    while pending:
        hint = pending.pop()
        if isinstance(hint, type) and hint not in found and (dataclasses.is_dataclass(hint) or issubclass(hint, Enum)):
            found.add(hint)
            pending.extend(_hints(hint))
        pending.extend(typing.get_args(hint))
        # the origin of a generic, the value of a `type` alias, the bound and the constraints of a type variable
        inner = (typing.get_origin(hint), *(getattr(hint, name, None) for name in ("__value__", "__bound__")))
        pending.extend(part for part in inner if part is not None)
        pending.extend(getattr(hint, "__constraints__", ()))
    return found


def _hints(kind: type) -> Iterator[object]:
    if not dataclasses.is_dataclass(kind) or kind is Layout:
        return
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, AttributeError, TypeError):  # a hint that only a type checker can resolve
        hints = {}
    for field in dataclasses.fields(kind):
        yield hints.get(field.name, field.type)


def _values(value: object) -> Iterator[object]:
    """`value` and what it is made of."""
    yield value
    if isinstance(value, Parameters | Layout):
        return
    parts: list[object] = []
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    for part in parts:
        yield from _values(part)
