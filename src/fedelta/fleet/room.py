"""Where replies are put together: in memory while there is room, otherwise in files that are gone when they are closed.

What is in memory counts until nobody has the tensors any more. A reply for which there is no room waits a moment for
it, in the buffers of the network: its site sends no faster than the program takes. Where that does not help, because
the program keeps what it gets, the reply goes to a file, and so do others until something is let go of.
"""

import asyncio
import tempfile
import time
import weakref
from collections import deque
from pathlib import Path
from typing import BinaryIO, cast

from fedelta.fleet.wire import Incoming

_WAIT_S, _LOOK_S = 1.0, 0.002
_ALONE = 2**30  # bytes of a reply that is in memory though it is larger than the room: a site may announce anything


class Room:
    """Room in memory for `most` bytes, or one reply of up to 1 GiB, and for more in a folder; for use in one loop."""

    def __init__(self, most: int, folder: Path | None) -> None:
        self._most = most
        self._folder = folder
        self._held = 0
        self._freed: deque[int] = deque()  # from whatever thread lets go of a reply
        self._line = asyncio.Lock()
        self._stuck = False  # nothing was let go of in the time of a wait

    async def incoming(self, size: int, head: bytes = b"") -> Incoming:
        """`head`: the bytes that came with the announcement; a message that is whole in it takes no more room."""
        if head or not size:
            return Incoming(size, head)
        async with self._line:
            until = time.monotonic() + _WAIT_S
            while size <= max(self._most, _ALONE) and not self._has(size) and not self._stuck:
                await asyncio.sleep(_LOOK_S)
                self._stuck = time.monotonic() > until
            if not self._has(size):
                return Incoming(size, file=cast(BinaryIO, tempfile.TemporaryFile(dir=self._folder)))
            message = Incoming(size)
            assert message.memory is not None
            self._held += size
            weakref.finalize(message.memory, self._freed.append, size).atexit = False
            return message

    def _has(self, size: int) -> bool:
        while self._freed:
            self._held -= self._freed.popleft()
            self._stuck = False
        return self._held + size <= self._most or (self._held == 0 and size <= _ALONE)
