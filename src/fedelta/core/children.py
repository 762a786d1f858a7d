"""How a child process starts and how it ends, whatever it is for."""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process


@contextmanager
def started_quietly() -> Iterator[None]:
    """Start processes with SIGINT held back until they can ignore it, and without Python's warning about threads.

    The child of a fork touches none of the parent's threads: it computes in one thread and writes to its own pipe.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork.*", DeprecationWarning)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_with_the_parent(last: Callable[[], object] | None = None) -> None:
    """Exit when the parent has ended, however it ended, after calling `last`; to be run in a thread of the child."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        if last is not None:
            last()
        os._exit(1)
