"""Memory that a process has freed stays with it.

By default glibc gives large blocks back to the kernel as soon as they are free, and the next ones come as fresh pages:
filling them runs at a fifth of the speed of memory that was used before. Training allocates the same blocks in every
step.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGE = 2**30  # bytes


def keep_freed_memory() -> None:
    """For the rest of this process; without effect where the C library is not glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, _LARGE)
