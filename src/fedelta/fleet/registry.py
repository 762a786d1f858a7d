"""What a coordinator knows of its sites: a database, coordinator.sqlite in the folder of its run (SQLite, WAL).

    sites    who they are, when they were seen, their certificates, failures in a row, and who is in quarantine and why
    rounds   those that were committed, with the SHA-256 of the state after each
    turns    for each round, who counted, and who was absent and why
    events   joined, left, refused, shut out, protocol broken, update refused, quarantined, readmitted: when, who, why

The commit of a round is not here. It is the rename of the state in the run's folder (observe/folder.py), where the
state has to be in any case: it may have gigabytes. Two stores cannot commit as one, so one leads and the other follows:
a round is written here, in one transaction, once it is committed there. What a crash leaves between the two, `follow`
mends when the run is resumed: rounds that are not committed there are cut off, and those that are missing here are
added. So nothing that a run needs is lost with this file; who was in quarantine by an operator's word is.

A failure is of a site's own making: a stream with what no site sends, or an update that cannot be used, unless those of
most sites cannot. Absences are none, nor are failures that a site tells of itself. They are counted until an update of
the site counts again.

Limits: SQLite's locks need a file system of this machine, and the directory writable also for those who only look. Of
events the latest 100,000 are kept; one that repeats the site's last one is counted in it.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

from cryptography import x509

from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.messages import PartyId
from fedelta.fleet.certificate_forms import DAMAGED
from fedelta.fleet.known_sites import Event, KnownSite, Quarantine, Turns, What, minute

DATABASE = "coordinator.sqlite"
_APPLICATION, _VERSION = 0x0FEDE17A, 1
_EVENTS = 100_000
_TEXT = 400  # characters of a reason: with what is said around it, it fits into a frame
_BUSY_S = 30.0
_TABLES = """
CREATE TABLE sites (
    name TEXT PRIMARY KEY, first_seen TEXT, last_seen TEXT, here INTEGER NOT NULL DEFAULT 0,
    streams INTEGER NOT NULL DEFAULT 0, fingerprint TEXT, expires TEXT,
    failures INTEGER NOT NULL DEFAULT 0, quarantined TEXT, why TEXT
) WITHOUT ROWID;
CREATE TABLE rounds (number INTEGER PRIMARY KEY, time TEXT, state TEXT);
CREATE TABLE turns (
    round INTEGER NOT NULL REFERENCES rounds ON DELETE CASCADE, site TEXT NOT NULL, absent TEXT,
    PRIMARY KEY (round, site)
) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY, time TEXT NOT NULL, latest TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1,
    site TEXT, what TEXT NOT NULL, why TEXT NOT NULL
);
CREATE INDEX events_of_site ON events (site, id);
"""


class Registry:
    """The database of one run. One thread at a time uses an object; several processes may use the file.

    Everything that writes raises FedeltaError, in one sentence, where the disk does not take it, and LockedRegistry
    where another process has the file; the database is then as it was before.
    """

    def __init__(self, path: Path, *, quarantine_after: int = 0, busy_s: float = _BUSY_S) -> None:
        """Open the database, or make it. `quarantine_after`: failures in a row; 0: nobody is put there by itself.

        `busy_s`: seconds for which one that is locked is waited for, each time. Raises BadInput if the file is damaged,
        or made by another version.
        """
        if quarantine_after < 0:
            raise BadInput(f"quarantine_after must be >= 0, got {quarantine_after}")
        self.path = path
        self.fresh = False  # whether it was made just now
        self._after = quarantine_after
        with self._asking():
            self._database = sqlite3.connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._database.close()
                raise

    @classmethod
    def beside(cls, folder: Path, *, quarantine_after: int = 0) -> tuple[Self, str | None]:
        """That of a run's folder, made where there is none. A damaged one is put aside: the sentence says so."""
        path, told = folder / DATABASE, None
        try:
            return cls(path, quarantine_after=quarantine_after), None
        except DamagedRegistry as error:
            aside = _put_aside(path)
            told = f"{error}: it is kept as {aside.name}, and another one is begun"
        return cls(path, quarantine_after=quarantine_after), told

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def _prepare(self) -> None:
        ask = self._database.execute
        ask("PRAGMA foreign_keys = ON")
        made_by, version = ask("PRAGMA application_id").fetchone()[0], ask("PRAGMA user_version").fetchone()[0]
        empty = not ask("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not empty and made_by != _APPLICATION:
            raise DamagedRegistry(f"{self.path} is not a coordinator's database")
        if not empty and version != _VERSION:
            raise BadInput(f"{self.path} is of another version of fedelta ({version}, not {_VERSION}); use that one")
        found = ask("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise DamagedRegistry(f"{self.path} is damaged ({found.splitlines()[0]})")
        ask("PRAGMA journal_mode = WAL")
        ask("PRAGMA synchronous = FULL")
        if empty:
            with self.transaction():
                for statement in _TABLES.split(";")[:-1]:
                    ask(statement)
                ask(f"PRAGMA application_id = {_APPLICATION}")
                ask(f"PRAGMA user_version = {_VERSION}")
            self.fresh = True

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """SQLite's errors as one sentence."""
        try:
            yield
        except sqlite3.Error as error:
            kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise DamagedRegistry(f"{self.path} is damaged ({error})") from error
            if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise LockedRegistry(f"another process has locked {self.path}; end it (a backup, a sqlite3)") from error
            raise FedeltaError(
                f"{self.path} cannot be used: {error}; the rounds that were committed are safe: mend that, and go on "
                "with --resume"
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing; within another one, a part of that."""
        with self._asking():
            if self._database.in_transaction:
                yield
                return
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # a full disk may have ended it
                    self._database.execute("ROLLBACK")
                raise

    # What happens

    def begin(self, names: Sequence[PartyId]) -> None:
        """A coordinator has started, for these sites; nobody is connected yet."""
        with self.transaction():
            self._database.execute("UPDATE sites SET here = 0")
            self._add(names)

    def joined(self, name: PartyId, certificate: bytes) -> None:
        """`certificate`: DER; empty without TLS."""
        now, expires = _now(), _expiry(certificate)
        shown = hashlib.sha256(certificate).hexdigest() if certificate else None
        with self.transaction():
            self._add([name])
            self._database.execute(
                "UPDATE sites SET first_seen = coalesce(first_seen, ?), last_seen = ?, here = 1, "
                "streams = streams + 1, fingerprint = ?, expires = ? WHERE name = ?",
                (now, now, shown, expires, name),
            )
            self.note("joined", name)

    def left(self, name: PartyId) -> None:
        with self.transaction():
            self._database.execute("UPDATE sites SET here = 0, last_seen = ? WHERE name = ?", (_now(), name))
            self.note("left", name)

    def broke(self, name: PartyId, why: str) -> None:
        """A stream of the site had what no site sends."""
        with self.transaction():
            self.note("protocol broken", name, why)
            self._failed(name, f"the last on {minute(datetime.now(UTC))}", why)

    def note(self, what: What, site: PartyId | None, why: str = "") -> None:
        """An event."""
        assert what in get_args(What)
        now, why = _now(), why[:_TEXT]
        with self.transaction():
            found = self._database.execute(
                "SELECT id, what, why FROM events WHERE site IS ? ORDER BY id DESC LIMIT 1", (site,)
            ).fetchone()
            if found is not None and tuple(found[1:]) == (what, why):
                self._database.execute("UPDATE events SET times = times + 1, latest = ? WHERE id = ?", (now, found[0]))
                return
            added = self._database.execute(
                "INSERT INTO events (time, latest, site, what, why) VALUES (?, ?, ?, ?, ?)", (now, now, site, what, why)
            )
            self._database.execute("DELETE FROM events WHERE id <= ?", ((added.lastrowid or 0) - _EVENTS,))

    def committed(self, turns: Turns) -> None:
        """A round was committed in the run's folder."""
        with self.transaction():
            self._write(turns, _now())
            self._judge(turns)

    def follow(self, rounds: Sequence[Turns]) -> tuple[int, int]:
        """Agree with all rounds that the run's folder has; how many were cut off here, and how many added.

        In a database that is fresh, what sites did in these rounds is judged anew.
        """
        own = {one.number: one for one in self.rounds()}
        there = {one.number: one for one in rounds}
        with self.transaction():
            over = [(number,) for number in own if number not in there]
            self._database.executemany("DELETE FROM rounds WHERE number = ?", over)
            added = 0
            for number, turns in there.items():
                before = own.get(number)
                if before is not None and (set(before.counted), dict(before.absent)) == (
                    set(turns.counted),
                    dict(turns.absent),
                ):
                    continue
                self._write(turns, None)
                if before is None:
                    added += 1
                    if self.fresh:  # who counted after it had been put there was readmitted
                        self._database.executemany(
                            "UPDATE sites SET quarantined = NULL, why = NULL WHERE name = ?",
                            [(name,) for name in turns.counted],
                        )
                    self._judge(turns)
        return len(over), added

    def _write(self, turns: Turns, time: str | None) -> None:
        self._database.execute("DELETE FROM rounds WHERE number = ?", (turns.number,))
        self._database.execute("INSERT INTO rounds VALUES (?, ?, ?)", (turns.number, time, turns.state))
        rows = {**dict.fromkeys(turns.counted), **turns.absent}
        self._add(rows)
        self._database.executemany(
            "INSERT INTO turns VALUES (?, ?, ?)", [(turns.number, site, why) for site, why in rows.items()]
        )

    def _judge(self, turns: Turns) -> None:
        """What a round says of its sites."""
        counted = [(name,) for name in turns.counted]
        self._database.executemany("UPDATE sites SET failures = 0 WHERE name = ? AND failures", counted)
        for name in turns.refused:
            why = turns.absent.get(name, "its update could not be used")
            self.note("update refused", name, why)
            if len(turns.refused) <= len(turns.counted):  # or the experiment is at fault, and not its sites
                self._failed(name, f"the last in round {turns.number}", why)

    def _failed(self, name: PartyId, when: str, why: str) -> None:
        self._add([name])
        self._database.execute("UPDATE sites SET failures = failures + 1 WHERE name = ?", (name,))
        (failures, quarantined) = self._database.execute(
            "SELECT failures, quarantined FROM sites WHERE name = ?", (name,)
        ).fetchone()
        if self._after and failures >= self._after and quarantined is None:
            times = "It has failed once" if failures == 1 else f"It has failed {failures} times in a row"
            self._put(name, f"{times}, {when}: {why}")

    def _put(self, name: PartyId, why: str) -> None:
        self._database.execute("UPDATE sites SET quarantined = ?, why = ? WHERE name = ?", (_now(), why[:_TEXT], name))
        self.note("quarantined", name, why)

    def _add(self, names: Iterable[PartyId]) -> None:
        """Sites that may be new."""
        self._database.executemany("INSERT OR IGNORE INTO sites (name) VALUES (?)", [(name,) for name in names])

    # What an operator does

    def quarantine(self, name: PartyId, why: str) -> None:
        """Raises BadInput for a site that is not known, or is there already."""
        with self.transaction():
            found = self._one(name)
            if found.quarantine is not None:
                raise BadInput(f"{name!r} is in quarantine already, since {minute(found.quarantine.since)}")
            self._put(name, why)

    def readmit(self, name: PartyId) -> None:
        """Its failures are forgotten. Raises BadInput for a site that is not known, or not in quarantine."""
        with self.transaction():
            found = self._one(name)
            if found.quarantine is None:
                raise BadInput(f"{name!r} is not in quarantine; `fedelta sites` lists who is")
            self._database.execute(
                "UPDATE sites SET quarantined = NULL, why = NULL, failures = 0 WHERE name = ?", (name,)
            )
            self.note("readmitted", name)

    # What is known

    def sites(self) -> list[KnownSite]:
        """By name."""
        with self._asking():
            return [_site(row) for row in self._database.execute(f"{_SITES} ORDER BY name")]

    def quarantined(self) -> dict[PartyId, Quarantine]:
        with self._asking():
            rows = self._database.execute("SELECT name, quarantined, why FROM sites WHERE quarantined IS NOT NULL")
            return {name: Quarantine(since=datetime.fromisoformat(since), why=why) for name, since, why in rows}

    def rounds(self) -> list[Turns]:
        """In their order; `refused` is not kept here."""
        with self._asking():
            turns: dict[int, list[tuple[str, str | None]]] = {}
            for round, site, absent in self._database.execute("SELECT round, site, absent FROM turns"):
                turns.setdefault(round, []).append((site, absent))
            return [
                Turns(
                    number=number,
                    counted=tuple(site for site, why in turns.get(number, ()) if why is None),
                    absent={site: why for site, why in turns.get(number, ()) if why is not None},
                    state=state,
                )
                for number, state in self._database.execute("SELECT number, state FROM rounds ORDER BY number")
            ]

    def events(self, last: int, site: PartyId | None = None) -> list[Event]:
        """The latest ones, the latest last; of one site, or of all."""
        asked = "SELECT time, latest, times, site, what, why FROM events WHERE ?1 IS NULL OR site = ?1"
        with self._asking():
            rows = self._database.execute(f"{asked} ORDER BY id DESC LIMIT ?2", (site, last)).fetchall()
        return [
            Event(
                time=datetime.fromisoformat(time),
                latest=datetime.fromisoformat(latest),
                times=times,
                site=of,
                what=what,
                why=why,
            )
            for time, latest, times, of, what, why in reversed(rows)
        ]

    def _one(self, name: PartyId) -> KnownSite:
        row = self._database.execute(f"{_SITES} WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise BadInput(f"{name!r} is not among the sites of {self.path}; `fedelta sites` lists them")
        return _site(row)


class DamagedRegistry(BadInput):
    """The file of a registry is not one, or no longer."""


class LockedRegistry(FedeltaError):
    """Another process has the database, and did not let go of it for a while; nothing was written."""


_SITES = (
    "SELECT name, here, first_seen, last_seen, streams, fingerprint, expires, failures, quarantined, why, "
    "coalesce(counted, 0) FROM sites LEFT JOIN "
    "(SELECT site, count(*) AS counted FROM turns WHERE absent IS NULL GROUP BY site) ON site = name"
)


def _site(row: Sequence[object]) -> KnownSite:
    name, here, first, last, streams, fingerprint, expires, failures, since, why, counted = row
    return KnownSite(
        name=str(name),
        here=bool(here),
        first_seen=_time(first),
        last_seen=_time(last),
        streams=int(str(streams)),
        fingerprint=None if fingerprint is None else str(fingerprint),
        expires=_time(expires),
        counted=int(str(counted)),
        failures=int(str(failures)),
        quarantine=None if since is None else Quarantine(since=datetime.fromisoformat(str(since)), why=str(why)),
    )


def _time(text: object) -> datetime | None:
    return None if text is None else datetime.fromisoformat(str(text))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _expiry(certificate: bytes) -> str | None:
    if not certificate:
        return None
    try:
        return x509.load_der_x509_certificate(certificate).not_valid_after_utc.isoformat()
    except DAMAGED:  # TLS has taken it nevertheless
        return None


def _put_aside(path: Path) -> Path:
    """Rename a database, with the files that belong to it; its new path."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    for ending in ("-wal", "-shm", ""):
        own = Path(f"{path}{ending}")
        if own.exists():
            os.replace(own, f"{aside}{ending}")
    return aside
