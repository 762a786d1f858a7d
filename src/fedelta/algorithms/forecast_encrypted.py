"""Encrypted updates, weighed and timed before one is sent.

Their size is a function of how many numbers they hold; what goes between the coordinator and the key party, which is as
much again for a whole cohort, is not told here.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedelta.algorithms.rehearsal import Piece
from fedelta.core import codec
from fedelta.core.grid import Terms
from fedelta.core.messages import PUBLIC
from fedelta.secure import ckks
from fedelta.secure.homomorphic import CIPHERTEXTS, FORM, HomomorphicEncryption
from fedelta.secure.ring import Form

LARGE = 1_000_000  # numbers of an update, from which on encryption is not what one wants
_TRIED = 3


@dataclass(frozen=True, kw_only=True)
class Encrypted:
    """One update."""

    numbers: int
    ciphertexts: int
    bytes: int
    expansion: float  # over its bytes in the clear
    seconds: float  # to encrypt it, on this machine
    bits: int  # of each number of a float32 vector

    @classmethod
    def of(cls, collect: HomomorphicEncryption, update: Sequence[Piece]) -> "Encrypted":
        """What becomes of `update`. Raises BadInput if the library is not installed."""
        form, found = _form(update), encrypted_bytes(collect, update, ())
        count = ckks.ciphertexts(collect.digits(Terms()).length(form))
        return cls(
            numbers=sum(form.float32.values()) + sum(form.float64.values()),
            ciphertexts=count,
            bytes=found,
            expansion=found / codec.size({piece.name: _blank(piece) for piece in update}),
            seconds=count * _seconds(collect),
            bits=collect.precision.bits,
        )


def encrypted_bytes(collect: HomomorphicEncryption, update: Sequence[Piece], public: Collection[str]) -> int:
    """Of an encrypted answer, where it consists of `update` in the clear; the sums `public` travel besides."""
    form = _form(update)
    places = ckks.ciphertexts(collect.digits(Terms()).length(form))  # whatever the bounds
    body = {
        CIPHERTEXTS: torch.zeros((), dtype=torch.uint8).expand(places, ckks.WIDTH),
        FORM: form.to_tensor(),
        **{PUBLIC + name: torch.zeros((), dtype=torch.float64) for name in public},
    }
    return codec.size(body)


def _seconds(collect: HomomorphicEncryption) -> float:
    """What one ciphertext takes."""
    key, numbers, found = ckks.new_pair(collect.precision)[1], np.ones(ckks.PER), []
    for _ in range(_TRIED):
        began = time.perf_counter()
        key.encrypted(numbers)
        found.append(time.perf_counter() - began)
    return min(found)


def _form(update: Sequence[Piece]) -> Form:
    return Form.of({piece.name: _blank(piece) for piece in update})


def _blank(piece: Piece) -> Tensor:
    return torch.zeros((), dtype=getattr(torch, piece.dtype)).expand(tuple(piece.shape))  # one number of memory
