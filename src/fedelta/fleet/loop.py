"""The threads of this process's streams: one with the event loop, and one in which its sites work, all of them.

gRPC's asyncio has one queue of events in a process, which several loops would have to read in turn. Sites work one
after the other, since PyTorch's random generator is the process's. Calls are handed over to the loop many at a time:
waking a thread takes longer than what it does for a small model.
"""

import asyncio
import atexit
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_Call = tuple[Callable[..., object], tuple[object, ...]]
_LAST_S = 10.0  # for what a site still works on when the process ends


def loop() -> asyncio.AbstractEventLoop:
    return _threads().loop


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that runs in the loop; it is cancelled where the wait is interrupted."""
    future = asyncio.run_coroutine_threadsafe(coroutine, loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def call(function: Callable[..., object], *arguments: object) -> None:
    """Call in the loop, after what was handed over before; from any thread."""
    _threads().call(function, arguments)


def work(function: Callable[..., object], *arguments: object) -> None:
    """Call in the thread in which sites work, after what was handed over before; from the loop."""
    _threads().work(function, arguments)


class _Threads:
    """Both threads, and what is on its way to them."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._calls: deque[_Call] = deque()
        self._woken = False
        self._due: list[_Call] = []
        self._handed: queue.SimpleQueue[list[_Call]] = queue.SimpleQueue()
        self._streams = threading.Thread(target=self.loop.run_forever, name="fedelta-streams", daemon=True)
        self._streams.start()
        self._sites = threading.Thread(target=self._work, name="fedelta-sites", daemon=True)
        self._sites.start()
        atexit.register(self._end)

    def call(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self._calls.append((function, arguments))
        if not self._woken:  # or it will look at all of them
            self._woken = True
            self.loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._woken = False  # before the look: whoever comes later wakes the loop again
        while self._calls:
            function, arguments = self._calls.popleft()
            self.loop.call_soon(function, *arguments)

    def work(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        if not self._due:
            self.loop.call_soon(self._hand_over)  # after what else comes in this turn of the loop
        self._due.append((function, arguments))

    def _hand_over(self) -> None:
        due, self._due = self._due, []
        self._handed.put(due)

    def _work(self) -> None:
        while True:
            for function, arguments in self._handed.get():
                function(*arguments)
                del function, arguments  # or they would stay until the next ones come

    def _end(self) -> None:
        if _made is self:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._streams.join(2)
            self._handed.put([(sys.exit, ())])  # PyTorch aborts in a thread that outlives the interpreter
            self._sites.join(_LAST_S)


_made: _Threads | None = None
_making = threading.Lock()


def _forget() -> None:
    """In a fork, which has no thread that would run its parent's loop."""
    global _made, _making
    _made, _making = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _threads() -> _Threads:
    global _made
    if _made is None:
        with _making:
            if _made is None:
                _made = _Threads()
    return _made
