"""What outlasts a site's process: its memory, which rounds it has worked on, its replies of the latest round.

In a folder for each run apart, which one process at a time may use. Replies and memory survive `kill -9`; what the site
has worked on (Site.given) survives a power cut as well, since on it rests that a site never answers a round twice. The
name of a run is the coordinator's word: so of one process, what it has worked on counts in all runs.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fedelta.core import codec
from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.messages import Meta, PartyId, Reply
from fedelta.core.program import Site
from fedelta.fleet.wire import Outgoing

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Stored:
    """A reply, which may be sent more than once."""

    answers: str
    round: int
    job: str
    error: str | None
    message: Outgoing
    sent: bool = False


class Kept:
    """What a site keeps; without a folder nothing outlasts the process."""

    def __init__(self, folder: Path | None) -> None:
        self.run: str | None = None
        self.memory: Path | None = None
        self._root = folder
        self.folder: Path | None = None  # of the run
        self._given: dict[str, int] = {}
        self._recalled: set[PartyId] = set()
        self._latest: tuple[str, int] | None = None
        self._lock: int | None = None

    def enter(self, run: str) -> dict[bytes, Stored]:
        """Open the folder of a run; the replies that are in it. Raises BadInput where another process has it."""
        self.close()
        self.run, self._recalled, self._latest = run, set(), None
        if self._root is None:
            return {}
        self.folder = folder = self._root / hashlib.sha256(run.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        self.memory = folder / "memory"
        for made in (self.memory, folder / "replies"):
            made.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"another process takes part with the folder {self._root}; end it, or use another") from None
        found = self._read_given(folder / "given.json")
        self._given = found | {op: max(round, found.get(op, round)) for op, round in self._given.items()}
        return self._replies(folder / "replies")

    def close(self) -> None:
        """A run in which nothing was asked leaves nothing: a coordinator may think of any number of names."""
        if self._lock is None:
            return
        assert self.folder is not None
        lock = self.folder / ".lock"
        if not any(path.is_file() and path != lock for path in self.folder.rglob("*")):
            shutil.rmtree(self.folder, ignore_errors=True)  # before anybody else can have it
        os.close(self._lock)
        self._lock = None

    def recall(self, site: Site) -> None:
        """Tell a site that was made for this run what it has worked on in earlier processes, and in this one."""
        if site.id not in self._recalled:
            self._recalled.add(site.id)
            site.given.update(self._given)

    def take_down(self, site: Site) -> None:
        """Make durable what the site has worked on, where that has changed."""
        given = dict(site.given)
        if given != self._given:
            if self.folder is not None:
                _replace(self.folder / "given.json", json.dumps(given).encode())
            self._given = given

    def store(self, said: bytes, reply: Reply, job: str) -> None:
        """Keep a reply, and those of its round; forget the others."""
        if self.folder is None:
            return
        folder = self.folder / "replies"
        if self._latest != (job, reply.round):
            for path in folder.iterdir():
                path.unlink()
            self._latest = job, reply.round
        meta: Meta = {"answers": reply.answers, "round": reply.round, "job": job, "meta": cast(Any, dict(reply.meta))}
        part = folder / ".part"
        with part.open("wb") as file:
            codec.write(file, reply.body, meta)
        part.replace(folder / said.hex())

    def _replies(self, folder: Path) -> dict[bytes, Stored]:
        """Those that are whole; a power cut may have left others, and `given` keeps them from being given anew."""
        found = {}
        for path in folder.glob("?" * 64):
            try:
                found[bytes.fromhex(path.name)] = self._read(path)
            except (ValueError, KeyError, RuntimeError, OSError, BadTensors):
                log.warning("%s is damaged, and is left out", path)
                path.unlink()
        return found

    def _read(self, path: Path) -> Stored:
        raw = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        body, meta = codec.decode(raw.numpy().data)
        own = cast(Any, meta)
        self._latest = own["job"], own["round"]
        return Stored(own["answers"], own["round"], own["job"], None, Outgoing(body, own["meta"]))

    @staticmethod
    def _read_given(path: Path) -> dict[str, int]:
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            found = error
        if not isinstance(found, Mapping) or not all(type(round) is int for round in found.values()):
            raise BadInput(f"{path} is damaged; restore it: it says what this site must not do again")
        return dict(found)


def _replace(path: Path, content: bytes) -> None:
    """In full or not at all, and durable."""
    part = path.with_name(f".{path.name}.new")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
