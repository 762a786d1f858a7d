"""Whole numbers that are added up encrypted: CKKS (Cheon, Kim, Kim & Song, ASIACRYPT 2017), by TenSEAL's SEAL.

Parameters are for addition alone: ring degree 4096 with 109 bits of moduli in all, the most that SEAL's table gives
128 bits of security for; of these 92 are for data and 17 for the modulus with which public keys are made. A ciphertext
has 2048 complex slots, and so 4096 numbers.

A decryption of CKKS is off by an error that gives the secret key away (Li & Micciancio, Eurocrypt 2021). Two things
stand against that. Whoever decrypts first adds Gaussian noise to the ciphertext, whose standard deviation in each
coefficient is √(24 τ) 2^(s/2) |e|: the bound of Li, Micciancio, Schultz & Sorrell (CRYPTO 2022, section 4.4) for τ
ciphertexts that are ever decrypted with a key, s bits of statistical security, and an error of Euclidean norm |e| (they
bound it by √N times the largest coefficient). Here τ = 2^20 and s = 40. And what slots hold are whole numbers, spaced
so widely that rounding takes error and noise away again: what is released is then the exact sum, from which no key
follows (Bossuat, Costache, Mouchet, Nürnberger & Troncoso-Pastoriza, "Practical q-IND-CPA-D-Secure Approximate
Homomorphic Encryption", 2024, for rounding by itself). A number is off by one with a probability of 2^-75.

Limits: whoever may have ciphertexts of their own making decrypted can read the key off the results, here as in all
such schemes; that they are sums of honest encryptions has to be trusted.
"""

import functools
import math
import os
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
WIDTH = 112_640  # bytes of a ciphertext; its own are a few hundred less, and vary by some
OPENINGS = 2**20  # ciphertexts that may be decrypted with one key (τ)
STATISTICAL = 40  # bits of statistical security of all of them together (s)
_MODULI = (46, 46, 17)  # bits; the last one is that of keys
_ROOM = 90  # bits of the largest sum: 2^92 less one for the sign, and one as a real and an imaginary part may add up
_ERROR = (
    32.0  # of one fresh encryption, root mean square over coefficients: √((N + 1) / 12) = 18.5 at the most, enlarged
)
_BEYOND = 10.0  # standard deviations between a whole number and where it would be taken for its neighbour
_LEAST_BITS = 16
_TRIES = 8  # of encryptions that came out too long: one in 10^50
_HEADER, _MAGIC = 16, b"\x5e\xa1"  # of what the library writes; the last 8 bytes of it are the length in all
_PUBLIC = b"fedelta ckks 1\n"  # what a public key begins with; 4 bytes for `most` and the key itself follow
_MAX_KEY = 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How large the whole numbers of a site may be where at most `most` sites are added up."""

    most: int = 128

    def __post_init__(self) -> None:
        if self.most < 3 or self.bits < _LEAST_BITS:
            raise BadInput(f"sums are over 3 to 10,000 sites at most, got most={self.most}")

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
        rows = np.zeros((ciphertexts(len(numbers)), WIDTH), dtype=np.uint8)
        with _File() as file:
            for row, start in zip(rows, range(0, len(numbers), PER), strict=True):
                plain = scheme.encoded(_slots(numbers[start : start + PER]), scale)
                for _ in range(_TRIES):
                    found = _seal().Ciphertext()
                    encryptor.encrypt(plain, found)
                    if file.saved(found, row):
                        break
                else:
                    raise BadInput(
                        f"{LIBRARY} writes ciphertexts of more than {WIDTH} bytes here; install another build"
                    )
        return rows


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

    def __init__(self, scale: float) -> None:
        self.count = 0  # of what was added
        self._scale = scale
        self._sums: list[Any] = []

    def add(self, rows: NDArray[np.uint8]) -> None:
        """Add ciphertexts [places, WIDTH], as many as before. Raises BadTensors, and adds nothing, if one is none."""
        found = read(rows, self._scale)
        if self.count and len(found) != len(self._sums):
            raise BadTensors(f"there are {len(found)} ciphertexts, and {len(self._sums)} of others")
        if not self.count:
            self._sums = found
        else:
            for total, other in zip(self._sums, found, strict=True):
                _scheme().evaluator.add_inplace(total, other)
        self.count += 1

    def rows(self) -> NDArray[np.uint8]:
        rows = np.zeros((len(self._sums), WIDTH), dtype=np.uint8)
        with _File() as file:
            for row, total in zip(rows, self._sums, strict=True):
                if not file.saved(total, row):
                    raise BadTensors(f"a sum of ciphertexts takes more than {WIDTH} bytes")
        return rows


def new_pair(precision: Precision) -> tuple[SecretKey, PublicKey]:
    generator = _seal().KeyGenerator(_scheme().context)
    public = _seal().PublicKey()
    generator.create_public_key(public)
    return SecretKey(generator.secret_key()), PublicKey(precision, public)


def read(rows: NDArray[np.uint8], scale: float) -> list[Any]:
    """The ciphertexts of [places, WIDTH]. Raises BadTensors for what was not encrypted with these parameters."""
    if rows.ndim != 2 or rows.dtype != np.uint8 or rows.shape[1] != WIDTH:
        raise BadTensors(f"ciphertexts are rows of {WIDTH} bytes, got {rows.dtype} of shape {rows.shape}")
    context = _scheme().context
    found = []
    with _File() as file:
        for row in rows:
            data = row.tobytes()
            size = int.from_bytes(data[_HEADER - 8 : _HEADER], "little")
            if not data.startswith(_MAGIC) or not _HEADER < size <= WIDTH or any(data[size:]):
                raise BadTensors("a ciphertext is malformed")
            file.write(data[:size])
            one = _seal().Ciphertext()
            try:
                one.load(context, file.path)  # checks that all of it is as the parameters say
            except (RuntimeError, ValueError):
                raise BadTensors("a ciphertext is malformed, or of other parameters") from None
            if one.size() != 2 or one.parms_id() != context.first_parms_id() or one.scale != scale:
                raise BadTensors("a ciphertext is of another scale, or was worked on otherwise than by additions")
            found.append(one)
    return found


def numbers_of(slots: NDArray[np.complex128]) -> NDArray[np.int64]:
    """The whole numbers [PER] next to what slots were decrypted to."""
    whole: NDArray[np.int64] = np.rint(np.concatenate([slots.real, slots.imag])).astype(np.int64)
    return whole


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

    def encoded(self, slots: NDArray[np.complex128], scale: float) -> Any:
        plain = _seal().Plaintext()
        self.encoder.encode(slots, scale, plain)
        return plain


@functools.cache
def _scheme() -> _Scheme:
    seal = _seal()
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(DEGREE)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, list(_MODULI)))
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)  # refuses what is less secure than that
    assert context.parameters_set()
    return _Scheme(context, seal.CKKSEncoder(context), seal.Evaluator(context))


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

    def saved(self, ciphertext: Any, row: NDArray[np.uint8]) -> bool:
        """Whether a ciphertext fits into a row, where it then is."""
        ciphertext.save(self.path)
        data = np.frombuffer(self.read(), dtype=np.uint8)
        if len(data) > len(row):
            return False
        row[: len(data)] = data
        return True
