"""A fleet of worker processes on this machine.

The broadcast of a cohort is written once, into memory that all workers map; each reply comes back in a block that the
coordinator reads in place. Each site stays on the worker that it was first given to, because its data and its memory
live there. Limits: Linux; a worker is a daemon, so site code in it cannot start processes of its own (a data
loader with `num_workers`, say).
"""

import itertools
import multiprocessing
import pickle
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, reduction
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal, Self

import torch

from fedelta.core.errors import BadInput, UnsoundCombination
from fedelta.core.messages import PartyId, Reply, Request, Tensors
from fedelta.core.program import Program
from fedelta.fleet.answer import check_message, checked_names, twice, unknown_site
from fedelta.fleet.blocks import Pool
from fedelta.fleet.children import started_quietly
from fedelta.fleet.worker import (
    Answer,
    Job,
    Message,
    Ready,
    Withdraw,
    request_fields,
    serve,
)

Start = Literal["fork", "spawn"]
_AHEAD = 2  # jobs at a worker: the one it is busy with, and the next, so that it need not wait for the coordinator
_PATIENCE_S = 5.0  # for a process that was asked to end
_OPEN: "weakref.WeakSet[connection.Connection]" = weakref.WeakSet()  # our ends of the pipes of all fleets


class SiteBug(RuntimeError):
    """A program's `handle` raised what is not a FedeltaError; the message says what, and ends with its traceback."""

    def __init__(self, site: PartyId, traceback: str) -> None:
        what = traceback.strip().splitlines()[-1]
        super().__init__(f"site {site!r} failed with {what}\n{traceback}")
        self.site = site
        self.traceback = traceback


class WorkerDidNotStart(RuntimeError):
    """A worker process ended before it was ready; it printed the reason."""


@dataclass(eq=False)
class _Broadcast:
    """A `Request.shared` in its block. It is known by identity, so the mapping is kept while a request refers to it."""

    shared: Tensors
    message: Message
    users: int = 0


@dataclass(eq=False)
class _Ticket:
    """An outstanding request."""

    request: Request
    serial: int
    broadcast: _Broadcast | None
    body: Message | None = None  # once it is at a worker
    reply: int = -1  # the block for the reply, from then on
    deaths: int = 0
    withdrawn: bool = False


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: connection.Connection
    ready: bool = False
    queue: deque[_Ticket] = field(default_factory=deque)
    busy: dict[int, _Ticket] = field(default_factory=dict)  # by serial, in the order in which it handles them
    known: set[int] = field(default_factory=set)  # blocks that it has
    held: set[int] = field(default_factory=set)  # blocks that its sites still read, by its last answer

    @property
    def load(self) -> int:
        return len(self.queue) + len(self.busy)


class Workers:
    """`workers` processes, each with `threads` intra-op threads of PyTorch; to be closed, or used in a `with`.

    A site is bound to the worker with the fewest outstanding requests, then the fewest sites, on its first request.
    When a worker dies (killed, out of memory) it is replaced, and what its sites kept in memory is lost; the request
    that it was handling is tried once more, then answered with a failure. A bug in `handle` is raised by `next_reply`
    as SiteBug.

    `start`: "fork" is quick, and the default; "spawn" is the default with threads > 1 (after a fork, GNU OpenMP waits
    for ever for threads that were not copied) and once CUDA is in use. With "spawn", program and `site` must be
    picklable, the main module importable, and PyTorch's global settings are those of a new process. Under "fork", site
    code must not use other libraries' OpenMP threads that the coordinator has used before.

    The tensors of a request must not change until its reply is there. Those of a reply are views of shared memory.
    """

    def __init__(
        self,
        program: Program[Any],
        site: Callable[[str], object],
        names: Sequence[PartyId],
        *,
        workers: int,
        threads: int = 1,
        start: Start | None = None,
    ) -> None:
        self._names = checked_names(names)
        self._known = frozenset(self._names)
        self._context = _context(workers, threads, start)
        self._job = (program, site, threads)
        self._pool = Pool()
        self._serials = itertools.count()
        self._broadcasts: dict[int, _Broadcast] = {}
        self._tickets: dict[str, _Ticket] = {}
        self._arrived: deque[tuple[_Ticket, Reply | SiteBug]] = deque()
        self._home: dict[PartyId, int] = {}
        self._bound: list[int] = []  # sites at each worker
        self._workers: list[_Worker] = []
        self._closed = False
        try:
            for _ in range(min(workers, len(self._names))):
                self._workers.append(self._start())
                self._bound.append(0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and drop what is outstanding; replies that were returned stay valid. May be called again."""
        self._closed = True
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()  # an idle worker, too: another process may have a copy of our end of its pipe
        for worker in workers:
            _end(worker.process)
        self._tickets.clear()
        self._arrived.clear()
        self._broadcasts.clear()
        self._pool = Pool()

    def parties(self) -> Sequence[PartyId]:
        return self._names

    def submit(self, request: Request) -> None:
        """Hand over a request. Raises BadInput for an unknown site, an outstanding id, or what cannot be sent."""
        if self._closed:
            raise RuntimeError("this fleet is closed; submit inside its `with` block")
        if request.to not in self._known:
            raise unknown_site(request.to, self._names)
        if request.id in self._tickets:
            raise twice(request.id)
        check_message(request.body, request.meta)
        ticket = _Ticket(request, next(self._serials), self._broadcast(request.shared))
        self._tickets[request.id] = ticket
        worker = self._workers[self._home_of(request.to)]
        worker.queue.append(ticket)
        self._dispatch(worker)

    def next_reply(self, timeout_s: float | None = None) -> Reply | None:
        """As Fleet.next_reply. Raises SiteBug, or WorkerDidNotStart if a worker process ends before it can work."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            while self._arrived:
                ticket, reply = self._arrived.popleft()
                if ticket.withdrawn:
                    continue
                del self._tickets[ticket.request.id]
                if isinstance(reply, SiteBug):
                    raise reply
                return reply
            if not self._tickets:
                return None
            by_pipe: dict[Any, _Worker] = {worker.pipe: worker for worker in self._workers}
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable = connection.wait(list(by_pipe), left)
            if not readable:
                return None
            for pipe in readable:
                self._receive(by_pipe[pipe])

    def cancel(self, request_id: str) -> None:
        """As Fleet.cancel. A request that a site is working on runs to its end, and its reply is dropped."""
        ticket = self._tickets.pop(request_id, None)
        if ticket is None:
            return
        ticket.withdrawn = True
        worker = self._workers[self._home[ticket.request.to]]
        if ticket in worker.queue:
            worker.queue.remove(ticket)
            self._release(ticket)
        elif ticket.serial in worker.busy:
            _send(worker, Withdraw(ticket.serial))

    def _home_of(self, site: PartyId) -> int:
        if site not in self._home:
            loads = [(worker.load, bound) for worker, bound in zip(self._workers, self._bound, strict=True)]
            self._home[site] = loads.index(min(loads))
            self._bound[self._home[site]] += 1
        return self._home[site]

    def _broadcast(self, shared: Tensors) -> _Broadcast | None:
        if not shared:
            return None
        broadcast = self._broadcasts.get(id(shared))
        if broadcast is None:
            check_message(shared)
            number = self._pool.take("broadcast")
            broadcast = _Broadcast(shared, Message(number, self._pool[number].write(None, shared)))
            self._broadcasts[id(shared)] = broadcast
        broadcast.users += 1
        return broadcast

    def _dispatch(self, worker: _Worker) -> None:
        """Send a worker what it may have ahead."""
        while worker.queue and len(worker.busy) < _AHEAD:
            ticket = worker.queue.popleft()
            if ticket.body is None:
                number = self._pool.take("request")
                size = self._pool[number].write(request_fields(ticket.request), ticket.request.body)
                ticket.body, ticket.reply = (
                    Message(number, size),
                    self._pool.take("reply"),
                )
            shared = ticket.broadcast.message if ticket.broadcast else None
            used = {ticket.body.block, ticket.reply} | ({shared.block} if shared else set())
            new = tuple(used - worker.known)
            worker.known |= used
            worker.busy[ticket.serial] = ticket
            _send(
                worker,
                Job(ticket.serial, shared, ticket.body, ticket.reply, new),
                *(self._pool[n] for n in new),
            )

    def _receive(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if isinstance(message, Ready):
            worker.ready = True
            return
        assert isinstance(message, Answer)
        ticket = worker.busy.pop(message.serial)
        held = set(message.held)
        for number in held - worker.held:
            self._pool.hold(number)
        for number in worker.held - held:
            self._pool.release(number)
        worker.held = held
        if not ticket.withdrawn:
            self._arrived.append((ticket, self._outcome(ticket, message)))
        self._release(ticket)
        self._dispatch(worker)

    def _outcome(self, ticket: _Ticket, message: Answer) -> Reply | SiteBug:
        if message.bug is not None:
            return SiteBug(ticket.request.to, message.bug)
        assert message.size is not None
        fields, body, view = self._pool[ticket.reply].read(message.size)
        if self._pool.lent < _AHEAD * len(self._workers):
            self._pool.hold(ticket.reply)
            self._pool.lend(ticket.reply, view)
        else:  # a program that keeps many replies gets copies, so that open blocks stay few
            body = {name: tensor.clone() for name, tensor in body.items()}
        return Reply(body=body, **fields)

    def _release(self, ticket: _Ticket) -> None:
        if ticket.body is not None:
            self._pool.release(ticket.body.block)
            self._pool.release(ticket.reply)
        if ticket.broadcast is not None:
            ticket.broadcast.users -= 1
            if ticket.broadcast.users == 0:
                del self._broadcasts[id(ticket.broadcast.shared)]
                self._pool.release(ticket.broadcast.message.block)

    def _replace(self, dead: _Worker) -> None:
        """Put a new process in the place of a dead one, which was handling the first request of those that it had."""
        dead.pipe.close()
        code = _end(dead.process)
        if not dead.ready and code > 0:
            self._workers.remove(dead)
            self.close()
            raise WorkerDidNotStart(
                f"a worker process ended with exit code {code} before it could work; see its output"
            )
        for number in dead.held:
            self._pool.release(number)
        lost = list(dead.busy.values())
        if lost:
            lost[0].deaths += 1
            if lost[0].deaths == 2 and not lost[0].withdrawn:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                failure = Reply.failure(lost[0].request, f"its worker process died ({how}) twice")
                self._arrived.append((lost[0], failure))
        for ticket in lost:
            if ticket.withdrawn or ticket.deaths == 2:
                self._release(ticket)
        again = [ticket for ticket in lost if not ticket.withdrawn and ticket.deaths < 2]
        index = self._workers.index(dead)
        try:
            self._workers[index] = self._start(queue=deque([*again, *dead.queue]))
        except BaseException:
            del self._workers[index]
            self.close()
            raise
        self._dispatch(self._workers[index])

    def _start(self, queue: deque[_Ticket] | None = None) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        _OPEN.add(ours)
        forks = self._context.get_start_method() == "fork"
        inherited = [end for end in _OPEN if not end.closed] if forks else []
        process = self._context.Process(target=serve, args=(theirs, inherited, *self._job), daemon=True)
        try:
            with started_quietly():
                process.start()
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            ours.close()
            raise BadInput(
                f"program and site cannot be sent to a new process ({error}); "
                'define them in a module, or use start="fork"'
            ) from error
        finally:
            theirs.close()
        return _Worker(process, ours, queue=queue or deque())


def _context(workers: int, threads: int, start: Start | None) -> Any:
    if sys.platform != "linux":
        raise BadInput(f"Workers needs Linux and this is {sys.platform!r}; use Local (--workers 0)")
    if workers < 1 or threads < 1:
        raise BadInput(f"Workers needs workers >= 1 and threads >= 1, got {workers} and {threads}")
    if start == "fork" and threads > 1:
        raise UnsoundCombination(f'threads={threads} can hang after a fork; use start="spawn" or threads=1')
    if start is None:
        forks = threads == 1 and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        start = "fork" if forks else "spawn"
    return multiprocessing.get_context(start)


def _send(worker: _Worker, message: Job | Withdraw, *blocks: Any) -> None:
    """Messages are far smaller than the pipe and few are under way, so this does not block."""
    try:
        worker.pipe.send(message)
        for block in blocks:
            reduction.send_handle(worker.pipe, block.descriptor, worker.process.pid)
    except OSError:
        pass  # it died: the next read of its pipe tells


def _end(process: BaseProcess) -> int:
    """Wait for a process that is about to end, and make sure that it does; its exit code, negative for a signal."""
    process.join(_PATIENCE_S)
    if process.exitcode is None:
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    return code
