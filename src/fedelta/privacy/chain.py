"""The lines of a ledger's file: JSON, chained by their hashes, each with a seal. What for: privacy/ledger.py.

A line is taken only if it is, byte for byte, what `line_of` writes.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

from fedelta.core.errors import BadInput, BadLedger
from fedelta.core.keys import private_key, public_key
from fedelta.core.release import Relation, Release, Unit
from fedelta.privacy.events import from_plain

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FORMAT = b"fedelta privacy ledger 1\n"
CURE = "put back a copy that has all lines, or release nothing more about these data: nobody can tell what was released"
_LINE = re.compile(rb'(\{.*),"seal":"([0-9a-f]+)"\}', re.DOTALL)
_SIGNATURE = 128  # hexadecimal digits of an Ed25519 signature; a hash has 64
_FIELDS = [field.name for field in fields(Release)]


@dataclass(frozen=True, kw_only=True)
class Tip:
    """How far a ledger has been read: all lines up to here are right."""

    bytes: int = 0
    lines: int = 0
    head: str


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What makes a line genuine: a signature, or a mere hash where there is no key."""

    private: "Ed25519PrivateKey | None" = None
    public: "Ed25519PublicKey | None" = None

    @classmethod
    def of(cls, key: "Path | str | Ed25519PrivateKey | None") -> "Seal":
        if key is None:
            return cls()
        private = private_key(key)
        return cls(private=private, public=private.public_key())

    @classmethod
    def of_public(cls, key: "Path | str | Ed25519PublicKey | None") -> "Seal":
        return cls(public=None if key is None else public_key(key))

    @property
    def start(self) -> str:
        """What the first line has as the hash of the line before."""
        return hashlib.sha256(FORMAT + (self.public.public_bytes_raw() if self.public else b"")).hexdigest()

    def on(self, body: bytes) -> str:
        """In hexadecimal. FORMAT in front, so that nothing else that the key may sign is a line."""
        if self.private is not None:
            return self.private.sign(FORMAT + body).hex()
        return hashlib.sha256(FORMAT + body).hexdigest()

    def fits(self, body: bytes, seal: str) -> bool:
        if self.public is None:
            return seal == self.on(body)
        from cryptography.exceptions import InvalidSignature

        try:
            self.public.verify(bytes.fromhex(seal), FORMAT + body)
        except (InvalidSignature, ValueError):
            return False
        return True


def read(path: Path, file: BinaryIO, tip: Tip, seal: Seal, every_seal: bool = False) -> list[tuple[Tip, Release]]:
    """The lines after `tip`, checked: where each ends, and what it holds. A torn one at the end is left out.

    The seal of the last line stands for those before it, which it names by their hash; `every_seal` checks them all.
    """
    size = os.fstat(file.fileno()).st_size
    if size < tip.bytes:
        raise BadLedger(f"{path} has become shorter, {size} bytes instead of {tip.bytes}; {CURE}")
    file.seek(tip.bytes)
    *lines, torn = file.read().split(b"\n")
    found = []
    for place, line in enumerate(lines, start=1):
        try:
            release = _parsed(line, tip, seal, every_seal or place == len(lines))
        except ValueError as error:
            raise BadLedger(f"line {tip.lines + 1} of {path} {error}; {CURE}") from error
        tip = after(tip, line)
        found.append((tip, release))
    if _is_more_than_a_line(torn):
        raise BadLedger(f"line {tip.lines + 1} of {path} was altered at its end; {CURE}")
    return found


def _parsed(line: bytes, before: Tip, seal: Seal, check_seal: bool) -> Release:
    """What a line without its newline holds; ValueError says what is wrong with it."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError("was altered: it does not have the form of a release")
    body = match[1] + b"}"
    if check_seal and not seal.fits(body, match[2].decode()):
        raise ValueError("was altered, or is not signed with this key" if seal.public else "was altered, or is signed")
    try:
        plain = json.loads(body)
        canonical = _dumped(plain) == body
    except (ValueError, RecursionError):
        raise ValueError("was altered: it is no JSON") from None
    if not canonical or list(plain) != ["number", "before", "time", "release"]:
        raise ValueError("does not have the form of a release")
    if type(plain["number"]) is not int or (plain["number"], plain["before"]) != (before.lines + 1, before.head):
        if before.lines:
            raise ValueError("does not follow the line before it: one was altered, removed, added or moved")
        raise ValueError("does not begin a ledger of this key: lines are missing, or the key is another one")
    if not _is_time(plain["time"]):
        raise ValueError(f"has no time in UTC but {plain['time']!r:.40}")
    return _release(plain["release"])


def _is_more_than_a_line(torn: bytes) -> bool:
    """Whether what follows the last newline is no beginning of a line: another byte was put in place of its newline."""
    text = torn.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return end < len(text)


def _is_time(text: object) -> bool:
    try:
        return isinstance(text, str) and _time(datetime.fromisoformat(text)) == text
    except ValueError:
        return False


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _release(plain: Any) -> Release:
    """Strictly what `line_of` writes; ValueError says what is wrong with it."""
    if not isinstance(plain, dict) or list(plain) != _FIELDS:
        raise ValueError(f"does not have the fields of a release, which are {', '.join(_FIELDS)}")
    event, unit, relation, of, job, round = plain.values()
    if unit not in get_args(Unit) or relation not in get_args(Relation):
        raise ValueError(f"has an unknown unit or relation: {unit!r:.40}, {relation!r:.40}")
    if not (of is None or (isinstance(of, str) and of)) or not isinstance(job, str):
        raise ValueError(f"has a site or a job that is no name: {of!r:.40}, {job!r:.40}")
    if type(round) is not int or round < 0:
        raise ValueError(f"has a round that is no number from 0: {round!r:.40}")
    if not isinstance(event, dict):
        raise ValueError(f"has an event that is no mapping: {event!r:.40}")
    try:
        _check_event(_dumped(event))
    except BadInput as error:
        raise ValueError(f"has an event that cannot be accounted for: {error}") from error
    return Release(**plain)


@lru_cache(maxsize=1000)
def _check_event(text: bytes) -> None:
    """Once for all rounds that are alike."""
    from_plain(json.loads(text))


def checked(release: Release) -> Release:
    """A release as it will be read back. Raises BadInput if that is something else, or cannot be accounted for."""
    plain = {name: getattr(release, name) for name in _FIELDS}
    if isinstance(release.event, Mapping):
        plain["event"] = dict(release.event)
    try:
        text = _dumped(plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"a release must consist of plain JSON values: {error}; see privacy/events.py") from error
    try:
        kept = _release(json.loads(text))
    except ValueError as error:
        raise BadInput(f"a release {error}; see core/release.py") from error
    if kept != release:
        raise BadInput("a release must consist of plain JSON values, with lists and no tuples; see privacy/events.py")
    return kept


def line_of(before: Tip, release: Release, seal: Seal) -> bytes:
    """The line of the next release, without its newline."""
    plain = {name: getattr(release, name) for name in _FIELDS}
    body = _dumped(
        {"number": before.lines + 1, "before": before.head, "time": _time(datetime.now(UTC)), "release": plain}
    )
    return body[:-1] + b',"seal":"' + seal.on(body).encode() + b'"}'


def _dumped(plain: object) -> bytes:
    return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()


def after(tip: Tip, line: bytes) -> Tip:
    """How far the ledger is with one line more, which is given without its newline."""
    return Tip(bytes=tip.bytes + len(line) + 1, lines=tip.lines + 1, head=hashlib.sha256(line).hexdigest())


def is_signed(path: Path) -> bool:
    """Whether the first line of a ledger has a signature, and not a mere hash; of what is no ledger, it has none."""
    try:
        with path.open("rb") as file:
            match = _LINE.fullmatch(file.readline().rstrip(b"\n"))
    except OSError:
        return False
    return match is not None and len(match[2]) == _SIGNATURE
