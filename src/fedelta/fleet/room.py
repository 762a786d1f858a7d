"""Where replies are put together: in memory while there is room, otherwise in files that are gone when they are closed.

What is in memory counts until nobody has the tensors any more, so that a program which is slower than the network
finds the rest in files.
"""

import tempfile
import weakref
from collections import deque
from pathlib import Path
from typing import BinaryIO, cast

from fedelta.fleet.wire import Incoming


class Room:
    """Room for `most` bytes in memory, and more in files in a folder; to be used in one thread."""

    def __init__(self, most: int, folder: Path | None) -> None:
        self._most = most
        self._folder = folder
        self._held = 0
        self._freed: deque[int] = deque()  # from whatever thread lets go of a reply

    def incoming(self, size: int) -> Incoming:
        while self._freed:
            self._held -= self._freed.popleft()
        if self._held + size > self._most:
            return Incoming(size, file=cast(BinaryIO, tempfile.TemporaryFile(dir=self._folder)))
        message = Incoming(size)
        if message.memory is not None:
            self._held += size
            weakref.finalize(message.memory, self._freed.append, size).atexit = False
        return message
