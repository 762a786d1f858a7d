"""Files that only grow: JSON lines, chained by their hashes, each with a seal.

    {"number":2,"before":"5f…","time":"2026-11-22T10:00:00.000000+00:00","release":{…},"seal":"8c…"}

`before` is the SHA-256 of the line before (of its bytes without the newline; the first line has a hash of the public
key there), and `seal` an Ed25519 signature (RFC 8032) of the line without its seal. What else a line holds is said by a
`Kind`. A line is taken only if it is, byte for byte, what would be written.

A line is written and synced under a lock before `append` returns. So a line without its newline, which a crash may
leave at the end, belongs to an `append` that never returned, and the next one cuts it off.

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
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeVar

from fedelta.core.errors import BadLedger, FedeltaError
from fedelta.core.keys import private_key, public_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

T = TypeVar("T")
_LINE = re.compile(rb'(\{.*),"seal":"([0-9a-f]+)"\}', re.DOTALL)
_SIGNATURE = 128  # hexadecimal digits of an Ed25519 signature; a hash has 64


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[T]):
    """What the lines of a file hold, and what the file is called."""

    format: bytes  # in front of all that is sealed, so that nothing else that the key may sign is a line
    file: str  # "ledger"
    entry: str  # "release": the key of what a line holds, and its name
    cure: str  # what to do where lines are not what they were
    plain: Callable[[T], object]  # as JSON
    parse: Callable[[Any], T]  # back again, strictly; ValueError says what is wrong with it


@dataclass(frozen=True, kw_only=True)
class Tip:
    """How far a file has been read: all lines up to here are right."""

    bytes: int = 0
    lines: int = 0
    head: str


@dataclass(frozen=True, kw_only=True)
class Line(Generic[T]):
    tip: Tip  # where it ends
    time: datetime  # by the clock of who wrote it, in UTC
    entry: T


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What makes a line genuine: a signature, or a mere hash where there is no key."""

    format: bytes
    private: "Ed25519PrivateKey | None" = None
    public: "Ed25519PublicKey | None" = None

    @classmethod
    def of(cls, kind: Kind[Any], key: "Path | str | Ed25519PrivateKey | None") -> "Seal":
        if key is None:
            return cls(format=kind.format)
        private = private_key(key)
        return cls(format=kind.format, private=private, public=private.public_key())

    @classmethod
    def of_public(cls, kind: Kind[Any], key: "Path | str | Ed25519PublicKey | None") -> "Seal":
        return cls(format=kind.format, public=None if key is None else public_key(key))

    @property
    def start(self) -> str:
        """What the first line has as the hash of the line before."""
        return hashlib.sha256(self.format + (self.public.public_bytes_raw() if self.public else b"")).hexdigest()

    def on(self, body: bytes) -> str:
        """In hexadecimal."""
        if self.private is not None:
            return self.private.sign(self.format + body).hex()
        return hashlib.sha256(self.format + body).hexdigest()

    def fits(self, body: bytes, seal: str) -> bool:
        if self.public is None:
            return seal == self.on(body)
        from cryptography.exceptions import InvalidSignature

        try:
            self.public.verify(bytes.fromhex(seal), self.format + body)
        except (InvalidSignature, ValueError):
            return False
        return True


class ChainFile(Generic[T]):
    """A file of this kind, which any number of processes, threads and objects may share."""

    def __init__(self, path: Path, kind: Kind[T], seal: Seal) -> None:
        """For `open`."""
        self.path, self._kind, self._seal = path, kind, seal
        self._tip = Tip(head=seal.start)

    @classmethod
    def open(
        cls, path: Path | str, kind: Kind[T], seal: Seal, *, at_least: int = 0, includes: str | None = None
    ) -> "tuple[ChainFile[T], list[Line[T]]]":
        """The file with its lines; it is begun if there is none.

        `at_least` is how many lines there must be, `includes` a `head` that was noted earlier; with either, a file that
        is not there is not begun. Raises BadLedger if it is not what was written, or has fewer lines than it must.
        """
        found = cls(Path(path), kind, seal)
        start = found._tip
        if not at_least and includes is None:
            _create(found.path, kind)
        with found.held() as held:
            lines = held.added
        _check_whole(found.path, kind, [start, *(line.tip for line in lines)], at_least, includes)
        return found, lines

    @property
    def head(self) -> str:
        """The hash of the last line that this object has read or written; it stands for all lines up to there."""
        return self._tip.head

    @contextmanager
    def held(self) -> "Iterator[Held[T]]":
        """The file, with nobody else writing to it, and what was added since the last time. Raises BadLedger."""
        with _locked(self.path, self._kind) as file:
            added = _read(self.path, file, self._tip, self._kind, self._seal)
            if added:
                self._tip = added[-1].tip
            yield Held(self, file, added)

    def _append(self, file: int, entries: Sequence[T], time: datetime) -> None:
        tip, lines = self._tip, list[bytes]()
        for entry in entries:
            lines.append(_line(tip, time, entry, self._kind, self._seal))
            tip = _after(tip, lines[-1])
        _write(self.path, self._kind, file, self._tip.bytes, lines)
        self._tip = tip


class Held(Generic[T]):
    """A file while it is locked: what others have added to it, in `added`, and the way to add more."""

    def __init__(self, chain: ChainFile[T], file: BinaryIO, added: list[Line[T]]) -> None:
        self._chain, self._file, self.added = chain, file, added

    def append(self, entries: Sequence[T], time: datetime | None = None) -> None:
        """Add lines, together; they are durable when this returns. `time` is that of the clock if it is not given.

        Raises FedeltaError if the disk does not take them; then none of them is there.
        """
        self._chain._append(self._file.fileno(), entries, time or datetime.now(UTC))


def read_all(
    path: Path | str, kind: Kind[T], seal: Seal, *, at_least: int = 0, includes: str | None = None
) -> tuple[list[Line[T]], str]:
    """The lines of a file, with every seal checked, and its head. Needs no right to write. Raises BadLedger."""
    path, start = Path(path), Tip(head=seal.start)
    with _locked(path, kind, os.O_RDONLY) as file:
        lines = _read(path, file, start, kind, seal, every_seal=True)
    tips = [start, *(line.tip for line in lines)]
    _check_whole(path, kind, tips, at_least, includes)
    return lines, tips[-1].head


def is_signed(path: Path) -> bool:
    """Whether the first line of a file has a signature, and not a mere hash; of what is no such file, it has none."""
    try:
        with path.open("rb") as file:
            match = _LINE.fullmatch(file.readline().rstrip(b"\n"))
    except OSError:
        return False
    return match is not None and len(match[2]) == _SIGNATURE


# Lines


def _read(path: Path, file: BinaryIO, tip: Tip, kind: Kind[T], seal: Seal, every_seal: bool = False) -> list[Line[T]]:
    """The lines after `tip`, checked. A torn one at the end is left out.

    The seal of the last line stands for those before it, which it names by their hash; `every_seal` checks them all.
    """
    size = os.fstat(file.fileno()).st_size
    if size < tip.bytes:
        raise BadLedger(f"{path} has become shorter, {size} bytes instead of {tip.bytes}; {kind.cure}")
    file.seek(tip.bytes)
    *lines, torn = file.read().split(b"\n")
    found = []
    for place, line in enumerate(lines, start=1):
        try:
            time, entry = _parsed(line, tip, kind, seal, every_seal or place == len(lines))
        except ValueError as error:
            raise BadLedger(f"line {tip.lines + 1} of {path} {error}; {kind.cure}") from error
        tip = _after(tip, line)
        found.append(Line(tip=tip, time=time, entry=entry))
    if _is_more_than_a_line(torn):
        raise BadLedger(f"line {tip.lines + 1} of {path} was altered at its end; {kind.cure}")
    return found


def _parsed(line: bytes, before: Tip, kind: Kind[T], seal: Seal, check_seal: bool) -> tuple[datetime, T]:
    """What a line without its newline holds; ValueError says what is wrong with it."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"was altered: it does not have the form of a {kind.entry}")
    body = match[1] + b"}"
    if check_seal and not seal.fits(body, match[2].decode()):
        raise ValueError("was altered, or is not signed with this key" if seal.public else "was altered, or is signed")
    try:
        plain = json.loads(body)
        canonical = dumped(plain) == body
    except (ValueError, RecursionError):
        raise ValueError("was altered: it is no JSON") from None
    if not canonical or list(plain) != ["number", "before", "time", kind.entry]:
        raise ValueError(f"does not have the form of a {kind.entry}")
    if type(plain["number"]) is not int or (plain["number"], plain["before"]) != (before.lines + 1, before.head):
        if before.lines:
            raise ValueError("does not follow the line before it: one was altered, removed, added or moved")
        raise ValueError(f"does not begin a {kind.file} of this key: lines are missing, or the key is another one")
    time = _time_of(plain["time"])
    if time is None:
        raise ValueError(f"has no time in UTC but {plain['time']!r:.40}")
    return time, kind.parse(plain[kind.entry])


def _is_more_than_a_line(torn: bytes) -> bool:
    """Whether what follows the last newline is no beginning of a line: another byte was put in place of its newline."""
    text = torn.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return end < len(text)


def _time_of(text: object) -> datetime | None:
    """The moment, if it is written as `_time` does."""
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
        return moment if moment is not None and _time(moment) == text else None
    except (ValueError, OverflowError):
        return None


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _line(before: Tip, time: datetime, entry: T, kind: Kind[T], seal: Seal) -> bytes:
    """The next line, without its newline."""
    plain = {"number": before.lines + 1, "before": before.head, "time": _time(time), kind.entry: kind.plain(entry)}
    body = dumped(plain)
    return body[:-1] + b',"seal":"' + seal.on(body).encode() + b'"}'


def dumped(plain: object) -> bytes:
    """Plain values in the one form in which lines have them."""
    return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()


def _after(tip: Tip, line: bytes) -> Tip:
    """How far the file is with one line more, which is given without its newline."""
    return Tip(bytes=tip.bytes + len(line) + 1, lines=tip.lines + 1, head=hashlib.sha256(line).hexdigest())


# The file


def _create(path: Path, kind: Kind[Any]) -> None:
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
            f"the {kind.file} {path} cannot be begun: {error.strerror}; choose a folder that is there"
        ) from error


@contextmanager
def _locked(path: Path, kind: Kind[Any], flags: int = os.O_RDWR | os.O_APPEND) -> Iterator[BinaryIO]:
    """The file, with nobody else writing to it.

    It is opened each time, and nothing else is open in between: `flock` tells openings apart, be they of threads, of
    other objects or of processes that have inherited this object.
    """
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise BadLedger(f"there is no {kind.file} {path}; {kind.cure}") from None
    except OSError as error:
        raise BadLedger(f"the {kind.file} {path} cannot be opened: {error.strerror}; give the right to it") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_SH if flags == os.O_RDONLY else fcntl.LOCK_EX)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to a process that was forked meanwhile


def _write(path: Path, kind: Kind[Any], file: int, end: int, lines: Sequence[bytes]) -> None:
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
            f"the {kind.file} {path} cannot be written: {error.strerror}; nothing was recorded: mend that before "
            "anything is released"
        ) from error


def _check_whole(path: Path, kind: Kind[Any], found: Sequence[Tip], at_least: int, includes: str | None) -> None:
    if found[-1].lines < at_least:
        have = f"has {found[-1].lines} {kind.entry}s and must have at least {at_least}"
        raise BadLedger(f"{path} {have}; {kind.cure}")
    if includes is not None and all(tip.head != includes for tip in found):
        raise BadLedger(f"{path} has no line with the hash {includes}, which was its last one once; {kind.cure}")
