"""Privacy ledgers: what was released about some data, in memory or in a file that only grows.

The file has one JSON line for each release, and all jobs that use the same data share it:

    {"number":2,"before":"5f…","time":"2026-11-22T10:00:00.000000+00:00","release":{…},"seal":"8c…"}

`before` is the SHA-256 of the line before (of its bytes without the newline; the first line has a hash of the public
key there), and `seal` an Ed25519 signature (RFC 8032) of the line without its seal. A line is written and synced
under a lock before `record` returns. So a line without its newline, which a crash may leave at the end, belongs to a
`record` that never returned: nothing was released for it, and the next `record` cuts it off. A line that is there in
full counts, even if its process was killed before it released anything.

What the chain shows: a line that was altered, removed, added or moved by somebody who does not have the key. What it
cannot show by itself: that lines are missing at the end, that the file was deleted or put back from an older copy (it
then is what it was at that time), or that the owner of the key wrote all of it anew. For that, somebody else has to
remember how far it was: `head` is the hash of the last line and stands for all lines up to it. Whoever has noted it, or
the number of lines, can ask for it (`includes`, `at_least`). While an object is open, it notices a file that shrinks.

Without a key a seal is a hash of the line: that shows damage, and not what anybody changed on purpose.

Limits: POSIX only (`fcntl.flock`); on a network file system the lock is as good as the file system. A power cut on a
file system that keeps a later part of one write and loses an earlier one may leave a last line that is not torn but
wrong; it is refused as if it had been altered. An object re-reads only what was added since it last looked.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fedelta.core.errors import BadLedger, BudgetSpent, FedeltaError
from fedelta.core.release import Limit, Release
from fedelta.privacy.accounting import Account
from fedelta.privacy.chain import CURE, Seal, Tip, after, checked, line_of, read

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


class MemoryLedger:
    """A ledger that ends with the process: for simulations."""

    def __init__(self, limit: Limit | None = None) -> None:
        self._releases: list[Release] = []
        self._accounts: dict[Limit, Account] = {}
        self._limit = limit

    def releases(self) -> Sequence[Release]:
        return tuple(self._releases)

    def record(self, *releases: Release, within: Limit | None = None) -> None:
        """As `Ledger` says. Raises BadInput if one is not a release that can be accounted for."""
        found = [checked(release) for release in releases]
        self.check(found, within)
        self.add(found)

    def check(self, releases: Sequence[Release], within: Limit | None) -> None:
        """Raise BudgetSpent if recording these would pass a limit."""
        for limit in (self._limit, within):
            if limit is not None:
                self._check(releases, limit)

    def add(self, releases: Sequence[Release]) -> None:
        """Add what was recorded elsewhere, whether it passes the limit or not."""
        self._releases += releases

    def _check(self, releases: Sequence[Release], limit: Limit) -> None:
        budget, unit, of = limit.budget, limit.unit, limit.of
        account = self._accounts.setdefault(limit, Account(budget=budget, unit=unit, of=of))
        account.add(self._releases[account.recorded :])
        if account.fits(releases):
            return
        would = Account(budget=budget, unit=unit, of=of, releases=[*self._releases, *releases]).epsilon()
        raise BudgetSpent(
            f"this would bring epsilon for each {unit} from {account.epsilon():.4g} to {would:.4g} at "
            f"delta {budget.delta:g}, and the limit is {budget.epsilon:g}; stop here, or have the owner of the data "
            "raise it"
        )


class FileLedger:
    """A ledger in a file, see above. Any number of processes, jobs, threads and objects may share the file."""

    def __init__(self, path: Path, seal: "Seal", limit: Limit | None) -> None:
        """For `open`."""
        self.path = path
        self._seal = seal
        self._memory = MemoryLedger(limit)
        self._tip = Tip(head=seal.start)

    @classmethod
    def open(
        cls,
        path: Path | str,
        key: "Path | str | Ed25519PrivateKey | None",
        limit: Limit | None = None,
        *,
        at_least: int = 0,
        includes: str | None = None,
    ) -> "FileLedger":
        """Continue the ledger at `path`, or begin it if there is none.

        `key` is an Ed25519 private key or its PEM file (`new_key` of core/keys.py), the one that the ledger was
        begun with; None for a ledger whose lines are not signed. `at_least` is how many releases there must be,
        `includes` a `head` that was noted earlier; with either, a ledger that is not there is not begun.

        Raises BadLedger if the ledger is not what was recorded in it, or has fewer releases than it must.
        """
        path = Path(path)
        ledger = cls(path, Seal.of(key), limit)
        if not at_least and includes is None:
            _create(path)
        with _held(path) as file:
            found = [ledger._tip, *ledger._catch_up(file)]
        _check_whole(path, found, at_least, includes)
        return ledger

    @property
    def head(self) -> str:
        """The hash of the last line that this object has read or written; it stands for all lines up to there."""
        return self._tip.head

    def releases(self) -> Sequence[Release]:
        """All that are in the file, those that other jobs recorded included. Raises BadLedger."""
        with _held(self.path) as file:
            self._catch_up(file)
            return self._memory.releases()

    def record(self, *releases: Release, within: Limit | None = None) -> None:
        """As `Ledger` says, after what others have recorded in the meantime.

        Raises BadInput if it is not a release that can be accounted for, BadLedger if the file was changed otherwise,
        and FedeltaError if the disk does not take it; then, too, nothing may be released.
        """
        new = [checked(release) for release in releases]
        with _held(self.path) as file:
            self._catch_up(file)
            self._memory.check(new, within)
            tip, lines = self._tip, list[bytes]()
            for release in new:
                lines.append(line_of(tip, release, self._seal))
                tip = after(tip, lines[-1])
            _append(self.path, file.fileno(), self._tip.bytes, lines)
            self._tip = tip
            self._memory.add(new)

    def _catch_up(self, file: BinaryIO) -> list[Tip]:
        """Read what was added since the last time."""
        found = read(self.path, file, self._tip, self._seal)
        if found:
            self._tip = found[-1][0]
            self._memory.add([release for _, release in found])
        return [tip for tip, _ in found]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A ledger as it was read: its releases, and the hash of its last line."""

    releases: Sequence[Release]
    head: str


def verify(
    path: Path | str,
    key: "Path | str | Ed25519PublicKey | None",
    *,
    at_least: int = 0,
    includes: str | None = None,
) -> list[Release]:
    """The releases of a ledger, each line of which was checked: see `verified`."""
    return list(verified(path, key, at_least=at_least, includes=includes).releases)


def verified(
    path: Path | str,
    key: "Path | str | Ed25519PublicKey | None",
    *,
    at_least: int = 0,
    includes: str | None = None,
) -> Verified:
    """A ledger, each line of which was checked with the public `key`, or its PEM file.

    None for a ledger whose lines are not signed; `at_least` and `includes` as in `FileLedger.open`. Needs no right to
    write. Raises BadLedger.
    """
    path = Path(path)
    seal = Seal.of_public(key)
    start = Tip(head=seal.start)
    with _held(path, os.O_RDONLY) as file:
        found = read(path, file, start, seal, every_seal=True)
    tips = [start, *(tip for tip, _ in found)]
    _check_whole(path, tips, at_least, includes)
    return Verified(releases=[release for _, release in found], head=tips[-1].head)


# The file


def _create(path: Path) -> None:
    """An empty file if there is none. Its name is durable when this returns, whoever made it.

    A file that is not empty has had its first line from somebody who saw to that.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        empty = os.fstat(file).st_size == 0
        os.close(file)
        if empty:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise BadLedger(
            f"the ledger {path} cannot be begun: {error.strerror}; choose a folder that is there"
        ) from error


@contextmanager
def _held(path: Path, flags: int = os.O_RDWR | os.O_APPEND) -> Iterator[BinaryIO]:
    """The file, with nobody else writing to it.

    It is opened each time, and nothing else is open in between: `flock` tells openings apart, be they of threads, of
    other objects or of processes that have inherited this object.
    """
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise BadLedger(f"there is no ledger {path}; {CURE}") from None
    except OSError as error:
        raise BadLedger(f"the ledger {path} cannot be opened: {error.strerror}; give the right to it") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_SH if flags == os.O_RDONLY else fcntl.LOCK_EX)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to a process that was forked meanwhile


def _append(path: Path, file: int, end: int, lines: Sequence[bytes]) -> None:
    """Write lines after the first `end` bytes, durably, or leave the file as it was and raise FedeltaError."""
    content = b"".join(line + b"\n" for line in lines)
    try:
        if os.fstat(file).st_size > end:  # a torn line
            os.ftruncate(file, end)
            os.fsync(file)
        if os.write(file, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    except OSError as error:
        # After a failed sync nobody knows what the disk has: the line must not stay where others would build on it.
        with suppress(OSError):
            os.ftruncate(file, end)
            os.fsync(file)
        raise FedeltaError(
            f"the ledger {path} cannot be written: {error.strerror}; nothing was recorded: mend that before anything "
            "is released"
        ) from error


def _check_whole(path: Path, found: Sequence[Tip], at_least: int, includes: str | None) -> None:
    if found[-1].lines < at_least:
        raise BadLedger(f"{path} has {found[-1].lines} releases and must have at least {at_least}; {CURE}")
    if includes is not None and all(tip.head != includes for tip in found):
        raise BadLedger(f"{path} has no line with the hash {includes}, which was its last one once; {CURE}")
