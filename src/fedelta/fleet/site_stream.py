"""The site's end of its stream, as session.py is the coordinator's."""

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fedelta.core.messages import Tensors
from fedelta.fleet.wire import MOST_KNOWN, Incoming, grpc, parse


@dataclass(eq=False)
class SiteStream:
    """One stream, from its welcome to its end."""

    call: Any
    outbox: "asyncio.Queue[bytes]" = field(default_factory=asyncio.Queue)  # digests of requests whose replies are due
    begun: Any = None
    parts: list[Incoming] = field(default_factory=list)  # of the request that comes in: shared and body
    asked: bool = False  # anything at all
    # Requests whose replies nobody waits for: the latest ones, since a straggler is told of one in each round.
    dropped: "deque[bytes]" = field(default_factory=lambda: deque(maxlen=MOST_KNOWN))

    def wanted(self, said: bytes) -> None:
        """Somebody waits for the reply to this request, perhaps again."""
        self.asked = True
        with suppress(ValueError):
            self.dropped.remove(said)


async def next_frame(call: Any) -> Any:
    """The next frame, or None at the end of the stream. Raises BadTensors for what is none."""
    raw = await call.read()
    if raw is grpc.aio.EOF:
        return None
    return parse(raw)


def why_broken(details: str) -> str:
    """What gRPC says, and what that means where it is known."""
    meanings = {
        "issuer certificate": "the coordinator's certificate is not from the authority in this site's ca.pem",
        "CERTIFICATE_VERIFY_FAILED": "the coordinator's certificate does not hold for this site's ca.pem",
        "onnection refused": "nobody listens there",
        "Cancelling all calls": "the coordinator has stopped",
    }
    found = next((meaning for said, meaning in meanings.items() if said in details), None)
    return details if found is None else f"{found} ({details})"


_latest: tuple[bytes, bytes, Tensors] | None = None


def read_broadcast(came: Incoming) -> tuple[bytes, Tensors]:
    """Digest and tensors. Those of few bytes are read once for all sites of this process, which get them together."""
    global _latest
    if came.whole and _latest is not None and _latest[0] == came.whole:
        _, of_shared, shared = _latest
        if not any(tensor._version for tensor in shared.values()):  # a faulty program may have written there
            return of_shared, shared
    of_shared, (shared, _) = came.digest(), came.read()
    if came.whole:
        _latest = came.whole, of_shared, shared
    return of_shared, shared
