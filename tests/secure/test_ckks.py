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
    return np.concatenate([ckks.numbers_of(one, PRECISION.slot_noise) for one in found])


@pytest.mark.parametrize("count", [1, PER - 1, PER, PER + 1])
def test_sums_are_exact_at_the_bounds(count: int) -> None:
    total, expected = Total(), np.zeros(count)
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


@pytest.mark.parametrize("most", [2, 0, 10_001, 16_000])
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


def coefficients(rows: np.ndarray) -> np.ndarray:
    """By Python's whole numbers: [polynomial, modulus, place] of the first ciphertext."""
    data = rows[0].tobytes()
    found = [int.from_bytes(data[start : start + 6], "little") for start in range(0, len(data), 6)]
    return np.array(found, dtype=np.uint64).reshape(2, 2, ckks.DEGREE)


def with_coefficients(found: np.ndarray) -> np.ndarray:
    data = b"".join(int(each).to_bytes(6, "little") for each in found.reshape(-1))
    return np.frombuffer(data, np.uint8).reshape(1, WIDTH).copy()


def moduli() -> list[int]:
    data = ckks._scheme().context.first_context_data().parms().coeff_modulus()
    return [modulus.value() for modulus in data]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (ROW[:, :-1], f"rows of {WIDTH} bytes"),
        (ROW.astype(np.int16), f"rows of {WIDTH} bytes"),
        (ROW[0], f"rows of {WIDTH} bytes"),
        (np.zeros_like(ROW), "transparent"),
        (np.full_like(ROW, 255), "not below its modulus"),
    ],
)
def test_malformed_ciphertexts_are_refused(rows: np.ndarray, sentence: str) -> None:
    for take in (lambda: ckks.read(rows, PRECISION.scale), lambda: Total().add(rows)):
        with pytest.raises(BadTensors, match=sentence):
            take()


@pytest.mark.parametrize("polynomial", [0, 1])
@pytest.mark.parametrize("modulus", [0, 1])
def test_a_coefficient_is_below_its_modulus(polynomial: int, modulus: int) -> None:
    found = coefficients(ROW)
    found[polynomial, modulus, 7] = moduli()[modulus] - 1
    ckks.read(with_coefficients(found), PRECISION.scale)
    found[polynomial, modulus, 7] += np.uint64(1)
    with pytest.raises(BadTensors, match="not below its modulus"):
        ckks.read(with_coefficients(found), PRECISION.scale)


def test_a_ciphertext_without_a_second_polynomial_is_refused_and_the_sum_stays() -> None:
    found = coefficients(ROW)
    found[1] = 0
    bare = with_coefficients(found)
    total = Total()
    total.add(ROW)
    for take in (lambda: ckks.read(bare, PRECISION.scale), lambda: total.add(bare)):
        with pytest.raises(BadTensors, match="transparent"):
            take()
    assert (total.count, opened(total.rows())[:4].tolist()) == (1, [1, 1, 1, 0])


def test_a_sum_that_became_transparent_is_no_error_of_the_library() -> None:
    found = coefficients(ROW)
    for place, modulus in enumerate(moduli()):
        found[:, place] = (modulus - found[:, place].astype(object)) % modulus
    total = Total()
    total.add(ROW)
    total.add(with_coefficients(found))
    assert not total.rows().any()
    with pytest.raises(BadTensors, match="transparent"):
        ckks.read(total.rows(), PRECISION.scale)


def test_what_travels_is_what_the_library_has_encrypted() -> None:
    (one,) = ckks.read(ROW, PRECISION.scale)
    array = one.dyn_array()
    assert np.array_equal(coefficients(ROW).reshape(-1), [array[place] for place in range(array.size())])
    assert (one.size(), one.scale, one.is_ntt_form()) == (2, PRECISION.scale, True)
    assert one.parms_id() == ckks._scheme().context.first_parms_id()


def test_a_sum_is_that_of_the_library() -> None:
    other = PUBLIC.encrypted(numbers(PER))
    total = Total()
    total.add(ROW)
    total.add(other)
    (mine, one, two) = (ckks.read(rows, PRECISION.scale)[0].dyn_array() for rows in (total.rows(), ROW, other))
    expected = ckks._seal().Ciphertext()
    ckks._scheme().evaluator.add(*(ckks.read(rows, PRECISION.scale)[0] for rows in (ROW, other)), expected)
    array = expected.dyn_array()
    assert [mine[place] for place in range(500)] == [array[place] for place in range(500)]
    assert mine.size() == one.size() == two.size() == array.size()


def test_nothing_of_another_is_inflated() -> None:
    """What the library reads says itself that it is not compressed, whatever the bytes of others are."""
    for rows in (ROW, with_coefficients(np.minimum(coefficients(ROW), 2**40))):
        serial = ckks._scheme().serial(ckks.residues(rows)[0], PRECISION.scale)
        nested = serial.index(b"\x5e\xa1", 1)
        for start in (0, nested):  # magic, length of the header, version, compression, and the length of all
            assert (serial[start : start + 2], serial[start + 5]) == (b"\x5e\xa1", 0)
            assert int.from_bytes(serial[start + 8 : start + 16], "little") == len(serial) - start


@settings(max_examples=40, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, WIDTH - 1), st.integers(1, 255)), min_size=1, max_size=4),
    body=st.binary(max_size=40),
)
def test_whatever_bytes_come_they_are_a_ciphertext_or_refused(changes: list[tuple[int, int]], body: bytes) -> None:
    rows = ROW.copy()
    for place, value in changes:
        rows[0, place] ^= value
    rows[0, 400 : 400 + len(body)] = np.frombuffer(body, np.uint8)
    limits = np.array(moduli(), dtype=np.uint64)[:, None]
    if (coefficients(rows) < limits).all():
        (one,) = ckks.read(rows, PRECISION.scale)
        assert one.size() == 2
    else:
        with pytest.raises(BadTensors):
            ckks.read(rows, PRECISION.scale)


def test_what_is_not_near_whole_numbers_is_not_released() -> None:
    noise = PRECISION.slot_noise
    slots = np.zeros(PER // 2, dtype=np.complex128)
    slots[3], slots[4] = 5 + 7.9j * noise, -2 - 7.9 * noise
    found = ckks.numbers_of(slots, noise)
    assert (found[3], found[4], np.abs(found).sum()) == (5, -2, 7)
    for far in (8.1 * noise, 8.1j * noise, -0.5, np.nan):
        with pytest.raises(BadTensors, match="does not decrypt to whole numbers"):
            ckks.numbers_of(np.where(np.arange(PER // 2) == 9, far, slots), noise)


def test_ciphertexts_of_another_number_are_not_added() -> None:
    total = Total()
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
    found = {queue.get(timeout=120) for _ in children}
    for child in children:
        child.join()
    assert len(found) == 2
