"""Masks: the keystream of AES-256-CTR, wrapping addition, cancellation, uniformity, and what is refused."""

import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedelta.core.errors import BadInput, BadTensors
from fedelta.secure.masks import add_mask

KEYS = st.binary(min_size=32, max_size=32)
KEY = bytes(range(32))
CHUNK = 2**16  # bytes; sizes are tried on both sides of it
SIZES = st.sampled_from([0, 1, 2, 3, 5, 17, 1000, CHUNK // 8 - 1, CHUNK // 8, CHUNK // 4, CHUNK // 4 + 1, CHUNK])


@st.composite
def vectors(draw):
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))

    def one():
        dtype = draw(st.sampled_from([np.int16, np.int32, np.int64]))
        limits = np.iinfo(dtype)
        return chance.integers(limits.min, limits.max, draw(SIZES), dtype=dtype, endpoint=True)

    return [one() for _ in range(draw(st.integers(0, 4)))]


def keystream(key, count):
    """`cryptography`'s own, over a whole buffer of zeros."""
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(count))


def expected(found, key, sign):
    """The sums taken without bounds, then reduced to the ring, element by element of one long keystream."""
    stream, start, sums = keystream(key, sum(vector.nbytes for vector in found)), 0, []
    for vector in found:
        mask = np.frombuffer(stream, f"<u{vector.itemsize}", vector.size, start)
        start += vector.nbytes
        unsigned = vector.astype(f"u{vector.itemsize}")
        sums.append((unsigned + mask if sign == 1 else unsigned - mask).astype(vector.dtype))
    return sums


@given(vectors(), KEYS, st.sampled_from([1, -1]))
@settings(max_examples=60, deadline=None)
def test_a_mask_is_one_keystream_over_all_vectors_modulo_the_ring(found, key, sign):
    masked = [vector.copy() for vector in found]
    add_mask(masked, key, sign)
    for got, want in zip(masked, expected(found, key, sign), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_the_keystream_is_the_cipher_of_a_counter_from_zero():
    blocks = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    counted = b"".join(blocks.update(count.to_bytes(16)) for count in range(CHUNK // 16 + 3))
    masked = np.zeros(len(counted) // 4, np.int32)
    add_mask([masked], KEY, 1)
    assert masked.astype("<i4").tobytes() == counted


def test_sums_wrap_as_integers_modulo_the_ring_do():
    for dtype, modulus in ((np.int16, 2**16), (np.int32, 2**32), (np.int64, 2**64)):
        limits = np.iinfo(dtype)
        vector = np.array([limits.max, limits.min, -1, 0, 1] * 20, dtype)
        mask = np.zeros_like(vector)
        add_mask([mask], KEY, 1)
        masked = vector.copy()
        add_mask([masked], KEY, 1)
        for got, value, word in zip(masked.tolist(), vector.tolist(), mask.tolist(), strict=True):
            assert (got - value - word) % modulus == 0


@given(vectors(), st.lists(st.tuples(KEYS, st.sampled_from([1, -1])), max_size=5), st.randoms())
@settings(max_examples=30, deadline=None)
def test_masks_come_off_in_any_order(found, masks, order):
    masked = [vector.copy() for vector in found]
    for key, sign in masks:
        add_mask(masked, key, sign)
    order.shuffle(masks)
    for key, sign in masks:
        add_mask(masked, key, -sign)
    for got, want in zip(masked, found, strict=True):
        np.testing.assert_array_equal(got, want)


def test_masks_of_pairs_cancel_in_the_sum_and_hide_each_term():
    chance = np.random.default_rng(0)
    inputs = [[chance.integers(-9, 9, 20_000, np.int32), chance.integers(-9, 9, 3)] for _ in range(4)]
    masked = [[vector.copy() for vector in terms] for terms in inputs]
    for i in range(4):
        for j in range(i + 1, 4):
            key = bytes([i, j] * 16)
            add_mask(masked[i], key, 1)
            add_mask(masked[j], key, -1)
    for part in (0, 1):
        np.testing.assert_array_equal(sum(m[part] for m in masked), sum(x[part] for x in inputs))
    assert all(np.mean(np.abs(terms[0].astype(float))) > 2**29 for terms in masked)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("value", [0, 12345, -1])
def test_what_is_masked_is_uniform(dtype, value):
    vector = np.full(2**17, value, dtype)
    add_mask([vector], KEY, 1)  # a fixed key: the figures are the same at every run
    bytes_of = vector.view(np.uint8).reshape(-1, vector.itemsize)
    for place in range(vector.itemsize):
        assert stats.chisquare(np.bincount(bytes_of[:, place], minlength=256)).pvalue > 1e-4
    scaled = vector.astype(np.float64) / 2.0 ** (8 * vector.itemsize) + 0.5
    assert stats.kstest(scaled, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(scaled[:-1], scaled[1:])[0, 1]) < 5 / len(vector) ** 0.5


def test_every_bit_of_the_key_counts():
    masks = set()
    for bit in range(256):  # among them keys that are equal when folded to 32 bits
        for other in (bit, (bit + 32) % 256):
            key = bytearray(KEY)
            key[bit // 8] ^= 1 << bit % 8
            key[other // 8] ^= (other != bit) << other % 8
            mask = np.zeros(4, np.int64)
            add_mask([mask], bytes(key), 1)
            masks.add(mask.tobytes())
    assert len(masks) == 512


def test_any_shape_and_none():
    plain, shaped, scalar = np.zeros(12, np.int64), np.zeros((2, 3, 2), np.int64), np.zeros((), np.int64)
    add_mask([plain], KEY, 1)
    add_mask([shaped[:0], shaped], KEY, 1)
    add_mask([scalar], KEY, -1)
    np.testing.assert_array_equal(shaped.ravel(), plain)
    assert scalar == -plain[0]
    add_mask([], KEY, 1)


def test_a_mask_is_never_held_as_a_whole():
    vector = np.zeros(2**20, np.int32)
    add_mask([vector[:1]], KEY, 1)
    tracemalloc.start()
    try:
        add_mask([vector], KEY, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * CHUNK < vector.nbytes / 8


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(31), bytes(33)])
def test_a_key_that_is_not_whole_is_refused(key):
    with pytest.raises(BadInput, match=f"32 bytes, got {len(key)}"):
        add_mask([np.zeros(1, np.int32)], key, 1)


@pytest.mark.parametrize("sign", [0, 2, -2])
def test_another_sign_is_refused(sign):
    with pytest.raises(BadInput, match=f"must be 1 or -1, got {sign}"):
        add_mask([np.zeros(1, np.int32)], KEY, sign)


def read_only():
    vector = np.zeros(4, np.int32)
    vector.flags.writeable = False
    return vector


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros(4), "float64"),
        (np.zeros(4, np.uint32), "uint32"),
        (np.zeros(4, np.int8), "int8"),
        (np.zeros(4, np.dtype(np.int32).newbyteorder()), "int32 or int64, got"),
        (np.zeros(8, np.int32)[::2], "contiguous"),
        (np.zeros((2, 3), np.int64).T, "contiguous"),
        (read_only(), "written"),
    ],
)
def test_what_cannot_be_masked_is_refused_before_anything_is_changed(wrong, message):
    first = np.zeros(4, np.int32)
    with pytest.raises(BadTensors, match=message):
        add_mask([first, wrong], KEY, 1)
    assert not first.any()
