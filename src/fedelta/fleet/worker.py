"""What a worker process does: read jobs, answer them one by one, go when the coordinator goes.

Tensors travel in shared blocks; the pipe carries only the small messages below. `workers.py` is the other end.
"""

import os
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection, reduction
from typing import Any, NamedTuple

import torch

from fedelta.core.messages import Reply, Request
from fedelta.core.program import Program
from fedelta.fleet.answer import Sites, answer
from fedelta.fleet.blocks import Block
from fedelta.fleet.children import leave_with_the_parent


class Message(NamedTuple):
    """A message in a block."""

    block: int
    size: int  # bytes


class Job(NamedTuple):
    """Handle a request. The descriptors of the blocks in `new` follow it in the pipe, in that order."""

    serial: int
    shared: Message | None
    request: Message
    reply: int  # the block to write the reply into
    new: tuple[int, ...]


class Withdraw(NamedTuple):
    """Do not begin a job."""

    serial: int


class Ready(NamedTuple):
    """The worker has started."""


class Answer(NamedTuple):
    """A job is over: a reply of `size` bytes is in its block, or there was a bug, or it was withdrawn."""

    serial: int
    size: int | None
    bug: str | None  # the traceback
    held: tuple[int, ...]  # blocks that a site still reads: tensors of a request that it kept in its scratch


def serve(
    pipe: connection.Connection,
    inherited: Sequence[connection.Connection],
    program: Program[Any],
    site: Callable[[str], object],
    threads: int,
) -> None:
    """The main function of a worker process; `inherited` are the coordinator's ends of pipes, which a fork copies."""
    for other in inherited:  # with a copy open here, a worker would not notice that the fleet was dropped
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the coordinator decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=leave_with_the_parent, daemon=True).start()
    try:
        pipe.send(Ready())
        _Worker(pipe, program, site).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the coordinator closed the fleet


class _Worker:
    def __init__(
        self,
        pipe: connection.Connection,
        program: Program[Any],
        site: Callable[[str], object],
    ) -> None:
        self._pipe = pipe
        self._program = program
        self._sites = Sites(site)
        self._blocks: dict[int, Block] = {}
        self._views: list[tuple[int, weakref.ref[memoryview]]] = []
        self._jobs: deque[Job] = deque()

    def run(self) -> None:
        while True:
            while not self._jobs or self._pipe.poll():
                self._receive()
            job = self._jobs.popleft()
            try:
                size, bug = self._work(job), None
            except BaseException:
                size, bug = None, traceback.format_exc()
            self._pipe.send(Answer(job.serial, size, bug, self._held()))

    def _receive(self) -> None:
        message = self._pipe.recv()
        if isinstance(message, Job):
            for number in message.new:
                self._blocks[number] = Block(reduction.recv_handle(self._pipe))
            self._jobs.append(message)
        elif isinstance(message, Withdraw):
            kept = deque(job for job in self._jobs if job.serial != message.serial)
            if len(kept) < len(self._jobs):
                self._jobs = kept
                self._pipe.send(Answer(message.serial, None, None, self._held()))

    def _work(self, job: Job) -> int:
        shared = {} if job.shared is None else self._read(job.shared)[1]
        fields, body = self._read(job.request)
        request = Request(shared=shared, body=body, **fields)
        reply = answer(self._program, request, self._sites.of(request))
        return self._blocks[job.reply].write(reply_fields(reply), reply.body)

    def _read(self, message: Message) -> tuple[Any, dict[str, torch.Tensor]]:
        head, tensors, view = self._blocks[message.block].read(message.size)
        self._views.append((message.block, weakref.ref(view)))
        return head, tensors

    def _held(self) -> tuple[int, ...]:
        self._views = [(number, view) for number, view in self._views if view() is not None]
        return tuple({number for number, _ in self._views})


def request_fields(request: Request) -> dict[str, Any]:
    """A request without its tensors."""
    names = ("to", "op", "round", "job", "attempt", "base")
    return {name: getattr(request, name) for name in names} | {"meta": dict(request.meta)}


def reply_fields(reply: Reply) -> dict[str, Any]:
    """A reply without its tensors."""
    names = ("sender", "answers", "round", "error")
    return {name: getattr(reply, name) for name in names} | {"meta": dict(reply.meta)}
