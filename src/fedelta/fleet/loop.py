"""The event loop of this process's streams, in a thread of its own; there is one, whatever the number of streams.

gRPC's asyncio has one queue of events in a process, which several loops would have to read in turn.
"""

import asyncio
import atexit
import functools
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def loop() -> asyncio.AbstractEventLoop:
    return _loop(os.getpid())  # a fork has no thread that would run its parent's


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that runs in the loop; it is cancelled where the wait is interrupted."""
    future = asyncio.run_coroutine_threadsafe(coroutine, loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@functools.cache
def _loop(_process: int) -> asyncio.AbstractEventLoop:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, name="fedelta-streams", daemon=True)
    thread.start()
    atexit.register(_end, made, thread)
    return made


def _end(ended: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    ended.call_soon_threadsafe(ended.stop)
    thread.join(2)
