"""Examples: what a site holds, as tensors."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedelta.core.errors import BadInput

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Examples:
    """`inputs[name][n, ...]` and `targets[n, ...]` for n examples.

    A model is called as `model(x)` if the only input is called "x", otherwise as `model(**inputs)`, which is how
    Hugging Face models are called.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor

    def __post_init__(self) -> None:
        if not self.inputs:
            raise BadInput("examples need at least one input")
        for name, tensor in (("targets", self.targets), *self.inputs.items()):
            if tensor.ndim == 0:
                raise BadInput(f"{name!r} has one row per example as its first dimension, and got a scalar")
            if tensor.shape[0] != self.targets.shape[0]:
                raise BadInput(f"input {name!r} has {len(tensor)} rows and the targets have {len(self.targets)}")

    @classmethod
    def of(cls, data: "Examples | tuple[Tensor | Array, Tensor | Array]") -> "Examples":
        """Examples from a pair (x, y) of tensors or NumPy arrays; examples as they are.

        Arrays become what models are trained with: floating-point numbers float32, integer targets int64.
        """
        if isinstance(data, Examples):
            return data
        match data:
            case (Tensor() | np.ndarray() as x, Tensor() | np.ndarray() as y):
                return cls({"x": _tensor(x)}, _tensor(y, target=True))
        kinds = f"({', '.join(type(part).__name__ for part in data)})" if isinstance(data, tuple | list) else ""
        raise BadInput(
            f"data is Examples, or a pair (x, y) of tensors or NumPy arrays; got {type(data).__name__}{kinds}"
        )

    @classmethod
    def cat(cls, parts: "Sequence[Examples]") -> "Examples":
        """The rows of all parts, one after the other; the parts have the same `form`."""
        inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
        return cls(inputs, torch.cat([part.targets for part in parts]))

    @property
    def form(self) -> tuple[object, ...]:
        """What all rows have in common: names, dtypes and shapes of one row."""
        named = [(name, tensor.dtype, tensor.shape[1:]) for name, tensor in self.inputs.items()]
        return (*named, self.targets.dtype, self.targets.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.targets.nbytes + sum(tensor.nbytes for tensor in self.inputs.values())

    def __len__(self) -> int:
        return self.targets.shape[0]  # several times as fast as len(), and asked for each of thousands of sites

    def __getitem__(self, rows: Tensor | slice) -> "Examples":
        """The given rows; a slice gives views, an index tensor gives copies."""
        return Examples({name: tensor[rows] for name, tensor in self.inputs.items()}, self.targets[rows])

    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for name, tensor in (*sorted(self.inputs.items()), ("", self.targets)):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.hexdigest()


def _tensor(part: Tensor | Array, *, target: bool = False) -> Tensor:
    if isinstance(part, Tensor):
        return part
    if part.dtype.kind not in "fiub":
        raise BadInput(f"an array of {part.dtype} is no data for a model; turn it into numbers")
    if part.dtype.kind == "f":
        part = part.astype(np.float32)
    elif target:
        part = part.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(part))
