"""A secret of 32 bytes in shares: any `threshold` of them give it back, and fewer say nothing of it.

Shamir, "How to share a secret" (CACM 1979), over the integers modulo 2^256 + 297, the least prime above 2^256: every
secret of 32 bytes is one field element, and a share takes 33 bytes (big-endian). Limits: nobody can tell a share that
is genuine, so whoever puts a secret together checks it against a commitment or a public key; and Python's integers do
not take constant time, so no secret may be split or combined where others can measure that.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedelta.core.errors import BadInput, BadTensors

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, points: Sequence[int], threshold: int) -> list[bytes]:
    """The shares of `secret` (32 bytes) at `points` (distinct, from 1 to PRIME - 1), 33 bytes each, in their order.

    They are the values of a polynomial of degree `threshold` - 1 whose other coefficients are drawn uniformly from the
    operating system's generator, afresh at every call. Raises BadInput for a secret of another length, points that are
    not as above, or a threshold that is not from 1 to the number of points.
    """
    if len(secret) != SECRET_BYTES:  # its length only: a message never shows a secret
        raise BadInput(f"a secret to share has {SECRET_BYTES} bytes, got {len(secret)}")
    _check_points(points)
    if not 1 <= threshold <= len(points):
        raise BadInput(f"the threshold must be from 1 to the number of shares, {len(points)}, got {threshold}")
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(coefficients, point).to_bytes(SHARE_BYTES) for point in points]


@dataclass(frozen=True)
class Interpolation:
    """Puts together any number of secrets that were shared at the same points; Lagrange's coefficients are taken once.

    `points` are distinct, at least one, from 1 to PRIME - 1; BadInput otherwise.
    """

    points: Sequence[int]
    coefficients: tuple[int, ...] = field(init=False, repr=False)  # of the value at 0; public, as the points are

    def __post_init__(self) -> None:
        _check_points(self.points)
        object.__setattr__(self, "points", tuple(self.points))
        object.__setattr__(self, "coefficients", tuple(self._coefficient(point) for point in self.points))

    def at_zero(self, shares: Sequence[bytes]) -> bytes:
        """The secret (32 bytes) of `shares`, in the order of `points`: all of them are used.

        From at least `threshold` genuine shares it is the one that was split; from fewer, or with a forged one among
        them, it is another, or BadTensors is raised, as it is for shares that are not 33 bytes below PRIME.
        """
        if len(shares) != len(self.points):
            raise BadTensors(f"there must be one share for each of {len(self.points)} points, got {len(shares)}")
        terms = zip(self.coefficients, shares, strict=True)
        secret = sum(coefficient * _element(share) for coefficient, share in terms) % PRIME
        if secret >> (8 * SECRET_BYTES):  # what was split was below 2^256
            raise BadTensors("the shares do not belong together: they are of no secret of 32 bytes")
        return secret.to_bytes(SECRET_BYTES)

    def _coefficient(self, point: int) -> int:
        """The product over the other points x of x / (x - point) modulo PRIME."""
        others = [other for other in self.points if other != point]
        below = math.prod(other - point for other in others)
        return math.prod(others) * pow(below, -1, PRIME) % PRIME


def _value(coefficients: Sequence[int], point: int) -> int:
    """The polynomial with these coefficients, the constant first, at `point` (Horner)."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def _element(share: bytes) -> int:
    if len(share) != SHARE_BYTES or (element := int.from_bytes(share)) >= PRIME:
        raise BadTensors(f"a share has {SHARE_BYTES} bytes and is below the prime, got {len(share)} bytes that are not")
    return element


def _check_points(points: Sequence[int]) -> None:
    if not points:
        raise BadInput("a secret is shared at one point at least, got none")
    if len(set(points)) != len(points):
        raise BadInput(f"the points of shares must be distinct, got {list(points)}")
    if not all(1 <= point < PRIME for point in points):  # the value at 0 is the secret itself
        raise BadInput(f"the points of shares must be from 1 to the prime less 1, got {list(points)}")
