"""Where the randomness comes from on which a privacy guarantee rests.

In a simulation it is derived from the seed, as all else is, so that a run can be repeated. Whoever knows the seed can
take such noise away again: where a guarantee is meant, it has to come from the operating system of the party that is
protected.
"""

import math
import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedelta.core.errors import BadInput
from fedelta.core.seeds import Part, generator

# Elements that are worked on at a time: a multiple of 16, which is the block that PyTorch draws (see `_pieces`).
_PIECE = 2**15
_BLOCK = 16
_ZEROS = bytes(8 * (_PIECE + _BLOCK))
_GRID_BITS = 20


class Noise(Protocol):
    """A source of independent draws; every call goes on where the last one ended."""

    def add_normal(self, values: Tensor, std: float) -> None:
        """Add N(0, std^2) to each element of `values` (float32 or float64, on the CPU), in place.

        `std` is 0 or from 1e-30 to 1e30.
        """
        ...

    def chosen(self, n: int, rate: float) -> Tensor:
        """Those of 0..n-1, in order (int64), that are drawn when each is with probability `rate`, independently."""
        ...

    def words(self, n: int) -> Tensor:
        """n independent uniform numbers over the whole range of int64."""
        ...


class SeededNoise:
    """A function of (seed, path): for simulations."""

    def __init__(self, seed: int, *path: Part) -> None:
        self._generator = generator(seed, *path)

    def add_normal(self, values: Tensor, std: float) -> None:
        """As `Noise` says: what `torch.randn` draws for all of `values`, but with a bounded part of it in memory."""
        _check_std(std)
        for piece in _pieces(values):
            piece.add_(torch.randn(len(piece), generator=self._generator, dtype=piece.dtype), alpha=std)

    def chosen(self, n: int, rate: float) -> Tensor:
        _check_rate(rate)
        draws = torch.rand(n, generator=self._generator, dtype=torch.float64)
        return (draws < rate).nonzero().squeeze(1)

    def words(self, n: int) -> Tensor:
        return torch.empty(n, dtype=torch.int64).random_(-(2**63), None, generator=self._generator)


class SystemNoise:
    """From the operating system: nobody can repeat it or take it away.

    The draws are a ChaCha20 keystream, and every piece of it has a key of its own from `os.urandom`. An object has no
    state, so that one that was copied, or came into another process by a fork, draws nothing twice.

    Gaussians are those of Box & Muller (1958) in float64. Arithmetic on them can betray what they hide, because not
    every number can be reached from every value (Mironov, CCS 2012; Jin et al., IEEE S&P 2022, for Gaussians and
    DP-SGD). Holohan & Braghin (ESORICS 2021) add up several draws, so that nobody can search for those that lead to an
    output. Here the sum of value and noise is rounded to a multiple of g, a power of two that depends on `std` alone
    (2^-21 std < g <= 2^-20 std), which costs less and covers the low bits of the sum as well. While the values stay
    below 2^31 std, each multiple of g around them has a great many draws that lead to it, whatever the value was, and
    no bit below g is left that could tell. To round an output is to process it: it takes nothing from a guarantee.

    Limits: this is a defence, not a proof for finite arithmetic. The probability of a multiple of g differs from that
    under the exact Gaussian by what float64 rounds, about 2^-25 of it; no draw lies beyond 9.42 std (an exact Gaussian
    does with probability 5e-21). A mechanism with neither is the discrete Gaussian (Canonne et al., NeurIPS 2020).
    The time of a call depends on the number of elements and hardly on what was drawn. Keys and draws are not wiped
    from memory.
    """

    def add_normal(self, values: Tensor, std: float) -> None:
        _check_std(std)
        if std == 0:
            return
        grid = math.ldexp(1.0, math.frexp(std)[1] - 1 - _GRID_BITS)
        for piece in _pieces(values):
            noisy = _normals(len(piece)).mul_(std).add_(piece)
            piece.copy_(noisy.mul_(1 / grid).round_().mul_(grid))  # by powers of two: exact

    def chosen(self, n: int, rate: float) -> Tensor:
        """As `Noise` says, where the probability is `rate` rounded down to a multiple of 2^-64."""
        _check_rate(rate)
        if rate == 1:
            return torch.arange(n)
        limit = int(math.ldexp(rate, 64)) - 2**63  # words are signed
        starts = range(0, n, _PIECE)
        found = [(_words(min(_PIECE, n - start)) < limit).nonzero().squeeze(1) + start for start in starts]
        return torch.cat([torch.empty(0, dtype=torch.int64), *found])

    def words(self, n: int) -> Tensor:
        return _words(n)


def _normals(n: int) -> Tensor:
    """Independent N(0, 1) in float64."""
    words = _words(2 * ((n + 1) // 2)).view(2, -1)
    # 63 bits and a half: never 0, and small ones have all of their digits
    uniform = words[0].bitwise_and_(2**63 - 1).double().add_(0.5).mul_(2.0**-63)
    radius = uniform.log_().mul_(-2).sqrt_()
    angle = words[1].double().mul_(math.pi * 2.0**-63)
    return torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)])[:n]


def _words(n: int) -> Tensor:
    """Uniform int64 over all their range."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    words = torch.empty(n, dtype=torch.int64)
    for start in range(0, n, _PIECE + _BLOCK):
        piece = words[start : start + _PIECE + _BLOCK]
        stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
        stream.update_into(memoryview(_ZEROS)[: 8 * len(piece)], piece.numpy().view(np.uint8).data)
    return words


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """The elements of `values` in their order, as vectors to be changed in place.

    Each but the last has _PIECE, and the last at least _BLOCK if there are so many at all: `torch.randn` then draws for
    one after the other what it would draw for all of them. Values that are not contiguous are written when all pieces
    are done.
    """
    if values.dtype not in (torch.float32, torch.float64) or values.device.type != "cpu":
        raise BadInput(f"noise is added to float32 or float64 on the CPU, not to {values.dtype} on {values.device}")
    flat = values.detach().reshape(-1)
    yield from flat.tensor_split(list(range(_PIECE, len(flat) - _BLOCK + 1, _PIECE)))
    if not values.is_contiguous():
        values.detach().copy_(flat.view(values.shape))


def _check_std(std: float) -> None:
    if not (std == 0 or 1e-30 <= std <= 1e30):
        raise BadInput(f"the standard deviation of noise must be 0 or from 1e-30 to 1e30, got {std}")


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise BadInput(f"a rate must be from 0 to 1, got {rate}")
