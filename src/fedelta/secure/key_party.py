"""The party that has the key: it opens sums of encrypted updates, and nothing else.

A key that every site holds would let one site that works together with the coordinator open everything that reaches
it. So one party apart makes the key. Sites encrypt with its public key; the coordinator adds ciphertexts up, and sends
the sum to this party, which adds noise, decrypts, rounds (ckks.py), and gives the coordinator the sum.

Limits: it is trusted to keep to that, and not to work together with the coordinator: the two of them can open the
update of each site. It cannot tell a sum over many sites from the ciphertext of one: that what it is told of a sum is
true is the coordinator's word. What it refuses (sums of few sites, a second sum of a round, more ciphertexts than its
noise is meant for) is against mistakes, and against a coordinator that is honest but curious.

It does not release what is not near whole numbers, or beyond what such sites add up to. Who adds a multiple of the
secret key to the whole of a ciphertext, which takes one lying site, has it refused. Who does so in a few of its numbers
a round passes often enough, and has the key after many rounds: there the protection ends.
"""

import errno
import fcntl
import json
import os
import threading
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.noise import SystemNoise
from fedelta.secure import ckks
from fedelta.secure.ckks import OPENINGS, Precision, PublicKey, SecretKey

SECRET, PUBLIC, OPENED = "secret.key", "public.key", "opened.jsonl"


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What sum it is that is to be opened."""

    job: str
    round: int
    op: str
    attempt: int
    sites: int  # whose updates are in it


class Opener(Protocol):
    """The key party as the coordinator sees it: here, or at the other end of a connection."""

    def opened(self, statement: Statement, ciphertexts: Tensor) -> Tensor:
        """The whole numbers, int64 [places, PER], of a sum: uint8 [places, WIDTH] (see ckks.py).

        Raises BadInput, with the reason, for what it does not open.
        """
        ...


class KeyParty:
    """Has a key pair of its own making, for sums over `least` to `most` sites.

    The secret key is in its process alone: it is neither pickled nor, after a fork, in the other process. `once`: of
    each kind of request, one sum is opened in a round. A coordinator's simulation, where rounds are repeated at will
    and sites answer once, goes without it.
    """

    def __init__(self, *, most: int = 128, least: int = 3, once: bool = True) -> None:
        self._begin(*ckks.new_pair(Precision(most=most)), least, once)

    def _begin(self, secret: SecretKey, public: PublicKey, least: int, once: bool) -> None:
        if least < 3:
            raise BadInput(f"KeyParty.least must be at least 3, got {least}: a sum of two tells both")
        self._secret: SecretKey | None = secret
        self._public, self._once, self.least = public, once, least
        self._opened: set[tuple[str, int, str]] = set()
        self._count = 0  # of ciphertexts
        self._lock = threading.Lock()  # of what is remembered: a sum is checked and noted in one step
        self._file: _Opened | None = None
        _PARTIES.add(self)

    @classmethod
    def read(cls, folder: Path | str, *, least: int = 3) -> "KeyParty":
        """The one whose keys `new_keys` wrote; what it has opened is remembered in that folder, too.

        Until it is closed, or gone, no other has this folder. Raises BadInput if another has it, if files are missing
        or unreadable, or if others than their owner may read the secret key.
        """
        folder = Path(folder)
        secret = folder / SECRET
        try:
            if secret.stat().st_mode & 0o077:
                raise BadInput(f"others than its owner may read {secret}; run: chmod 600 {secret}")
            public = PublicKey.read((folder / PUBLIC).read_bytes())
            file = _Opened(folder / OPENED)
        except OSError as error:
            raise BadInput(f"the keys in {folder} cannot be read ({error.strerror}); make them with new_keys") from None
        party = cls.__new__(cls)
        try:
            party._begin(SecretKey.load(secret), public, least, True)
            for statement, count in file.known():
                party._note(statement, count)
        except BadInput:
            file.close()
            raise
        party._file = file
        return party

    def close(self) -> None:
        """Forget the secret key, and let go of the folder."""
        with self._lock:
            self._forget()

    @property
    def public(self) -> bytes:
        """What sites encrypt with, without the secret key."""
        return self._public.written()

    def opened(self, statement: Statement, ciphertexts: Tensor) -> Tensor:
        """As `Opener` says. What is opened is remembered, and where there is a folder written there, before."""
        precision = self._public.precision
        self._check(statement, len(ciphertexts))  # before the work of reading them
        sums = ckks.read(ciphertexts.detach().cpu().numpy(), precision.scale)  # all of them, before one is decrypted
        with self._lock:
            self._check(statement, len(sums))
            if self._file is not None:
                self._file.append(statement, len(sums))
            self._note(statement, len(sums))
        found = [ckks.numbers_of(self._flooded(one), precision.slot_noise) for one in sums]
        numbers = np.array(found, dtype=np.int64).reshape(-1, ckks.PER)
        if np.any(np.abs(numbers) > statement.sites * 2**precision.bits):
            raise BadTensors(f"a number in it is beyond what {statement.sites} sites can add up to")
        return torch.from_numpy(numbers)

    def _flooded(self, ciphertext: Any) -> NDArray[np.complex128]:
        """What it decrypts to, with noise, before anything is rounded."""
        secret = self._key()
        precision = self._public.precision
        noise = torch.zeros(ckks.PER, dtype=torch.float64)
        SystemNoise().add_normal(noise, precision.slot_noise)
        real, imaginary = noise.numpy().reshape(2, -1)
        return secret.flooded(ciphertext, real + 1j * imaginary, precision.scale)

    def _key(self) -> SecretKey:
        if self._secret is None:
            raise BadInput(
                "the secret key is in the process in which the key party was made, until it is closed; open sums there"
            )
        return self._secret

    def _check(self, statement: Statement, count: int) -> None:
        self._key()  # or what is refused would count as opened
        sites, most = statement.sites, self._public.precision.most
        if not self.least <= sites <= most:
            raise BadInput(f"the key party opens sums over {self.least} to {most} sites, and this is one over {sites}")
        if self._once and _kind(statement) in self._opened:
            raise BadInput(
                f"the key party has opened a sum of round {statement.round} ({statement.op}) before: two of them could "
                "tell the update of a site"
            )
        if self._count + count > OPENINGS:
            raise BadInput(
                f"the key party has opened {self._count:,} ciphertexts, and its noise is meant for {OPENINGS:,}; go on "
                "with a new key"
            )

    def _note(self, statement: Statement, count: int) -> None:
        self._opened.add(_kind(statement))
        self._count += count

    def __repr__(self) -> str:
        return f"KeyParty(most={self._public.precision.most}, least={self.least})"

    def __reduce__(self) -> Any:
        raise TypeError("a key party stays in its process; what travels is its public key")

    def _forget(self) -> None:
        self._secret = None
        if self._file is not None:  # in a fork, too: or it would keep the folder after this process has ended
            self._file.close()
            self._file = None


def new_keys(folder: Path | str, *, most: int = 128) -> Path:
    """Make the keys of a key party for sums over at most `most` sites, in a new folder; returns the public one's file.

    They are for one run, as of each round one sum is opened. The secret key is not encrypted: only its owner may read
    the file. Raises BadInput if the folder is there already or cannot be made.
    """
    folder = Path(folder)
    secret, public = ckks.new_pair(Precision(most=most))
    try:
        folder.mkdir(mode=0o700)
        for name, mode in ((SECRET, 0o600), (PUBLIC, 0o644), (OPENED, 0o600)):
            os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        secret.save(folder / SECRET)  # into the file that is there, with its mode
        (folder / PUBLIC).write_bytes(public.written())
        for each in (folder / SECRET, folder / PUBLIC, folder, folder.parent):
            _sync(each)
    except FileExistsError:
        raise BadInput(f"{folder} is there already; choose another name, so that no key is lost") from None
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror}; choose a place that is there") from None
    return folder / PUBLIC


def _kind(statement: Statement) -> tuple[str, int, str]:
    """Without the attempt: sums of two attempts at one round differ by single sites."""
    return statement.job, statement.round, statement.op


class _Opened:
    """The file of what was opened, which one process has at a time."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and BadInput if another has it."""
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        self._closed = weakref.finalize(self, os.close, self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise BadInput(
                f"another key party has {path.parent} open; end it first, or both could open a sum of the same round"
            ) from None

    def known(self) -> list[tuple[Statement, int]]:
        """What was opened, each with its number of ciphertexts. Raises BadInput for a line that is none.

        A last line without an end was being written when the machine stopped. Nothing was opened for it yet, as that
        waits until a line is on disk, and it is dropped.
        """
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.ftruncate(self._descriptor, len(whole))
            os.fsync(self._descriptor)
        found = []
        for line in whole.splitlines():
            try:
                known = json.loads(line)
                found.append((Statement(**known["sum"]), int(known["ciphertexts"])))
            except (ValueError, TypeError, KeyError):
                raise BadInput(f"{self._path} has a line that cannot be read: {line[:80]!r}") from None
        return found

    def append(self, statement: Statement, count: int) -> None:
        """Durably. Raises BadInput if that cannot be, and leaves the file as it was."""
        line = json.dumps({"sum": asdict(statement), "ciphertexts": count}).encode() + b"\n"
        before = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            raise BadInput(
                f"{self._path} cannot be written ({error.strerror}), and without it no sum is opened"
            ) from None

    def close(self) -> None:
        self._closed()


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _after_fork() -> None:
    for party in list(_PARTIES):
        party._lock = threading.Lock()  # another thread may have held it
        party._forget()


_PARTIES: "weakref.WeakSet[KeyParty]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)
