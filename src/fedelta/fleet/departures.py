"""A site's own log of what left it: one line for each reply, in a file that only grows (core/chain.py).

    {"number":2,"before":"5f…","time":"2026-11-22T10:00:00.000000+00:00","departure":{…},"seal":"8c…"}

A line is written and synced before the reply may leave; so all that left is in the log, and of what is in its last line
nobody knows whether it arrived. It says which tensors a reply had, and the SHA-256 of the message with which the site
can show later what it was: that of `codec.encode` of its body and metadata, or of the text of a failure. A reply that
is sent again after the line broke is the same bytes, and is one line.

Time is taken from the clock, and never runs backwards in what is counted: a line counts as of the latest moment that
the log has seen. So a clock that is set back gives nothing free. One that is set forward by mistake does so once, for a
day, and from then on that future is the present until it has come.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedelta.core import codec
from fedelta.core.chain import ChainFile, Kind, Line, Seal, read_all
from fedelta.core.messages import Reply, Request

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FILE = "departures.jsonl"  # in the folder that a site keeps
DAY = timedelta(hours=24)
_TEXT = 600  # characters of a text that others may have chosen


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor that left."""

    name: str
    dtype: str  # as PyTorch calls it: "float32"
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A reply as the log has it."""

    experiment: str  # its digest, as this site knows it
    job: str
    round: int
    op: str
    attempt: int
    bytes: int  # of the message, or of the text of a failure
    sha256: str  # of the same
    tensors: tuple[Piece, ...] = ()
    meta: tuple[str, ...] = ()  # the names of the metadata
    error: str | None = None  # the text of a failure, which has no tensors

    @classmethod
    def of(cls, experiment: str, request: Request, reply: Reply) -> "Departure":
        """What `reply` to `request` would let out."""
        found = hashlib.sha256()
        size = 0
        if reply.error is not None:
            said: Sequence[bytes | memoryview] = [reply.error.encode("utf-8", "replace")]
        else:
            said = [*codec.chunks(reply.body, reply.meta)] if reply.body or reply.meta else []
        for part in said:
            found.update(part)
            size += memoryview(part).nbytes
        body = {} if reply.error is not None else reply.body
        return cls(
            experiment=experiment,
            job=request.job[:_TEXT],
            round=request.round,
            op=request.op[:_TEXT],
            attempt=request.attempt,
            bytes=size,
            sha256=found.hexdigest(),
            tensors=tuple(
                Piece(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
                for name, tensor in sorted(body.items())
            ),
            meta=() if reply.error is not None else tuple(sorted(reply.meta)),
            error=None if reply.error is None else reply.error[:_TEXT],
        )


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What has left so far, before one more reply."""

    answers: Mapping[str, int] = field(default_factory=dict)  # to each kind of request of an experiment; no failures
    round_bytes: int = 0  # in the same round of the experiment
    day_bytes: int = 0  # within 24 hours, of all experiments


@dataclass(frozen=True, kw_only=True)
class Total:
    """What has left for one experiment."""

    answers: Mapping[str, int]  # to each kind of request
    failures: int
    rounds: int  # of which something left
    bytes: int


class Departures:
    """A log in a file. Any number of processes, threads and objects may share the file."""

    def __init__(self, file: ChainFile[Departure], found: Sequence[Line[Departure]]) -> None:
        """For `open`."""
        self._file = file
        self._count = _Count()
        self._count.add_lines(found)

    @classmethod
    def open(
        cls,
        path: Path | str,
        key: "Path | str | Ed25519PrivateKey | None" = None,
        *,
        at_least: int = 0,
        includes: str | None = None,
    ) -> "Departures":
        """Continue the log at `path`, or begin it; arguments and errors as in `FileLedger.open`."""
        seal = Seal.of(_DEPARTURES, key)
        return cls(*ChainFile.open(path, _DEPARTURES, seal, at_least=at_least, includes=includes))

    @property
    def head(self) -> str:
        """The hash of the last line that this object has read or written; it stands for all lines up to there."""
        return self._file.head

    def spent(self, experiment: str, round: int, now: datetime) -> Spent:
        """What counts against the limits of a reply that would leave now. Raises BadLedger."""
        with self._file.held() as held:
            self._count.add_lines(held.added)
            return self._count.spent(experiment, round, now)

    def record(
        self, departure: Departure, now: datetime, allow: Callable[[Spent], str | None] = lambda _spent: None
    ) -> str | None:
        """Take down a reply that is to leave: None, once its line is durable.

        Where `allow` says why it must not leave, nothing is taken down, and that is returned. Nobody else adds anything
        between the look and the line. Raises BadLedger if the file was changed otherwise, FedeltaError if the disk does
        not take it; then, too, nothing may leave.
        """
        with self._file.held() as held:
            self._count.add_lines(held.added)
            why = allow(self._count.spent(departure.experiment, departure.round, now))
            if why is None:
                held.append([departure], now)
                self._count.add(departure, now)
            return why

    def totals(self) -> dict[str, Total]:
        """By the digest of the experiment. Raises BadLedger."""
        with self._file.held() as held:
            self._count.add_lines(held.added)
            return self._count.totals()


def read(
    path: Path | str,
    key: "Path | str | Ed25519PublicKey | None" = None,
    *,
    at_least: int = 0,
    includes: str | None = None,
) -> list[Line[Departure]]:
    """All lines of a log, each of which was checked; arguments and errors as in `verify` of privacy/ledger.py."""
    seal = Seal.of_public(_DEPARTURES, key)
    return read_all(path, _DEPARTURES, seal, at_least=at_least, includes=includes)[0]


def totals(lines: Sequence[Line[Departure]]) -> dict[str, Total]:
    """What lines that were read add up to, by the digest of the experiment."""
    count = _Count()
    count.add_lines(lines)
    return count.totals()


class _Count:
    """Running sums over the lines of a log."""

    def __init__(self) -> None:
        self._answers: dict[str, Counter[str]] = {}
        self._failures: Counter[str] = Counter()
        self._bytes: dict[str, Counter[int]] = {}  # by round
        self._day: deque[tuple[datetime, int]] = deque()  # of the latest 24 hours
        self._day_bytes = 0
        self._latest = datetime.min.replace(tzinfo=UTC)

    def add_lines(self, lines: Sequence[Line[Departure]]) -> None:
        for line in lines:
            self.add(line.entry, line.time)

    def add(self, departure: Departure, time: datetime) -> None:
        answers = self._answers.setdefault(departure.experiment, Counter())
        if departure.error is None:
            answers[departure.op] += 1
        else:
            self._failures[departure.experiment] += 1
        self._bytes.setdefault(departure.experiment, Counter())[departure.round] += departure.bytes
        self._latest = max(self._latest, time)
        self._day.append((self._latest, departure.bytes))
        self._day_bytes += departure.bytes
        while self._latest - self._day[0][0] >= DAY:
            self._day_bytes -= self._day.popleft()[1]

    def spent(self, experiment: str, round: int, now: datetime) -> Spent:
        present = max(self._latest, now)
        older = takewhile(lambda one: present - one[0] >= DAY, self._day)  # it is in the order of time
        return Spent(
            answers=dict(self._answers.get(experiment, {})),
            round_bytes=self._bytes.get(experiment, Counter())[round],
            day_bytes=self._day_bytes - sum(size for _, size in older),
        )

    def totals(self) -> dict[str, Total]:
        return {
            experiment: Total(
                answers=dict(answers),
                failures=self._failures[experiment],
                rounds=len(self._bytes[experiment]),
                bytes=self._bytes[experiment].total(),
            )
            for experiment, answers in self._answers.items()
        }


# What a line holds

_FIELDS = [each.name for each in fields(Departure)]


def _plain(departure: Departure) -> dict[str, object]:
    plain = asdict(departure)
    pieces = [[piece.name, piece.dtype, list(piece.shape)] for piece in departure.tensors]
    return {**plain, "tensors": pieces, "meta": list(departure.meta)}


def _parse(plain: Any) -> Departure:
    """Strictly what `_plain` gives; ValueError says what is wrong with it."""
    if not isinstance(plain, dict) or list(plain) != _FIELDS:
        raise ValueError(f"does not have the fields of a departure, which are {', '.join(_FIELDS)}")
    for name in ("round", "attempt", "bytes"):
        if type(plain[name]) is not int or (name == "bytes" and plain[name] < 0):
            raise ValueError(f"has the {name} {plain[name]!r:.40}, which is no such number")
    for name in ("experiment", "job", "op", "sha256"):
        if not isinstance(plain[name], str):
            raise ValueError(f"has the {name} {plain[name]!r:.40}, which is no text")
    if not (plain["error"] is None or isinstance(plain["error"], str)):
        raise ValueError(f"has the error {plain['error']!r:.40}, which is no text")
    meta, tensors = plain["meta"], plain["tensors"]
    if not isinstance(meta, list) or not all(isinstance(name, str) for name in meta):
        raise ValueError("has names of metadata that are no list of texts")
    if not isinstance(tensors, list):
        raise ValueError("has tensors that are no list")
    return Departure(**{**plain, "meta": tuple(meta), "tensors": tuple(map(_piece, tensors))})


def _piece(plain: Any) -> Piece:
    match plain:
        case [str(name), str(dtype), list(shape)] if all(type(size) is int and size >= 0 for size in shape):
            return Piece(name=name, dtype=dtype, shape=tuple(shape))
    raise ValueError("has a tensor that is not [name, dtype, shape]")


_DEPARTURES = Kind(
    format=b"fedelta departures 1\n",
    file="log of departures",
    entry="departure",
    cure="put back a copy that has all lines, or let nothing more leave: nobody can tell what did",
    plain=_plain,
    parse=_parse,
)
