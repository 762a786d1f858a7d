"""The folder of one run: what it was, what happened, and where to continue.

    manifest.json      versions, seed, digests, execution plan, command; written once, when the run starts
    rounds.jsonl       one line a round: its `Report`; written as it happens, so that it can be followed with `tail -f`
    state.safetensors  the program's state after the last committed round
    memory/            what the sites of a simulation keep between rounds (core/memory.py), if they keep anything
    rounds.uncommitted.jsonl  the longest `rounds.jsonl` that a resume found without a state, if it ever did

A commit is one transaction: `rounds.jsonl` is synced to the disk, then the state is replaced by the new one, which says
how much of `rounds.jsonl` belongs to it. That rename is the commit point. Lines after that length (rounds that were not
committed, a line torn by a crash) are cut off on resume, and those rounds are run again. Without a state all lines are
such lines; then they are kept aside, because the state may have been lost by mistake.

Of a site's memory there are two versions, that from which the last round started and that which it left. So once a site
has kept something, every round is committed: the state is then never more than one round behind the memories. They
survive the end of a process, as core/memory.py says, and not a power cut.

Numbers in `rounds.jsonl` read back exactly. JSON has no NaN and no infinities: they are the strings "NaN", "Infinity"
and "-Infinity". Limits: POSIX only (`fcntl`); the lock keeps other processes out, not a second use in the same process.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from fedelta.core import snapshot
from fedelta.core.errors import BadInput, CannotResume, FedeltaError
from fedelta.core.messages import Meta, Plain
from fedelta.core.program import Report
from fedelta.observe.files import replace_file, sync_directory
from fedelta.observe.manifest import IDENTITY, differences
from fedelta.observe.plain import from_plain, to_plain
from fedelta.observe.text import plural

S = TypeVar("S")

MANIFEST = "manifest.json"
ROUNDS = "rounds.jsonl"
UNCOMMITTED = "rounds.uncommitted.jsonl"
STATE = "state.safetensors"
MEMORY = "memory"
LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class _Tip:
    """How far a run is, and how much of `rounds.jsonl` belongs to it.

    One value, replaced by one assignment, so that an interrupt never leaves a length and a digest of different rounds.
    """

    state: object = None
    round: int = 0
    lines: int = 0
    bytes: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


class RunFolder:
    """One run's folder, held by this process until `close`.

    Use it as a context manager: leaving the block commits the last round, whatever the reason for leaving.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Plain], lock: int, commit_every_s: float) -> None:
        """For `create` and `open`."""
        self.path = path
        self.manifest = manifest
        self.memory = path / MEMORY  # the folder for what sites keep, from `create` or `resume` on
        self._lock: int | None = lock
        self._commit_every_s = commit_every_s
        self._committed_at = time.monotonic()
        self._rounds: int | None = None  # descriptor of rounds.jsonl
        self._tip = self._committed = _Tip()

    @classmethod
    def create(cls, path: Path | str, manifest: Mapping[str, Plain], commit_every_s: float = 30.0) -> "RunFolder":
        """Start a run in `path`, which is made if need be.

        `manifest` is plain JSON; `environment()` gives its versions. A commit follows a round when `commit_every_s`
        seconds have passed since the last, or once a site has kept something; 0 commits every round. Raises
        CannotResume if a run is there already; one that ended before its first round is written over.
        """
        path = Path(path)
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            try:
                rounds = path / ROUNDS
                if (path / STATE).exists() or (rounds.exists() and rounds.stat().st_size):
                    raise CannotResume(
                        f"{path} already holds a run; continue it with --resume, or choose another folder with --out"
                    )
                content = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
                replace_file(path / MANIFEST, content.encode())
                folder = cls(path, json.loads(content), lock, commit_every_s)
                folder._open_rounds()
            except BaseException:
                os.close(lock)
                raise
        return folder

    @classmethod
    def open(cls, path: Path | str, commit_every_s: float = 30.0) -> "RunFolder":
        """Open a folder to continue its run; `resume` comes next. Raises CannotResume if there is no run in it."""
        path = Path(path)
        manifest = read_manifest(path)
        with _writing(path):
            return cls(path, manifest, _lock(path), commit_every_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.commit()
        finally:
            self.close()

    @property
    def kept(self) -> int:
        """How many rounds a commit makes durable, or has made so."""
        return self._tip.lines

    def check_same(self, manifest: Mapping[str, Plain]) -> None:
        """Raise CannotResume unless `manifest` has the same experiment, seed, data and plan as this run."""
        mine = {key: self.manifest[key] for key in IDENTITY if key in self.manifest}
        other = {key: manifest[key] for key in IDENTITY if key in manifest}
        differing = sorted(differences(mine, other), key=lambda found: IDENTITY.index(found[0].partition(".")[0]))
        if differing:
            where, old, new = differing[0]
            more = f" (and {plural(len(differing) - 1, 'more difference')})" if len(differing) > 1 else ""
            raise CannotResume(
                f"the run in {self.path} has {where} = {old} and this one has {where} = {new}{more}; "
                "continue it as it was started, or choose another folder with --out"
            )

    def resume(self, template: S) -> tuple[S | None, list[Report]]:
        """Go back to the last commit: the state and the reports up to it; None and no reports if there was no commit.

        `template` is a state of the same form, such as `program.init()`. Cuts off what `rounds.jsonl` holds beyond the
        commit; if there is no state at all, keeps it as `rounds.uncommitted.jsonl`. Raises CannotResume if the state or
        the reports are damaged.
        """
        state, meta = self._read_state(template)
        committed = self._read_committed(meta)
        reports = [_parse_line(line, self.path / ROUNDS) for line in committed.splitlines()]
        if state is None:
            self._keep_aside()
        self._open_rounds(keep=len(committed))
        self._tip = self._committed = _Tip(
            state=state,
            round=reports[-1].round if reports else 0,
            lines=len(reports),
            bytes=len(committed),
            digest=hashlib.sha256(committed),
        )
        return state, reports

    def add(self, state: object, report: Report) -> None:
        """Record a round: its line at once, and a commit if one is due.

        Raises FedeltaError if the disk does not take it; the last commit stays as it was.
        """
        if self._rounds is None:
            raise RuntimeError("a run folder that was opened takes rounds after resume()")
        line = json.dumps(to_plain(report), allow_nan=False, separators=(",", ":")) + "\n"
        content = line.encode()
        with self._recording():
            _write_all(self._rounds, content)
        digest = self._tip.digest.copy()
        digest.update(content)
        self._tip = _Tip(
            state=state,
            round=report.round,
            lines=self._tip.lines + 1,
            bytes=self._tip.bytes + len(content),
            digest=digest,
        )
        if time.monotonic() - self._committed_at >= self._commit_every_s or any(self.memory.iterdir()):
            self.commit()

    def commit(self) -> None:
        """Make everything that was added durable. Raises FedeltaError if the disk does not take it."""
        tip = self._tip
        if tip is self._committed or self._rounds is None:
            return
        meta: Meta = {"round": tip.round, "lines": tip.lines, "bytes": tip.bytes, "sha256": tip.digest.hexdigest()}
        with self._recording():
            os.fsync(self._rounds)
            snapshot.save(self.path / STATE, tip.state, meta)
        self._committed = tip
        self._committed_at = time.monotonic()

    def close(self) -> None:
        """Let go of the folder; what was added since the last commit is lost."""
        if self._rounds is not None:
            with suppress(OSError):  # it is not empty
                self.memory.rmdir()
        for descriptor in (self._rounds, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._rounds = self._lock = None

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """After a failed write the folder takes nothing more: its lines may be torn, and its last commit is good."""
        try:
            with _writing(self.path, "the last commit is safe: mend that and continue with --resume"):
                yield
        except FedeltaError:
            self.close()
            raise

    def _open_rounds(self, keep: int = 0) -> None:
        with _writing(self.path):
            if not keep and self.memory.exists():  # sites that start anew have no memory
                shutil.rmtree(self.memory)
            self.memory.mkdir(exist_ok=True)
            self._rounds = os.open(self.path / ROUNDS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._rounds, keep)
            os.fsync(self._rounds)
            sync_directory(self.path)

    def _keep_aside(self) -> None:
        """A run repeats its rounds, so of two such files the longer one has what is in the other."""
        rounds, aside = self.path / ROUNDS, self.path / UNCOMMITTED
        with _writing(self.path):
            if rounds.exists() and rounds.stat().st_size > (aside.stat().st_size if aside.exists() else 0):
                os.replace(rounds, aside)

    def _read_state(self, template: S) -> tuple[S | None, Meta]:
        path = self.path / STATE
        if not path.exists():
            return None, {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        return snapshot.load(path, template)

    def _read_committed(self, meta: Meta) -> bytes:
        path = self.path / ROUNDS
        length = meta.get("bytes")
        if type(length) is not int or length < 0:
            raise CannotResume(f"{self.path / STATE} does not say which rounds it belongs to; start anew with --out")
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise CannotResume(f"{path} cannot be read: {error.strerror}; make it readable") from error
        committed = content[:length]
        if len(committed) < length or hashlib.sha256(committed).hexdigest() != meta.get("sha256"):
            raise CannotResume(
                f"the first {length} bytes of {path} are not what was committed ({len(content)} bytes are there); "
                "restore it from a copy, or start anew with another --out"
            )
        return committed


def read_run(path: Path | str) -> tuple[dict[str, Plain], list[Report]]:
    """The manifest and the reports of a run, finished or not, without holding it; a torn last line is left out."""
    manifest = read_manifest(Path(path))
    rounds = Path(path) / ROUNDS
    content = rounds.read_bytes() if rounds.exists() else b""
    complete = content[: content.rfind(b"\n") + 1]
    return manifest, [_parse_line(line, rounds) for line in complete.splitlines()]


def _parse_line(line: bytes, path: Path) -> Report:
    try:
        return from_plain(json.loads(line))
    except (ValueError, BadInput) as error:
        raise CannotResume(f"{path} has a line that is not a report ({line[:60]!r}); restore it from a copy") from error


def read_manifest(path: Path) -> dict[str, Plain]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CannotResume(f"there is no run in {path} (no {MANIFEST}); start one, or name its folder") from None
    except OSError as error:
        raise CannotResume(f"{file} cannot be read: {error.strerror}; make it readable") from error
    except ValueError as error:
        raise CannotResume(f"{file} is damaged ({error}); restore it, or start anew with another --out") from error
    if not isinstance(manifest, dict):
        raise CannotResume(f"{file} is not a JSON object; restore it, or start anew with another --out")
    return manifest


def _lock(path: Path) -> int:
    """A record lock, which belongs to this process alone: worker processes that outlive it do not keep it."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise CannotResume(
            f"another process is writing the run in {path}; wait for it or choose another --out"
        ) from None
    return descriptor


@contextmanager
def _writing(path: Path, cure: str = "make it writable, or choose another folder with --out") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FedeltaError(f"the run folder {path} cannot be written: {error.strerror or error}; {cure}") from error


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
