"""Lines that are slow and lose packets, where the kernel has no netem: a thread that carries Ethernet frames.

A line has two ends, network interfaces (TAP) that may be moved to any network namespace. What is sent into one comes
out of the other after the delay, or never.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from contextlib import suppress

_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_FRAME = 65536  # bytes
_LOOK_S = 0.2  # between two looks at whether it is to end


class Lines(threading.Thread):
    """Carries frames until `close`. `loss` is the share of frames that are lost, each by itself."""

    def __init__(self, delay_s: float, loss: float, seed: int = 0) -> None:
        super().__init__(daemon=True)
        self._delay_s, self._loss, self._random = delay_s, loss, random.Random(seed)
        self._other: dict[int, int] = {}  # end -> the other end of its line
        self._end = threading.Event()
        self.carried = self.lost = 0

    def add(self, one: str, other: str) -> None:
        """A line between two new interfaces of these names. Raises OSError where there is no right to make them."""
        first, second = _tap(one), _tap(other)
        self._other |= {first: second, second: first}

    def close(self) -> None:
        self._end.set()
        if self.is_alive():
            self.join()
        for end in self._other:
            os.close(end)
        self._other = {}

    def run(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # when it arrives, its number, where, what
        while not self._end.is_set():
            wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else _LOOK_S
            for end in select.select([*self._other], [], [], min(wait, _LOOK_S))[0]:
                with suppress(OSError):  # it is cut
                    frame = os.read(end, _FRAME)
                    self.carried += 1
                    if self._random.random() < self._loss:
                        self.lost += 1
                    else:
                        due = time.monotonic() + self._delay_s
                        heapq.heappush(waiting, (due, self.carried, self._other[end], frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(waiting)
                with suppress(OSError):
                    os.write(end, frame)


def _tap(name: str) -> int:
    found = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(found, _TUNSETIFF, struct.pack("16sH", name.encode(), _TAP_WITHOUT_HEADER))
    except OSError:
        os.close(found)
        raise
    return found
