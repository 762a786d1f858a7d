"""A rehearsal: the requests of a federation, really handled for one site, before there is a run.

Messages are encoded as they would travel, the site trains on its own rows, and what it would answer is weighed and
thrown away; nothing is sent. The memory is that of a process of its own (see `learning/apart.py`), which trains one
step on the site's longest rows and then the steps that are timed; messages stay for another round, as the buffers of a
fleet do.

Limits: one thread and one site at a time, on this machine. Features that are computed once (see `learning/cut.py`) are
taken to be there, which in the first round they are not. An algorithm whose training cannot be shortened (it is no
dataclass that holds its `training`) does its whole local work here. A collect is left out: what it takes to hide an
update is neither timed nor in the memory.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from fedelta.algorithms.federation import Federation
from fedelta.algorithms.parts import Clear, Collect
from fedelta.core import codec
from fedelta.core.errors import TrainingFailed
from fedelta.core.examples import Examples
from fedelta.core.grid import Terms
from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests, Tensors
from fedelta.core.program import Fleet, Sight, Site, SiteData
from fedelta.core.swap import swapped
from fedelta.learning.apart import Memory, apart
from fedelta.learning.training import by_length

_ROWS = 256  # of what is timed by rows: what a model reads in one batch of an evaluation
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of a message."""

    name: str
    dtype: str  # as PyTorch calls it: "float32"
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A reply, in the clear."""

    bytes: int
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, reply: Reply) -> "Weighed":
        pieces = tuple(_piece(name, tensor) for name, tensor in sorted(reply.body.items()))
        return cls(bytes=codec.size(reply.body, reply.meta), pieces=pieces)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that a kind of request takes: `fixed`, and `each` for every step ("train") or row (all others)."""

    fixed: float
    each: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What came of it. Kinds of requests go by their `op`."""

    replies: Mapping[str, Weighed]
    bytes_up_nothing: int  # of the reply to an evaluation where nothing is held back; 0 if there is no evaluation
    paces: Mapping[str, Pace]
    test_row_s: float  # seconds a row of the coordinator's own evaluation; 0 if there is none
    memory_bytes: int | None  # most that the process took beside Python, libraries and data; None: not known here

    @property
    def update(self) -> tuple[Piece, ...]:
        """What the answer to "train" consists of."""
        return self.replies["train"].pieces


def rehearse(
    federation: Federation[Any],
    requests: Mapping[str, Tensors],
    site: PartyId,
    data: SiteData,
    *,
    steps: int,
    seconds: float,
) -> Rehearsal:
    """Handle `requests` (op -> all that the site gets) for a site that has `steps` of training in a round.

    Training is timed for about `seconds`, and for one step at least. Raises the FedeltaError that the site would answer
    with, and RuntimeError for a bug.
    """
    return apart(partial(_Site(federation, requests, site, data).rehearse, steps, seconds))


@dataclass(frozen=True, kw_only=True)
class _Bare:
    """A collect that leaves an answer as it is before it is hidden, of which it otherwise promises the same."""

    collect: Collect
    shows: ClassVar[Sight] = Clear.shows
    least: ClassVar[int] = Clear.least

    @property
    def whole(self) -> bool:
        return self.collect.whole

    @property
    def registered(self) -> int | None:
        return self.collect.registered

    def honest(self, cohort: int) -> int:
        return self.collect.honest(cohort)

    def gather(self, fleet: Fleet, requests: Requests, together: int, terms: Terms) -> Iterator[Reply | Replies]:
        return Clear().gather(fleet, requests, together, terms)

    def handle(self, request: Request, site: Site, outgoing: Callable[[], Tensors], terms: Terms) -> Reply:
        return Clear().handle(request, site, outgoing, terms)

    def answer(self, request: Request, site: Site) -> Reply:
        return Clear().answer(request, site)


class _Site:
    def __init__(self, federation: Federation[Any], requests: Mapping[str, Tensors], name: str, data: SiteData) -> None:
        # A task of its own: what this process has built for the other one would not show in the memory.
        task = federation.algorithm.task
        own = replace(task, features=None)  # and nothing is written
        # Any noise will do, where that of the run is solved from the number of rows, of which there are few here.
        given: Any = federation.privacy
        privacy = None if given is None else replace(given, noise=1.0, epsilon=None)
        algorithm = swapped(federation.algorithm, task, own)
        self._federation = replace(
            federation, algorithm=algorithm, privacy=privacy, collect=_Bare(collect=federation.collect)
        )
        self._requests, self._name, self._data = requests, name, replace(data, ledger=None)
        self._buffers: deque[bytes] = deque(maxlen=4)  # the messages of two rounds

    def rehearse(self, steps: int, seconds: float, memory: Memory) -> Rehearsal:
        replies = {"train": Weighed.of(self._handled("train", self._longest(), steps=1))}
        paces, nothing = dict[str, Pace](), 0
        for op in sorted(self._requests.keys() - {"train"}):
            replies[op], paces[op] = self._by_rows(op)
        if "evaluate" in self._requests:
            nothing = Weighed.of(self._handled("evaluate", SiteData(train=self._data.train))).bytes
        paces["train"] = self._by_steps(steps, seconds)
        peak = memory.peak()  # before the coordinator's work, which is none of a site's
        return Rehearsal(
            replies=replies,
            bytes_up_nothing=nothing,
            paces=paces,
            test_row_s=self._test_row_s(),
            memory_bytes=peak,
        )

    def _longest(self) -> SiteData:
        """One batch of those rows that take the most memory."""
        train = self._data.train
        batch = self._federation.algorithm.training.batch
        return replace(self._data, train=train[by_length(train)[-batch:]])

    def _handled(self, op: str, data: SiteData, *, steps: int | None = None) -> Reply:
        """The site's reply, after all the copies that are made of what it gets and sends."""
        self._buffers.append(codec.encode(self._requests[op]))
        received, _ = codec.decode(self._buffers[-1])
        federation = self._federation if steps is None else self._shortened(steps)
        request = Request(to=self._name, op=op, round=0 if op == "statistics" else 1, shared=received)
        reply = federation.handle(request, Site(id=self._name, data=lambda: data))
        self._buffers.append(codec.encode(reply.body, reply.meta))
        return reply

    def _by_rows(self, op: str) -> tuple[Weighed, Pace]:
        """The reply, and the pace on the rows that it is about."""
        held_back = self._data.validation
        rows = held_back if op == "evaluate" and held_back is not None and len(held_back) else self._data.train
        longest, typical = rows[by_length(rows)[-_ROWS:]], _typical(rows)
        reply = self._handled(op, SiteData(train=longest, validation=longest))  # what takes the most memory
        data, taken = SiteData(train=typical, validation=typical), 0.0
        for _ in range(1 if op == "statistics" else 2):  # what comes again finds features that are kept
            began = time.perf_counter()
            self._handled(op, data)
            taken = time.perf_counter() - began
        return Weighed.of(reply), Pace(fixed=0.0, each=taken / len(typical))

    def _by_steps(self, steps: int, seconds: float) -> Pace:
        if self._shortened(1) is self._federation:
            return Pace(fixed=0.0, each=self._timed(steps) / steps)
        ones = [self._timed(1)]
        while len(ones) < _REPEATS and sum(ones) < seconds:
            ones.append(self._timed(1))
        one = statistics.median(ones)
        many = min(steps, round(seconds / one))
        if many < 2:
            return Pace(fixed=0.0, each=one)
        each = max(0.0, self._timed(many) - one) / (many - 1)
        return Pace(fixed=max(0.0, one - each), each=each)

    def _timed(self, steps: int) -> float:
        began = time.perf_counter()
        with suppress(TrainingFailed):  # as much work as training that succeeds
            self._handled("train", self._data, steps=steps)
        return time.perf_counter() - began

    def _test_row_s(self) -> float:
        test = self._federation.test
        if test is None:
            return 0.0
        few = _typical(test)
        federation = replace(self._federation, test=few)
        parameters = federation.algorithm.task.flat(federation.seed, federation.plan.plain).read()
        federation.evaluate(parameters)  # fills caches
        began = time.perf_counter()
        federation.evaluate(parameters)
        return (time.perf_counter() - began) / len(few)

    def _shortened(self, steps: int) -> Federation[Any]:
        """The federation with so many steps of training; the very same if that cannot be."""
        algorithm = self._federation.algorithm
        shorter = swapped(algorithm, algorithm.training, replace(algorithm.training, epochs=None, steps=steps))
        return self._federation if shorter is algorithm else replace(self._federation, algorithm=shorter)


def _typical(rows: Examples) -> Examples:
    """Those in the middle of the order by length, in which an evaluation reads them."""
    first = max(0, (len(rows) - _ROWS) // 2)
    return rows[by_length(rows)[first : first + _ROWS]]


def _piece(name: str, tensor: Tensor) -> Piece:
    return Piece(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
