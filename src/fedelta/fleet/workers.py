"""A fleet of worker processes on this machine.

The broadcast of a cohort is written once, into memory that all workers map; each reply comes back in a block that the
coordinator reads in place. What sites keep between rounds lies in files, so that any worker can go on with any site.
Limits: Linux; a worker keeps the data of every site that it has handled, so in time each may have loaded all of them; a
worker is a daemon, so site code in it cannot start processes of its own (a data loader with `num_workers`, say).
"""

import os
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests, Tensors
from fedelta.core.program import Program
from fedelta.fleet.answer import check_message, check_spill, checked_names, parts, twice, unknown_site
from fedelta.fleet.blocks import Pool
from fedelta.fleet.process import Kind, Start, Worker, context
from fedelta.fleet.schedule import Schedule, Task
from fedelta.fleet.worker import Answer, Job, Message, Ready, bodies_tensors, request_fields, requests_fields

_AHEAD = 2  # jobs at a worker: the one it is busy with, and the next, so that it need not wait for the coordinator


class SiteBug(RuntimeError):
    """A program's `handle` raised what is not a FedeltaError; the message says what, and ends with its traceback."""

    def __init__(self, sites: Sequence[PartyId], traceback: str) -> None:
        what = traceback.strip().splitlines()[-1]
        who = f"site {sites[0]!r}" if len(sites) == 1 else f"one of the {len(sites)} sites {sites[0]!r} … {sites[-1]!r}"
        super().__init__(f"{who} failed with {what}\n{traceback}")
        self.sites = tuple(sites)
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
    """An outstanding request, or an outstanding part of many."""

    request: Request | Requests
    broadcast: _Broadcast | None
    block: int = -1  # for the request, once it is at a worker
    reply: int = -1  # the block for the reply, from then on
    deaths: int = 0
    withdrawn: bool = False


_Task = Task[_Ticket]


class Workers:
    """`workers` processes, each with `threads` intra-op threads of PyTorch; to be closed, or used in a `with`.

    What was submitted is begun by the next `next_reply`, the longest first by what the sites took before (see
    `schedule.py`); which worker handles which site changes no result. When a worker dies (killed, out of memory) it is
    replaced, and what it was handling is tried once more, then answered with a failure. A bug in `handle` is raised by
    `next_reply` as SiteBug.

    Sites whose scratch holds something after `handle_many` must stay in one part until their attempt is over.

    `start`: "fork" is quick, and the default; "spawn" is the default with threads > 1 (after a fork, GNU OpenMP waits
    for ever for threads that were not copied) and once CUDA is in use. With "spawn", program and `site` must be
    picklable, the main module importable, and PyTorch's global settings are those of a new process. Under "fork", site
    code must not use other libraries' OpenMP threads that the coordinator has used before.

    `spill` is an existing folder for what sites keep between rounds (Site.memory); it is of one run and stays. None: a
    temporary one (see TMPDIR).

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
        spill: Path | None = None,
    ) -> None:
        self._names = checked_names(names)
        self._known = dict.fromkeys(self._names)
        how = context(workers, threads, start)
        check_spill(spill, "Workers")
        self._pool = Pool()
        self._broadcasts: dict[int, _Broadcast] = {}
        self._tasks: dict[str, dict[int, _Task]] = {}  # what is outstanding, by id and serial
        self._arrived: deque[tuple[_Task, Reply | Replies | SiteBug]] = deque()
        self._schedule: Schedule[_Ticket] = Schedule(min(workers, len(self._names)))
        self._workers: list[Worker[_Ticket]] = []
        self._closed = False
        temporary = spill is None
        folder = Path(tempfile.mkdtemp(prefix="fedelta-")) if spill is None else spill
        self._tidy = weakref.finalize(self, _remove, folder if temporary else None, os.getpid())
        self._kind = Kind(program, site, threads, folder, temporary, how)
        try:
            for _ in range(min(workers, len(self._names))):
                self._workers.append(self._kind.start())
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
            worker.end()
        self._tidy()
        self._tasks.clear()
        self._arrived.clear()
        self._broadcasts.clear()
        self._schedule = Schedule(0)
        self._pool = Pool()

    def parties(self) -> Sequence[PartyId]:
        return self._names

    def submit(self, request: Request) -> None:
        """Hand over a request. Raises BadInput for an unknown site, an outstanding id, or what cannot be sent."""
        self._check_open()
        if request.to not in self._known:
            raise unknown_site(request.to, self._names)
        if request.id in self._tasks:
            raise twice(request.id)
        check_message(request.body, request.meta)
        self._add(request, (request.to,))

    def submit_many(self, requests: Requests, together: int) -> None:
        """As Fleet.submit_many. Raises BadInput as `submit` does, or if a site is named twice."""
        self._check_open()
        if requests.id in self._tasks:
            raise twice(requests.id)
        cut = parts(requests, together, self._known)
        if together == 1:
            for request in requests:
                self.submit(request)
            return
        for part in cut:
            self._add(part, part.to)

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        """As Fleet.next_reply. Raises SiteBug, or WorkerDidNotStart if a worker process ends before it can work."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        # Not in `submit`: it is called once for each site, and the longest is not known before the last call.
        self._dispatch()
        while True:
            while self._arrived:
                task, reply = self._arrived.popleft()
                if task.what.withdrawn:
                    continue
                self._forget(task)
                if isinstance(reply, SiteBug):
                    raise reply
                return reply
            if not self._tasks:
                return None
            by_pipe: dict[Any, Worker[_Ticket]] = {worker.pipe: worker for worker in self._workers}
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable = connection.wait(list(by_pipe), left)
            if not readable:
                return None
            for pipe in readable:
                self._receive(by_pipe[pipe])
            self._dispatch()

    def cancel(self, request_id: str) -> None:
        """As Fleet.cancel. What a worker is working on runs to its end, and its reply is dropped."""
        for task in self._tasks.pop(request_id, {}).values():
            task.what.withdrawn = True
            if task.worker < 0:
                self._schedule.drop(task)
                self._release(task.what)
            elif task.serial in self._workers[task.worker].busy:
                self._workers[task.worker].withdraw(task.serial)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this fleet is closed; submit inside its `with` block")

    def _add(self, request: Request | Requests, sites: Sequence[PartyId]) -> None:
        attempt = (request.job, request.round, request.attempt)
        task = Task(_Ticket(request, self._broadcast(request.shared)), sites, request.op, attempt)
        self._schedule.add(task)
        self._tasks.setdefault(request.id, {})[task.serial] = task

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

    def _dispatch(self) -> None:
        """First something for every worker that is idle, then something ahead for those that are not."""
        for jobs in range(_AHEAD):
            for number, worker in enumerate(self._workers):
                if not self._schedule.ready:
                    return
                if len(worker.busy) == jobs:
                    busy = sum(task.cost for task in worker.busy.values())
                    task = self._schedule.take_ahead(number, busy) if jobs else self._schedule.take(number)
                    if task is not None:
                        self._give(worker, task)

    def _give(self, worker: Worker[_Ticket], task: _Task) -> None:
        ticket = task.what
        if task.torn:
            why = "the scratch of these sites lies in several processes; ask them in the same parts as before"
            self._arrived.append((task, SiteBug(task.sites, f"RuntimeError: {why}")))
            self._end(task)
            return
        if ticket.block < 0:
            ticket.block, ticket.reply = self._pool.take("request"), self._pool.take("reply")
        stale = self._schedule.stale(task.worker)
        request = ticket.request
        if isinstance(request, Requests):
            size = self._pool[ticket.block].write((requests_fields(request), stale), bodies_tensors(request))
        else:
            size = self._pool[ticket.block].write((request_fields(request), stale), request.body)
        shared = ticket.broadcast.message if ticket.broadcast else None
        worker.give(task, Job(task.serial, shared, Message(ticket.block, size), ticket.reply, ()), self._pool)

    def _receive(self, worker: Worker[_Ticket]) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if isinstance(message, Ready):
            worker.ready = True
            return
        assert isinstance(message, Answer)
        task = worker.busy.pop(message.serial)
        worker.hold(set(message.held), self._pool)
        if message.size is None:  # it was withdrawn
            self._end(task)
            return
        (fields, scratch), body, view = self._pool[task.what.reply].read(message.size)
        if not task.what.withdrawn:
            if message.bug is not None:
                self._arrived.append((task, SiteBug(task.sites, message.bug)))
            else:
                body = self._kept(task.what.reply, body, view)
                reply = (Replies if isinstance(task.what.request, Requests) else Reply)(body=body, **fields)
                self._arrived.append((task, reply))
        self._end(task, message.seconds, scratch)

    def _kept(self, block: int, body: dict[str, Any], view: memoryview) -> dict[str, Any]:
        """The tensors of a reply, so that they stay as they are."""
        if self._pool.lent < _AHEAD * len(self._workers):
            self._pool.hold(block)
            self._pool.lend(block, view)
            return body
        # A program that keeps many replies gets copies, so that open blocks stay few.
        return {name: tensor.clone() for name, tensor in body.items()}

    def _end(self, task: _Task, seconds: float | None = None, scratch: Sequence[PartyId] = ()) -> None:
        self._schedule.over(task, seconds, scratch)
        self._release(task.what)

    def _release(self, ticket: _Ticket) -> None:
        if ticket.block >= 0:
            self._pool.release(ticket.block)
            self._pool.release(ticket.reply)
        if ticket.broadcast is not None:
            ticket.broadcast.users -= 1
            if ticket.broadcast.users == 0:
                del self._broadcasts[id(ticket.broadcast.shared)]
                self._pool.release(ticket.broadcast.message.block)

    def _forget(self, task: _Task) -> None:
        tasks = self._tasks[task.what.request.id]
        del tasks[task.serial]
        if not tasks:
            del self._tasks[task.what.request.id]

    def _replace(self, dead: Worker[_Ticket]) -> None:
        """Put a new process in the place of a dead one, which was handling the first task of those that it had."""
        dead.pipe.close()
        code = dead.end()
        if not dead.ready and code > 0:
            self._workers.remove(dead)
            self.close()
            raise WorkerDidNotStart(
                f"a worker process ended with exit code {code} before it could work; see its output"
            )
        dead.hold(set(), self._pool)
        lost = list(dead.busy.values())
        if lost:
            lost[0].what.deaths += 1
        for task in lost:
            ticket = task.what
            if ticket.withdrawn:
                self._end(task)
            elif ticket.deaths == 2:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                self._arrived.append((task, _failure(ticket.request, f"its worker process died ({how}) twice")))
                self._end(task)
            else:
                self._schedule.back(task)
        index = self._workers.index(dead)
        try:
            self._workers[index] = self._kind.start()
        except BaseException:
            del self._workers[index]
            self.close()
            raise


def _failure(request: Request | Requests, error: str) -> Reply | Replies:
    if isinstance(request, Requests):
        return Replies.failure(request, error)
    return Reply.failure(request, error)


def _remove(temporary: Path | None, owner: int) -> None:
    if temporary is not None and os.getpid() == owner:  # a fork has a copy of the fleet, and may drop it
        shutil.rmtree(temporary, ignore_errors=True)
