"""Who takes part, as a running coordinator notes it down: its fleet tells what happens, and asks who is shut out.

The event loop of the streams must not wait for a disk. So what it tells goes to a thread, which writes all that has
come since the last time in one transaction; and it asks a dictionary, which that thread takes from the database after
each, and every second, since an operator may write there as well (`fedelta sites`). While another
process has the database locked, a round that was committed waits here, and the run with it.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from fedelta.core.errors import FedeltaError
from fedelta.core.messages import PartyId
from fedelta.fleet.known_sites import Happened, Turns
from fedelta.fleet.registry import LockedRegistry, Registry

log = logging.getLogger(__name__)
_LOOK_S = 1.0  # between two looks at what an operator has written
Task = Callable[[Registry], None]


class Attendance:
    """A `Register` that writes into a registry, which belongs to it from then on; to be closed."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._barred = self._looked()
        self._failure: Exception | None = None
        self._closing = False
        self._tasks: queue.SimpleQueue[tuple[Task, Future[None] | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="fedelta-registry", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what was told, and let go of the database; one that is locked is tried once more, and no longer."""
        self._closing = True
        self._tasks.put(None)
        self._thread.join()
        self._registry.close()

    def barred(self, name: PartyId) -> str | None:
        return self._barred.get(name)

    def quarantined(self) -> set[PartyId]:
        return set(self._barred)

    def tell(self, what: Happened, site: PartyId, why: str = "", certificate: bytes = b"") -> None:
        def task(registry: Registry) -> None:
            if what == "joined":
                registry.joined(site, certificate)
            elif what == "left":
                registry.left(site)
            elif what == "protocol broken":
                registry.broke(site, why)
            else:
                registry.note(what, site, why)

        self._tasks.put((task, None))

    def committed(self, turns: Turns) -> None:
        """A round was committed in the run's folder; returns once it is in the database.

        Raises FedeltaError where it cannot be written, or what was told before could not.
        """
        written: Future[None] = Future()
        self._tasks.put((lambda registry: registry.committed(turns), written))
        written.result()
        if self._failure is not None:
            raise self._failure

    # In the thread that writes.

    def _write(self) -> None:
        more = True
        while more:
            batch: list[tuple[Task, Future[None] | None]] = []
            try:
                found = self._tasks.get(timeout=_LOOK_S)
                while found is not None:
                    batch.append(found)
                    found = self._tasks.get_nowait()
                more = False
            except queue.Empty:
                pass
            error: Exception | None = None
            try:
                self._written([task for task, _ in batch])
            except Exception as failed:
                error = failed
                if self._failure is None:
                    log.error("%s", failed, exc_info=not isinstance(failed, FedeltaError))
                self._failure = failed
            for _, written in batch:
                if written is not None and error is not None:
                    written.set_exception(error)
                elif written is not None:
                    written.set_result(None)

    def _written(self, tasks: list[Task]) -> None:
        while True:
            try:
                if tasks:
                    with self._registry.transaction():
                        for task in tasks:
                            task(self._registry)
                    tasks = []
                return self._look()
            except LockedRegistry as error:
                if self._closing:
                    raise
                log.warning("%s; it is waited for", error, extra={"event": "registry locked"})

    def _look(self) -> None:
        before, self._barred = self._barred, self._looked()
        for name in self._barred.keys() - before.keys():
            log.warning("%s", self._barred[name], extra={"event": "quarantined", "site": name})
        for name in before.keys() - self._barred.keys():
            log.info("site %s is readmitted", name, extra={"event": "readmitted", "site": name})

    def _looked(self) -> dict[PartyId, str]:
        return {name: found.told(name) for name, found in self._registry.quarantined().items()}
