"""Whole numbers, encrypted and added up: what comes back, and what is refused."""

import math
import multiprocessing
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core.errors import BadInput, BadTensors
from fedelta.secure import ckks
from fedelta.secure.ckks import PER, WIDTH, Precision, PublicKey, Total

pytest.importorskip("tenseal")
PRECISION = Precision(most=10)
SECRET, PUBLIC = ckks.new_pair(PRECISION)
QUIET = np.zeros(PER // 2, dtype=np.complex128)


def numbers(count: int, seed: int = 0, bits: int = PRECISION.bits) -> np.ndarray:
    draw = np.random.default_rng(seed)
    found = draw.integers(-(2**bits), 2**bits, count, endpoint=True).astype(np.float64)
    found[:2] = (2.0**bits, -(2.0**bits))[: len(found)]
    return found


def opened(rows: np.ndarray) -> np.ndarray:
    """Without noise."""
    found = [SECRET.flooded(one, QUIET, PRECISION.scale) for one in ckks.read(rows, PRECISION.scale)]
    return np.concatenate([ckks.numbers_of(one) for one in found])


@pytest.mark.parametrize("count", [1, PER - 1, PER, PER + 1])
def test_sums_are_exact_at_the_bounds(count: int) -> None:
    total, expected = Total(PRECISION.scale), np.zeros(count)
    for site in range(PRECISION.most):
        own = numbers(count, site)
        expected += own
        total.add(PUBLIC.encrypted(own))
    found = opened(total.rows())
    assert np.array_equal(found[:count], expected)
    assert not found[count:].any()
    assert total.count == PRECISION.most


@pytest.mark.parametrize("most", [3, 10, 64, 128, 1000, 10_000])
def test_noise_is_as_much_as_the_paper_asks_for_and_rounding_takes_it_away(most: int) -> None:
    precision = Precision(most=most)
    largest = math.sqrt((ckks.DEGREE + 1) / 12)  # of the error of one encryption, root mean square: rounding × the key
    norm = largest * math.sqrt(most * ckks.DEGREE)
    assert precision.noise >= 1.5 * math.sqrt(24 * 2**20) * 2**20 * norm
    assert 10 * precision.slot_noise <= 0.5
    # √2: a real and an imaginary part in one slot
    assert math.sqrt(2) * most * 2**precision.bits * precision.scale + 2 * precision.noise * 10 < 2**91
    assert precision.bits >= 16


def test_parameters_are_as_large_as_128_bits_of_security_allow() -> None:
    seal = ckks._seal()
    assert sum(ckks._MODULI) == seal.CoeffModulus.MaxBitCount(ckks.DEGREE, seal.SEC_LEVEL_TYPE.TC128) == 109
    data = ckks._scheme().context.first_context_data().parms().coeff_modulus()
    assert math.prod(modulus.value() for modulus in data) > 2**91.9


def test_the_error_of_an_encryption_is_within_what_noise_is_made_for() -> None:
    for one in ckks.read(PUBLIC.encrypted(np.zeros(4 * PER)), PRECISION.scale):
        slots = SECRET.flooded(one, QUIET, PRECISION.scale) * PRECISION.scale
        coefficients = np.sqrt(np.mean(np.abs(slots) ** 2) / ckks.DEGREE)
        assert 10 < coefficients < math.sqrt((ckks.DEGREE + 1) / 12)


@pytest.mark.parametrize("most", [2, 0, 20_000])
def test_sums_of_too_many_are_refused(most: int) -> None:
    with pytest.raises(BadInput, match=f"3 to 10,000 sites at most, got most={most}"):
        Precision(most=most)


def test_a_public_key_is_read_as_it_was_written() -> None:
    data = PUBLIC.written()
    again = PublicKey.read(data)
    assert again.precision == PRECISION
    assert again.written()[:19] == data[:19]
    own = numbers(5)
    assert np.array_equal(opened(again.encrypted(own))[:5], own)


@pytest.mark.parametrize("change", [lambda data: b"", lambda data: data[:-9], lambda data: b"x" + data[1:]])
def test_no_other_bytes_are_a_public_key(change) -> None:
    with pytest.raises(BadInput, match="public key"):
        PublicKey.read(change(PUBLIC.written()))


ROW = PUBLIC.encrypted(np.ones(3))


def altered(place: int, value: int) -> np.ndarray:
    rows = ROW.copy()
    rows[0, place] ^= value
    return rows


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (ROW[:, :-1], "rows of 112640 bytes"),
        (ROW.astype(np.int16), "rows of 112640 bytes"),
        (ROW[0], "rows of 112640 bytes"),
        (np.zeros_like(ROW), "malformed"),
        (np.full_like(ROW, 255), "malformed"),
        (altered(0, 1), "malformed"),
        (altered(4, 1), "malformed"),
        (altered(WIDTH - 1, 1), "malformed"),
        (altered(10, 1), "malformed"),
        (altered(12, 1), "malformed"),
    ],
)
def test_malformed_ciphertexts_are_refused(rows: np.ndarray, sentence: str) -> None:
    with pytest.raises(BadTensors, match=sentence):
        ckks.read(rows, PRECISION.scale)


def test_a_ciphertext_of_another_scale_is_refused() -> None:
    with pytest.raises(BadTensors, match="another scale"):
        ckks.read(ROW, PRECISION.scale / 2)


@pytest.mark.parametrize("work", ["switched", "longer"])
def test_a_ciphertext_that_was_worked_on_is_refused(work: str) -> None:
    (one,) = ckks.read(ROW, PRECISION.scale)
    if work == "switched":  # to a smaller modulus
        one.scale = 2.0**20
        ckks._scheme().evaluator.mod_switch_to_next_inplace(one)
    else:  # a third polynomial, as after a product
        one.resize(3)
    rows = np.zeros_like(ROW)
    with ckks._File() as file:
        assert file.saved(one, rows[0])
    with pytest.raises(BadTensors, match="worked on otherwise than by additions"):
        ckks.read(rows, PRECISION.scale)


@settings(max_examples=40, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 255)), min_size=1, max_size=4),
    body=st.binary(max_size=40),
)
def test_whatever_bytes_come_they_are_a_ciphertext_or_refused(changes: list[tuple[int, int]], body: bytes) -> None:
    rows = ROW.copy()
    for place, value in changes:
        rows[0, place] ^= value
    rows[0, 400 : 400 + len(body)] = np.frombuffer(body, np.uint8)
    try:
        (one,) = ckks.read(rows, PRECISION.scale)
    except BadTensors:
        return
    assert one.size() == 2


def test_ciphertexts_of_another_number_are_not_added() -> None:
    total = Total(PRECISION.scale)
    total.add(ROW)
    with pytest.raises(BadTensors, match="there are 2 ciphertexts, and 1 of others"):
        total.add(np.concatenate([ROW, ROW]))
    assert total.count == 1
    assert np.array_equal(opened(total.rows())[:4], [1, 1, 1, 0])


def test_a_secret_key_is_neither_pickled_nor_shown() -> None:
    with pytest.raises(TypeError, match="stays in its process"):
        pickle.dumps(SECRET)
    assert repr(SECRET) == "SecretKey(...)"


def _encrypt(queue, rows: np.ndarray) -> None:
    queue.put(PUBLIC.encrypted(np.ones(1))[0, :4096].tobytes())


def test_processes_that_were_forked_draw_other_randomness() -> None:
    PUBLIC.encrypted(np.ones(1))  # all that is kept from one call to the next is there
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_encrypt, args=(queue, ROW)) for _ in range(2)]
    for child in children:
        child.start()
    found = {queue.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert len(found) == 2
