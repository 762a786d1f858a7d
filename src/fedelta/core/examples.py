"""Examples: what a site holds, as tensors."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedelta.core.errors import BadInput


@dataclass(frozen=True, slots=True)
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
            if len(tensor) != len(self.targets):
                raise BadInput(f"input {name!r} has {len(tensor)} rows and the targets have {len(self.targets)}")

    @classmethod
    def of(cls, data: "Examples | tuple[Tensor, Tensor]") -> "Examples":
        """Examples from a pair (x, y); examples as they are."""
        if isinstance(data, Examples):
            return data
        match data:
            case (Tensor() as x, Tensor() as y):
                return cls({"x": x}, y)
        raise BadInput(f"a site's data is Examples or a pair of tensors (x, y), got {type(data).__name__}")

    def __len__(self) -> int:
        return len(self.targets)

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
