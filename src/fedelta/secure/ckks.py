"""Whole numbers that are added up encrypted: CKKS (Cheon, Kim, Kim & Song, ASIACRYPT 2017), by TenSEAL's SEAL.

Parameters are for addition alone: ring degree 4096 with 109 bits of moduli in all, the most that SEAL's table (that of
the homomorphic encryption standard of 2018) gives 128 bits of security for; of these 92 are for data and 17 for the
modulus with which public keys are made. A ciphertext has 2048 complex slots, and so 4096 numbers.

What travels of a ciphertext is its coefficients, 6 bytes each, and nothing else: no header, no scale, no compression.
Bytes of others are compared with the moduli before the library sees them, and it never inflates them. Sums are made of
these coefficients, modulo the moduli, without the library.

A decryption of CKKS is off by an error that gives the secret key away (Li & Micciancio, Eurocrypt 2021). Two things
stand against that. Whoever decrypts first adds Gaussian noise to the ciphertext, whose standard deviation in each
coefficient is √(24 τ) 2^(s/2) |e|: the bound of Li, Micciancio, Schultz & Sorrell (CRYPTO 2022, section 4.4) for τ
ciphertexts that are ever decrypted with a key, s bits of security as Micciancio & Walter count them, and an error of
Euclidean norm |e| (they bound it by √N times the largest coefficient). Here τ = 2^20 and s = 40. As a statistical
distance over all τ that is 2^-23 (a divergence of 1 / (48 τ 2^s) for each of them, and Pinsker's inequality), not
2^-40. And what slots hold are whole numbers, spaced so widely that rounding takes error and noise away again: what is
released is then the exact sum, from which no key follows (Bossuat, Costache, Mouchet, Nürnberger &
Troncoso-Pastoriza, "Practical q-IND-CPA-D-Secure Approximate Homomorphic Encryption", 2024, for rounding by itself). A
number is off by one with a probability of 2^-75.

Limits: all of this is about honest ciphertexts. Whoever gets one of their own making into a sum, a single site too, can
read the key off the results, here as in all such schemes. What is not near whole numbers is not to be released
(`numbers_of`); that makes it slower, and does not prevent it.
"""

import functools
import math
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.extras import require

EXTRA, LIBRARY = "homomorphic", "tenseal"
DEGREE = 4096
PER = DEGREE  # numbers in a ciphertext: one in the real and one in the imaginary part of each of DEGREE / 2 slots
_POLYNOMIALS = 2  # of a ciphertext
_BYTES = 6  # of a coefficient, which has 46 bits
_SHAPE = (_POLYNOMIALS, 2, DEGREE)  # of its coefficients: polynomial, modulus, place
WIDTH = math.prod(_SHAPE) * _BYTES  # bytes of a ciphertext
OPENINGS = 2**20  # ciphertexts that may be decrypted with one key (τ)
STATISTICAL = 40  # bits of security of all of them together (s), as Micciancio & Walter count them
_MODULI = (46, 46, 17)  # bits; the last one is that of keys
_ROOM = 90  # bits of the largest sum: 2^92 less one for the sign, and one as a real and an imaginary part may add up
_ERROR = (
    32.0  # of one fresh encryption, root mean square over coefficients: √((N + 1) / 12) = 18.5 at the most, enlarged
)
_BEYOND = 10.0  # standard deviations between a whole number and where it would be taken for its neighbour
_FEWEST, _MOST = 3, 10_000  # sites; 16 bits are left for a number then
_NEAR = 8.0  # standard deviations up to which a number counts as near a whole one: one in 10^15 is beyond them
_HEADER = 16  # bytes of what the library writes before each object
_PUBLIC = b"fedelta ckks 1\n"  # what a public key begins with; 4 bytes for `most` and the key itself follow
_MAX_KEY = 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How large the whole numbers of a site may be where at most `most` sites are added up."""

    most: int = 128

    def __post_init__(self) -> None:
        if not _FEWEST <= self.most <= _MOST:
            raise BadInput(f"sums are over {_FEWEST} to {_MOST:,} sites at most, got most={self.most}")

    @property
    def noise(self) -> float:
        """The standard deviation of what is added to each coefficient before it is decrypted."""
        norm = _ERROR * math.sqrt(DEGREE * self.most)
        return math.sqrt(24 * OPENINGS * 2.0**STATISTICAL) * norm

    @property
    def slot_noise(self) -> float:
        """The standard deviation of that in a decrypted number, in units of whole numbers; at most 1/20."""
        return self.noise * math.sqrt(DEGREE / 2) / self.scale

    @property
    def scale(self) -> float:
        """By which whole numbers are multiplied: a power of two."""
        return math.ldexp(1.0, math.ceil(math.log2(2 * _BEYOND * self.noise * math.sqrt(DEGREE / 2))))

    @property
    def bits(self) -> int:
        """A whole number of a site is of magnitude at most 2^bits."""
        return _ROOM - int(math.log2(self.scale)) - math.ceil(math.log2(self.most))


def ciphertexts(numbers: int) -> int:
    """How many there are of so many numbers."""
    return -(-numbers // PER)


@dataclass(frozen=True, eq=False)
class PublicKey:
    """What sites encrypt with, and for sums over how many it is."""

    precision: Precision
    key: Any  # of the library

    @classmethod
    def read(cls, data: bytes) -> "PublicKey":
        """What `written` made. Raises BadInput for anything else."""
        start = len(_PUBLIC) + 4
        if not data.startswith(_PUBLIC) or len(data) > _MAX_KEY:
            raise BadInput("this is no public key of a key party; it is the file public.key that new_keys wrote")
        key = _seal().PublicKey()
        with _File() as file:
            file.write(data[start:])
            try:
                key.load(_scheme().context, file.path)
            except (RuntimeError, ValueError) as error:
                raise BadInput(f"the public key of the key party cannot be read: {error}") from None
        return cls(Precision(most=int.from_bytes(data[start - 4 : start], "little")), key)

    def written(self) -> bytes:
        with _File() as file:
            self.key.save(file.path)
            return _PUBLIC + self.precision.most.to_bytes(4, "little") + file.read()

    def encrypted(self, numbers: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Whole numbers of magnitude at most 2^bits as ciphertexts: [ceil(len / PER), WIDTH].

        The randomness is the operating system's.
        """
        scheme, scale = _scheme(), self.precision.scale
        encryptor = _seal().Encryptor(scheme.context, self.key)
        residues = np.zeros((ciphertexts(len(numbers)), *_SHAPE), dtype=np.uint64)
        for place, start in zip(residues, range(0, len(numbers), PER), strict=True):
            found = _seal().Ciphertext()
            encryptor.encrypt(scheme.encoded(_slots(numbers[start : start + PER]), scale), found)
            one = found.dyn_array().__getitem__
            place[...] = np.fromiter(map(one, range(place.size)), np.uint64, place.size).reshape(_SHAPE)
        return _packed(residues)


@dataclass(frozen=True, eq=False)
class SecretKey:
    """What decrypts. It is not shown, and does not leave its process but by `save`."""

    key: Any

    def __repr__(self) -> str:
        return "SecretKey(...)"

    def __reduce__(self) -> Any:
        raise TypeError("a secret key stays in its process")

    def save(self, path: Path) -> None:
        self.key.save(str(path))

    @classmethod
    def load(cls, path: Path) -> "SecretKey":
        key = _seal().SecretKey()
        try:
            key.load(_scheme().context, str(path))
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"{path} is no secret key of a key party ({error}); make one with new_keys") from None
        return cls(key)

    def flooded(self, ciphertext: Any, noise: NDArray[np.complex128], scale: float) -> NDArray[np.complex128]:
        """What it decrypts to, `noise` [DEGREE / 2] having been added before: an array like it."""
        scheme, plain = _scheme(), _seal().Plaintext()
        hidden = _seal().Ciphertext()
        scheme.evaluator.add_plain(ciphertext, scheme.encoded(noise, scale), hidden)
        _seal().Decryptor(scheme.context, self.key).decrypt(hidden, plain)
        return np.array(scheme.encoder.decode_complex(plain))


class Total:
    """Ciphertexts that are added up, one for each place."""

    def __init__(self) -> None:
        self.count = 0  # of what was added
        self._sums = np.zeros((0, *_SHAPE), dtype=np.uint64)

    def add(self, rows: NDArray[np.uint8]) -> None:
        """Add ciphertexts [places, WIDTH], as many as before. Raises BadTensors, and adds nothing, if one is none."""
        found = residues(rows)
        if self.count and len(found) != len(self._sums):
            raise BadTensors(f"there are {len(found)} ciphertexts, and {len(self._sums)} of others")
        if self.count:
            found += self._sums
            found %= _scheme().moduli
        self._sums = found
        self.count += 1

    def rows(self) -> NDArray[np.uint8]:
        return _packed(self._sums)


def new_pair(precision: Precision) -> tuple[SecretKey, PublicKey]:
    generator = _seal().KeyGenerator(_scheme().context)
    public = _seal().PublicKey()
    generator.create_public_key(public)
    return SecretKey(generator.secret_key()), PublicKey(precision, public)


def residues(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The coefficients [places, polynomial, modulus, DEGREE] of ciphertexts [places, WIDTH].

    Raises BadTensors for what no ciphertext of these parameters is: also for one that everybody can decrypt, whose
    second polynomial is zero.
    """
    if rows.ndim != 2 or rows.dtype != np.uint8 or rows.shape[1] != WIDTH:
        raise BadTensors(f"ciphertexts are rows of {WIDTH} bytes, got {rows.dtype} of shape {rows.shape}")
    wide = np.zeros((len(rows), *_SHAPE, 8), dtype=np.uint8)
    wide[..., :_BYTES] = rows.reshape(*wide.shape[:-1], _BYTES)
    found = wide.view("<u8")[..., 0].astype(np.uint64, copy=False)
    if np.any(found >= _scheme().moduli):
        raise BadTensors("a ciphertext is malformed: a coefficient is not below its modulus")
    if not found[:, 1].any(axis=(1, 2)).all():
        raise BadTensors("a ciphertext is transparent: it says what is in it without any key")
    return found


def read(rows: NDArray[np.uint8], scale: float) -> list[Any]:
    """The library's ciphertexts of [places, WIDTH]. Raises BadTensors as `residues` does."""
    scheme, found = _scheme(), []
    with _File() as file:
        for coefficients in residues(rows):
            file.write(scheme.serial(coefficients, scale))
            one = _seal().Ciphertext()
            try:
                one.load(scheme.context, file.path)  # which checks all of it again
            except (RuntimeError, ValueError) as error:
                raise BadTensors(f"{LIBRARY} cannot read a ciphertext: {error}") from None
            found.append(one)
    return found


def numbers_of(slots: NDArray[np.complex128], noise: float) -> NDArray[np.int64]:
    """The whole numbers [PER] next to what slots were decrypted to, `noise` being its standard deviation there.

    Raises BadTensors if one is farther off than noise takes it, as those of a sum of honest ciphertexts never are.
    """
    found = np.concatenate([slots.real, slots.imag])
    whole: NDArray[np.float64] = np.rint(found)
    if not np.all(np.abs(found - whole) <= _NEAR * noise):
        raise BadTensors("it does not decrypt to whole numbers; a ciphertext in it is of another key, or was altered")
    numbers: NDArray[np.int64] = whole.astype(np.int64)
    return numbers


def _packed(residues: NDArray[np.uint64]) -> NDArray[np.uint8]:
    wide = residues.astype("<u8", copy=False).view(np.uint8).reshape(*residues.shape, 8)
    return wide[..., :_BYTES].reshape(len(residues), WIDTH)


def _slots(numbers: NDArray[np.float64]) -> NDArray[np.complex128]:
    whole = np.zeros(PER)
    whole[: len(numbers)] = numbers
    return whole[: PER // 2] + 1j * whole[PER // 2 :]


@dataclass(frozen=True, eq=False)
class _Scheme:
    """The parameters, which all parties have in common."""

    context: Any
    encoder: Any
    evaluator: Any
    moduli: NDArray[np.uint64]  # [2, 1]: of the data
    version: bytes  # what the library's objects begin with

    def encoded(self, slots: NDArray[np.complex128], scale: float) -> Any:
        plain = _seal().Plaintext()
        self.encoder.encode(slots, scale, plain)
        return plain

    def serial(self, coefficients: NDArray[np.uint64], scale: float) -> bytes:
        """A ciphertext as the library (SEAL 4) reads it, not compressed."""
        body = coefficients.astype("<u8", copy=False).tobytes()
        array = self._headed(struct.pack("<Q", coefficients.size) + body)
        parameters = struct.pack("<4Q", *self.context.first_parms_id())
        shape = struct.pack("<?3QdQ", True, _POLYNOMIALS, DEGREE, len(self.moduli), scale, 1)
        return self._headed(parameters + shape + array)

    def _headed(self, body: bytes) -> bytes:
        return self.version + struct.pack("<BHQ", 0, 0, _HEADER + len(body)) + body  # 0: as it is


@functools.cache
def _scheme() -> _Scheme:
    seal = _seal()
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(DEGREE)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, list(_MODULI)))
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)  # refuses what is less secure than that
    assert context.parameters_set()
    moduli = [[modulus.value()] for modulus in context.first_context_data().parms().coeff_modulus()]
    with _File() as file:
        parameters.save(file.path)
        version = file.read()[:5]
    return _Scheme(
        context, seal.CKKSEncoder(context), seal.Evaluator(context), np.array(moduli, dtype=np.uint64), version
    )


def _seal() -> Any:
    require(EXTRA, LIBRARY)
    from tenseal import sealapi

    return sealapi


class _File:
    """A file in memory, where there is such a thing: the library writes to paths, and reads from them.

    Each use has its own: after a fork two processes would write to the same one.
    """

    def __enter__(self) -> Self:
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("ciphertext")
            self.path = f"/proc/self/fd/{self._descriptor}"
        else:
            self._descriptor, self.path = tempfile.mkstemp()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if not self.path.startswith("/proc/"):
            os.unlink(self.path)

    def write(self, data: bytes) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)

    def read(self) -> bytes:
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
