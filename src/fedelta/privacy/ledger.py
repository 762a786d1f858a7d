"""Privacy ledgers: what was released about some data, in memory or in a file that only grows.

The file has one JSON line for each release, and all jobs that use the same data share it; its lines are chained and
signed, see core/chain.py for what that shows and what it does not. A line is there and synced before `record` returns.
So nothing was released for a line that a crash has torn, and a line that is there in full counts, even if its process
was killed before it released anything.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fedelta.core.chain import ChainFile, Kind, Line, Seal, dumped, read_all
from fedelta.core.errors import BadInput, BudgetSpent
from fedelta.core.release import Limit, Relation, Release, Unit
from fedelta.privacy.accounting import Account
from fedelta.privacy.events import from_plain

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_FIELDS = [field.name for field in fields(Release)]


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

    def __init__(self, file: ChainFile[Release], found: Sequence[Line[Release]], limit: Limit | None) -> None:
        """For `open`."""
        self._file = file
        self._memory = MemoryLedger(limit)
        self._add(found)

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
        file, found = ChainFile.open(path, _RELEASES, Seal.of(_RELEASES, key), at_least=at_least, includes=includes)
        return cls(file, found, limit)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def head(self) -> str:
        """The hash of the last line that this object has read or written; it stands for all lines up to there."""
        return self._file.head

    def releases(self) -> Sequence[Release]:
        """All that are in the file, those that other jobs recorded included. Raises BadLedger."""
        with self._file.held() as held:
            self._add(held.added)
            return self._memory.releases()

    def record(self, *releases: Release, within: Limit | None = None) -> None:
        """As `Ledger` says, after what others have recorded in the meantime.

        Raises BadInput if it is not a release that can be accounted for, BadLedger if the file was changed otherwise,
        and FedeltaError if the disk does not take it; then, too, nothing may be released.
        """
        new = [checked(release) for release in releases]
        with self._file.held() as held:
            self._add(held.added)
            self._memory.check(new, within)
            held.append(new)
            self._memory.add(new)

    def _add(self, lines: Sequence[Line[Release]]) -> None:
        self._memory.add([line.entry for line in lines])


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
    seal = Seal.of_public(_RELEASES, key)
    lines, head = read_all(path, _RELEASES, seal, at_least=at_least, includes=includes)
    return Verified(releases=[line.entry for line in lines], head=head)


# What a line holds


def _release(plain: Any) -> Release:
    """Strictly what `_plain` gives; ValueError says what is wrong with it."""
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
        _check_event(dumped(event))
    except BadInput as error:
        raise ValueError(f"has an event that cannot be accounted for: {error}") from error
    return Release(**plain)


@lru_cache(maxsize=1000)
def _check_event(text: bytes) -> None:
    """Once for all rounds that are alike."""
    from_plain(json.loads(text))


def checked(release: Release) -> Release:
    """A release as it will be read back. Raises BadInput if that is something else, or cannot be accounted for."""
    plain = _plain(release)
    if isinstance(release.event, Mapping):
        plain["event"] = dict(release.event)
    try:
        text = dumped(plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"a release must consist of plain JSON values: {error}; see privacy/events.py") from error
    try:
        kept = _release(json.loads(text))
    except ValueError as error:
        raise BadInput(f"a release {error}; see core/release.py") from error
    if kept != release:
        raise BadInput("a release must consist of plain JSON values, with lists and no tuples; see privacy/events.py")
    return kept


def _plain(release: Release) -> dict[str, Any]:
    return {name: getattr(release, name) for name in _FIELDS}


_RELEASES = Kind(
    format=b"fedelta privacy ledger 1\n",
    file="ledger",
    entry="release",
    cure="put back a copy that has all lines, or release nothing more about these data: nobody can tell what was "
    "released",
    plain=_plain,
    parse=_release,
)
