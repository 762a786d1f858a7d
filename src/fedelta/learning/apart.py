"""Work in a process of its own, so that the memory that it takes can be told from what was there before.

The process is a fork of this one. It first gives back what this one had freed, and computes in one thread, as a worker
does. What it was given shares this process's memory and is not counted.

Limits: memory is the resident memory that Linux counts (proc(5)); that of a GPU is not in it. On other systems, and
where this process uses CUDA, which no fork could go on with, the work is done here and its memory is not known.
"""

import ctypes
import gc
import multiprocessing
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fedelta.core.children import leave_with_the_parent, started_quietly
from fedelta.core.errors import FedeltaError
from fedelta.core.heap import keep_freed_memory
from fedelta.core.threads import intra_op_threads

T = TypeVar("T")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of clear_refs, in proc(5)


class Memory:
    """Of the process in which `apart` does its work; it counts from when it is made."""

    def __init__(self, *, known: bool) -> None:
        self._before = _status() if known else {}

    def peak(self) -> int | None:
        """Bytes above those at the beginning, at the moment at which they were most; None where that is not known.

        Code of libraries that came to be mapped, and still is, is taken off: a fork begins without it.
        """
        now = _status() if self._before else {}
        if not {"VmHWM", "VmRSS", "RssFile"} <= now.keys():
            return None
        return max(0, now["VmHWM"] - self._before["VmRSS"] - max(0, now["RssFile"] - self._before["RssFile"]))


class _Bug(NamedTuple):
    said: str
    trace: str


def apart(work: Callable[[Memory], T]) -> T:
    """What `work` returns, done in a process of its own; it must be picklable.

    Raises the FedeltaError of `work`, RuntimeError for any other exception, and FedeltaError if the process was
    killed, which a lack of memory leads to.
    """
    if sys.platform != "linux" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with intra_op_threads(1):
            return work(Memory(known=False))
    gc.collect()  # what is garbage here would be freed there
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(ours, theirs, work), daemon=True)
    with started_quietly():
        process.start()
    theirs.close()
    try:
        found: Any = ours.recv()
    except EOFError:
        process.join()
        raise FedeltaError(
            f"the process that tried out a site's work ended with exit code {process.exitcode}; "
            "free some memory, or lower Training.batch"
        ) from None
    finally:
        ours.close()
        process.kill()
        process.join()
    if isinstance(found, FedeltaError):
        raise found
    if isinstance(found, _Bug):
        error = RuntimeError(found.said)
        error.add_note(f"in the process that tried out a site's work:\n{found.trace}")
        raise error
    result: T = found
    return result


def _serve(theirs: Connection, pipe: Connection, work: Callable[[Memory], object]) -> None:
    """The main function of the process; `theirs` is the parent's end of the pipe, which a fork copies."""
    theirs.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends this one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=leave_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # a collection would copy every page that has an object of the parent
    _give_back_freed_memory()
    keep_freed_memory()
    with suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)
    try:
        pipe.send(work(Memory(known=True)))
    except FedeltaError as error:
        pipe.send(error)
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        pipe.send(_Bug(said, traceback.format_exc()))


def _give_back_freed_memory() -> None:
    """What the parent had freed would serve the work without showing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    text = _STATUS.read_text() if _STATUS.exists() else ""
    return {name: 1024 * int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
