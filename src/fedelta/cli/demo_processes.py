"""Runs the jobs of the demo in processes of one thread each.

Jobs are independent but for the model that they start from, so whole jobs are dealt out, in their order, to whoever is
free; reports come back as they are made. Limits: POSIX systems; one job needs no more than one process.
"""

import multiprocessing
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import torch

from fedelta.cli.demo_methods import Job, train
from fedelta.core.errors import FedeltaError
from fedelta.core.program import Report
from fedelta.fleet.children import leave_with_the_parent, started_quietly

_PATIENCE_S = 2.0  # for a process that was told to end


@dataclass(frozen=True, kw_only=True)
class Done:
    """A job is over; `model` is a network's state dict as one message of the codec."""

    model: bytes


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: connection.Connection
    job: Job | None = None


@dataclass
class _Bench:
    """The jobs that wait, in their order, and the models that they wait for."""

    waiting: list[Job]
    models: dict[Job, bytes] = field(default_factory=dict)

    def take(self) -> tuple[Job, bytes | None] | None:
        """The first job that can begin, with the model that it starts from."""
        for job in self.waiting:
            if job.start is None or job.start in self.models:
                self.waiting.remove(job)
                return job, None if job.start is None else self.models[job.start]
        return None


class Processes:
    """`workers` processes (0: this one), to be used in a `with`; leaving it ends them, whatever they are busy with."""

    def __init__(self, workers: int) -> None:
        self._count = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        forks = sys.platform == "linux"
        context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        with started_quietly():
            for _ in range(self._count):
                ours, theirs = multiprocessing.Pipe()
                inherited = [*(worker.pipe for worker in self._workers), ours] if forks else []
                process = context.Process(target=_serve, args=(theirs, inherited), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_PATIENCE_S)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Report | Done]]:
        """Run all jobs; yields what happens as it happens.

        A job must come after the one that it starts from. Raises the FedeltaError of a job, RuntimeError for a bug.
        """
        bench = _Bench(list(jobs))
        yield from self._here(bench) if not self._workers else self._there(bench)

    def _here(self, bench: _Bench) -> Iterator[tuple[Job, Report | Done]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            while (taken := bench.take()) is not None:
                for event in _events(*taken):
                    yield taken[0], event
                    if isinstance(event, Done):
                        bench.models[taken[0]] = event.model
        finally:
            torch.set_num_threads(threads)

    def _there(self, bench: _Bench) -> Iterator[tuple[Job, Report | Done]]:
        self._deal(bench)
        while busy := {worker.pipe: worker for worker in self._workers if worker.job is not None}:
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]  # what is ready is among what was waited for
                job, event = worker.job, _received(worker)
                assert job is not None
                if isinstance(event, Done):
                    bench.models[job] = event.model
                    worker.job = None
                    self._deal(bench)
                yield job, event

    def _deal(self, bench: _Bench) -> None:
        for worker in self._workers:
            if worker.job is None and (taken := bench.take()) is not None:
                worker.job = taken[0]
                worker.pipe.send(taken)


def _received(worker: _Worker) -> Report | Done:
    try:
        message = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join(_PATIENCE_S)
        raise FedeltaError(
            f"a worker process ended with exit code {worker.process.exitcode}; free some memory, or use fewer --workers"
        ) from None
    if isinstance(message, FedeltaError):
        raise message
    if isinstance(message, str):
        raise RuntimeError(f"a bug in a worker process:\n{message}")
    assert isinstance(message, Report | Done)
    return message


def _events(job: Job, start: bytes | None) -> Iterator[Report | Done]:
    model = yield from train(job, start)
    yield Done(model=model)


def _serve(pipe: connection.Connection, inherited: Sequence[connection.Connection]) -> None:
    """The main function of a worker process."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=leave_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        while True:
            job, start = pipe.recv()
            try:
                for event in _events(job, start):
                    pipe.send(event)
            except FedeltaError as error:
                pipe.send(error)
            except Exception:
                pipe.send(traceback.format_exc())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has closed its end
