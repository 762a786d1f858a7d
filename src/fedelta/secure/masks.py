"""Masks: the keystream of AES-256 in counter mode, added to vectors of integers modulo 2^16, 2^32 or 2^64.

The PRG of secure aggregation (Bonawitz et al., CCS 2017, section 4): the whole 32-byte key enters, and the nonce is
zero, so that a key must be used for one sum only. Each word of the keystream is one element of the ring, low byte first
on every machine; there is nothing to reject and nothing to reduce. Limits: the mask hides what it is added to and does
not authenticate it; keystream lies in memory until its buffer is freed and overwritten.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedelta.core.errors import BadInput, BadTensors

KEY_BYTES = 32
_CHUNK = 2**16  # bytes of keystream at a time: these, as many zeros and the part of the vector stay in the L2 cache
_ZEROS = memoryview(bytes(_CHUNK))  # what is encrypted; AES in counter mode adds its keystream to it by XOR
_WORDS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(wide): np.dtype(wide).newbyteorder("<") for wide in (np.int16, np.int32, np.int64)
}


def add_mask(vectors: Sequence[NDArray[Any]], key: bytes, sign: int) -> None:
    """Add the mask of `key` (32 bytes) to `vectors` in place, or take it off: `sign` is +1 or -1.

    One keystream runs over all vectors in order, as many bytes as they have; sums wrap. Vectors are
    contiguous in C order, of any shape, and do not overlap; BadTensors otherwise, BadInput for another key length or
    sign. Nothing has been changed when an error is raised.
    """
    if len(key) != KEY_BYTES:  # its length only: a message never shows a key
        raise BadInput(f"the key of a mask has {KEY_BYTES} bytes, got {len(key)}")
    if sign not in (1, -1):
        raise BadInput(f"the sign of a mask must be 1 or -1, got {sign}")
    for vector in vectors:
        _check(vector)
    keystream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    combine = np.add if sign == 1 else np.subtract
    buffer = bytearray(_CHUNK)
    into = memoryview(buffer)
    for vector in vectors:
        flat = vector.reshape(-1)  # a view, as the vector is contiguous
        mask = np.frombuffer(buffer, _WORDS[vector.dtype])
        for start in range(0, flat.size, mask.size):
            part = flat[start : start + mask.size]
            keystream.update_into(_ZEROS[: part.nbytes], into)
            combine(part, mask[: part.size], out=part)


def _check(vector: NDArray[Any]) -> None:
    if vector.dtype not in _WORDS:
        raise BadTensors(f"a masked vector is int16, int32 or int64, got {vector.dtype}")
    if not (vector.flags.c_contiguous and vector.flags.writeable):
        raise BadTensors(
            f"a masked vector is contiguous and can be written, got one of shape {vector.shape} that is not"
        )
