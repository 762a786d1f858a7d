"""The messages of a secure sum: what tensors they consist of, and the checks that they have that form.

With n sites on the list, of whom each shares with k, and `in` incoming neighbours of a site:

    step       from the coordinator, for all            its own                   from the site
    keys       -                                        -                         encryption, masking, identity [32]
                                                                                  signature [64]
    shares     names [bytes]; encryption, masking,      -                         neighbours [k], shares [k, 82]
               identity [n, 32]; signature [n, 64]                                commitment [32]
    masked     alive [n]                                from [in]                 the vectors, by their names
                                                        shares [in, 82]           signature [64]
    survivors  survivors [n]                            -                         signature [64]
    reveal     signers [m]; signatures [m, 64]          alive [in, 64]: of those  shares [in, 33], as in `from`
                                                        that survived

Everything here is public. Whoever reads a message checks names, dtypes and sizes before anything is made of them, and
refuses tensors that do not belong to it; BadTensors says in one sentence what was wrong. Octets are uint8; indices
(neighbours, from, signers) int64 in ascending order; a set of sites (alive, survivors) one uint8 of 0 or 1 for each
site of the list; names a JSON array of texts in UTF-8; vectors int16, int32 or int64.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedelta.core.codec import short
from fedelta.core.errors import BadTensors
from fedelta.core.messages import Tensors
from fedelta.secure.shamir import SHARE_BYTES

KEY_BYTES = 32  # an X25519 or Ed25519 public key, a seed, a SHA-256 digest
SIGNATURE_BYTES = 64
SIGNATURE = "signature"  # beside masked vectors, none of which may have this name
SEALED_BYTES = 2 * SHARE_BYTES + 16  # both shares and the tag of AES-GCM
_MAX_NAME = 1024  # bytes of JSON for each site of a list


@dataclass(frozen=True, kw_only=True)
class PublicKeys:
    """What a site says of itself at the beginning of a sum."""

    encryption: bytes  # X25519: agreements encrypt shares
    masking: bytes  # X25519: agreements are the keys of pairwise masks
    identity: bytes  # Ed25519
    signature: bytes  # by the identity, over context, name and both other keys

    def to_tensors(self) -> dict[str, Tensor]:
        return {name: octets(getattr(self, name), width) for name, width in _WIDTHS.items()}

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> "PublicKeys":
        expect(tensors, _WIDTHS)
        return cls(**{name: bytes_of(tensors, name, width) for name, width in _WIDTHS.items()})


_WIDTHS = {"encryption": KEY_BYTES, "masking": KEY_BYTES, "identity": KEY_BYTES, "signature": SIGNATURE_BYTES}


@dataclass(frozen=True, kw_only=True)
class Listed:
    """All keys that came, in the order that gives each site its index."""

    names: tuple[str, ...]
    keys: tuple[PublicKeys, ...]

    def to_tensors(self) -> dict[str, Tensor]:
        count = len(self.names)
        columns = {name: b"".join(getattr(keys, name) for keys in self.keys) for name in _WIDTHS}
        tensors = {name: octets(columns[name], count, width) for name, width in _WIDTHS.items()}
        text = _json(self.names)
        return {"names": octets(text, len(text)), **tensors}

    @classmethod
    def from_tensors(cls, tensors: Tensors, most: int) -> "Listed":
        """The list, of at most `most` sites; that they are distinct is not checked here."""
        expect(tensors, ["names", *_WIDTHS])
        names = _names(tensors["names"], most)
        columns = [rows(tensors, name, len(names), width) for name, width in _WIDTHS.items()]
        keys = [PublicKeys(**dict(zip(_WIDTHS, row, strict=True))) for row in zip(*columns, strict=True)]
        return cls(names=tuple(names), keys=tuple(keys))

    def __len__(self) -> int:
        return len(self.names)


def expect(tensors: Tensors, names: Collection[str]) -> None:
    """Raise BadTensors unless the tensors have exactly these names."""
    if set(tensors) != set(names):
        raise BadTensors(f"a message of a secure sum consists of {sorted(names)}, got {short(sorted(tensors))}")


def octets(data: bytes, *shape: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8).reshape(shape))


def bytes_of(tensors: Tensors, name: str, *shape: int) -> bytes:
    """The octets of a tensor that must have this shape."""
    return _array(tensors[name], name, torch.uint8, shape).tobytes()


def rows(tensors: Tensors, name: str, count: int, width: int) -> list[bytes]:
    """The rows of a tensor of octets [count, width]."""
    data = bytes_of(tensors, name, count, width)
    return [data[start : start + width] for start in range(0, len(data), width)]


def indices(found: Sequence[int]) -> Tensor:
    return torch.tensor(found, dtype=torch.int64)


def indices_of(tensors: Tensors, name: str, sites: int) -> list[int]:
    """Distinct indices of a list of `sites`, ascending."""
    tensor = tensors[name]
    if tensor.ndim != 1 or len(tensor) > sites:
        raise BadTensors(f"{name!r} holds indices of at most {sites} sites, got the shape {tuple(tensor.shape)}")
    found: list[int] = _array(tensor, name, torch.int64, (len(tensor),)).tolist()
    ascending = all(before < after for before, after in pairwise(found))
    if found and not (ascending and found[0] >= 0 and found[-1] < sites):
        raise BadTensors(f"{name!r} holds ascending indices from 0 to {sites - 1}, got {short(found)}")
    return found


def flags(members: Collection[int], sites: int) -> bytes:
    """A set of indices as one octet of 0 or 1 for each site."""
    return bytes(index in members for index in range(sites))


def members_of(tensors: Tensors, name: str, sites: int) -> frozenset[int]:
    """The set of indices that `flags` wrote."""
    data = bytes_of(tensors, name, sites)
    if data and max(data) > 1:
        raise BadTensors(f"{name!r} marks sites by 0 and 1, got {max(data)}")
    return frozenset(index for index, flag in enumerate(data) if flag)


Arrays = Mapping[str, NDArray[Any]]


def form_of(vectors: Arrays) -> dict[str, tuple["np.dtype[Any]", int]]:
    """The dtype and the length of each vector. Raises BadTensors for one that no mask can be added to."""
    if SIGNATURE in vectors:
        raise BadTensors(f"{SIGNATURE!r} is no name for a vector of a secure sum; it is that of what goes with it")
    for name, vector in vectors.items():
        if vector.dtype not in (np.int16, np.int32, np.int64) or vector.ndim != 1:
            raise BadTensors(
                "vectors of a secure sum are int16, int32 or int64 with one dimension, "
                f"{short(name)} has {vector.dtype} and the shape {vector.shape}"
            )
    return {name: (vector.dtype, len(vector)) for name, vector in vectors.items()}


def arrays_of(tensors: Tensors) -> dict[str, NDArray[Any]]:
    """Integer vectors without a copy. Raises BadTensors for anything else."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int16, torch.int32, torch.int64) or tensor.ndim != 1:
            raise BadTensors(
                f"masked vectors are int16, int32 or int64 with one dimension, {short(name)} has {tensor.dtype} "
                f"and the shape {tuple(tensor.shape)}"
            )
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}


def _array(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> NDArray[Any]:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise BadTensors(f"{name!r} is {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.detach().cpu().contiguous().numpy()


def _json(names: Sequence[str]) -> bytes:
    return json.dumps(list(names), ensure_ascii=False, separators=(",", ":")).encode()


def _names(tensor: Tensor, most: int) -> list[str]:
    if tensor.ndim != 1 or len(tensor) > _MAX_NAME * most:
        raise BadTensors(f"'names' has at most {_MAX_NAME} bytes for each of {most} sites, got {tuple(tensor.shape)}")
    text = bytes_of({"names": tensor}, "names", len(tensor))
    try:
        names = json.loads(text.decode())
        canonical = isinstance(names, list) and all(isinstance(name, str) for name in names) and _json(names) == text
    except (ValueError, RecursionError):  # among them what is no text in UTF-8
        canonical = False
    if not canonical:  # one list has one form, so that one digest stands for it
        raise BadTensors("'names' is not an array of texts in compact JSON")
    if len(names) > most:
        raise BadTensors(f"a list of {len(names)} sites, where {most} were asked")
    return list(names)
