"""The coordinator's end of a site's stream, and the requests that wait for the site; all of it in one event loop.

A place is a registered site, connected or not. A session is one stream of it: the writer sends the first request of the
place and then waits until it is over, the reader puts replies together. When a stream breaks, the request stays where
it is and the next session sends it again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fedelta.core.errors import BadTensors
from fedelta.core.messages import PartyId, Reply, Request
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet import signatures
from fedelta.fleet.rate import Bucket
from fedelta.fleet.receipts import Receipts
from fedelta.fleet.room import Room
from fedelta.fleet.wire import (
    MOST_KNOWN,
    Incoming,
    Outgoing,
    asking,
    checked_size,
    clean,
    frame,
    grpc,
    parse,
    sendable,
)

log = logging.getLogger(__name__)
_FAREWELL_S = 2.0  # for the last frame of a stream
_FRAME = 1024  # bytes as which a frame counts besides those in it


@dataclass(eq=False)
class Ticket:
    """An outstanding request."""

    request: Request
    shared: Outgoing
    body: Outgoing
    begun: Any  # its announcement
    asked: float | None = None  # since when it is the first of its site's; seconds of the monotonic clock
    over: bool = False  # answered, failed or withdrawn
    answered: bool = False  # by its site

    @property
    def digest(self) -> bytes:
        found: bytes = self.begun.digest
        return found

    def frames(self) -> Iterator[bytes]:
        return asking(self.begun, self.shared, self.body)


@dataclass(eq=False, kw_only=True)
class Place:
    """A registered site."""

    name: PartyId
    left: float  # since when it is not connected, where it is not
    finish: Callable[[Ticket, Reply], None]  # a ticket of this place has its reply
    streams: Bucket  # those that it may open
    unasked: Bucket  # bytes that nobody has asked for
    queue: deque[Ticket] = field(default_factory=deque)
    session: "Session | None" = None
    faults: int = 0  # streams in a row that ended with what the site must not send

    @property
    def head(self) -> Ticket | None:
        return self.queue[0] if self.queue else None

    def add(self, ticket: Ticket) -> None:
        if not ticket.over:  # withdrawn before it came here
            self.queue.append(ticket)
            self._moved()

    def end(self, ticket: Ticket, reply: Reply | None) -> None:
        """A ticket has its reply, or nobody waits for one."""
        ticket.over = True
        if ticket in self.queue:
            self.queue.remove(ticket)
        if reply is not None:
            self.finish(ticket, reply)
        self._moved()

    def fail(self, ticket: Ticket, why: str) -> None:
        self.end(ticket, Reply.failure(ticket.request, why))

    def _moved(self) -> None:
        if self.queue and self.queue[0].asked is None:
            self.queue[0].asked = time.monotonic()
        if self.session is not None and self.session.due:
            self.session.wake.set()


class Session:
    """One stream of a place, from its welcome to its end."""

    def __init__(
        self, place: Place, context: Any, room: Room, receipts: Receipts, most: int, hello: Any, certificate: bytes
    ) -> None:
        """`most`: bytes of a reply; `certificate`: DER, empty without TLS."""
        self.place = place
        self.certificate = certificate
        self.wake = asyncio.Event()
        self.heard = self.moved = time.monotonic()  # the last frame that came; that was taken by the other side
        self.writing = False
        self._context = context
        self._room = room
        self._receipts = receipts
        self._most = most
        self._known = set(hello.known)
        self._sent: Ticket | None = None
        self._unwanted: deque[bytes] = deque(maxlen=MOST_KNOWN)  # requests whose replies nobody waits for
        self._reply: tuple[Any, Ticket | None, Incoming] | None = None
        self._last: bytes | None = None
        self._ended = asyncio.Event()
        self.broke: str | None = None  # what it sent that no site sends

    @property
    def receiving(self) -> bool:
        """Whether a reply has begun to come and is not complete."""
        return self._reply is not None

    @property
    def due(self) -> bool:
        """Whether there is something to send."""
        sent = self._sent
        return bool(self._unwanted) or (self.place.head is not None if sent is None else sent.over)

    @property
    def ending(self) -> bool:
        return self._last is not None

    def _known_of(self, event: str) -> dict[str, object]:
        """For a log that is read by programs."""
        asked = None if self._sent is None else self._sent.request
        found: dict[str, object] = {"event": event, "site": self.place.name}
        return found if asked is None else found | {"job": asked.job, "round": asked.round, "op": asked.op}

    def end(self, reason: str, *, final: bool = False, over: bool = False) -> None:
        """End the stream with a sentence; `final`: the site need not come back, `over`: because all is done."""
        if self._last is None:
            what = (
                frames.Over(reason=sendable(reason)) if over else frames.Refused(reason=sendable(reason), final=final)
            )
            self._last = frame(what)
            self._ended.set()
            self.wake.set()

    async def run(self) -> None:
        """Until the site goes or `end` is called; what it must not send, or cannot be kept, ends the stream."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait({reader, writer, ended}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and not reader.cancelled():
                self._fault(reader.exception())
            if self._last is not None:
                await asyncio.wait({writer}, timeout=_FAREWELL_S)
        finally:
            for task in (reader, writer, ended):
                task.cancel()
            await asyncio.gather(reader, writer, ended, return_exceptions=True)
            if self._reply is not None:
                self._reply[2].close()

    def _fault(self, error: BaseException | None) -> None:
        """Why the reader has ended; noted before anything is awaited, since the site may be gone by then."""
        if isinstance(error, BadTensors):
            self.place.faults += 1
            self.broke = why = f"what it sent is not what a site sends: {error}"
        elif isinstance(error, OSError | MemoryError):
            why = f"its reply could not be kept at the coordinator: {error}"
        else:
            return
        log.warning("site %s: %s", self.place.name, why, extra=self._known_of("broken"))
        if self._sent is not None and not self._sent.over:
            self.place.fail(self._sent, why)
        self.end(why)

    async def _send(self, raw: bytes) -> None:
        self.writing, self.moved = True, time.monotonic()
        await self._context.write(raw)
        self.writing = False

    async def _write(self) -> None:
        while self._last is None:
            head, sent = self.place.head, self._sent
            if sent is not None and sent.over:
                self._sent = None
                if not sent.answered:
                    self._unwanted.append(sent.digest)
            elif self._unwanted:
                await self._send(frame(frames.Cancel(digest=self._unwanted.popleft())))
            elif head is not None and sent is None:
                self._sent = head
                await self._ask(head)
            else:
                self.wake.clear()
                await self.wake.wait()
        await self._send(self._last)

    async def _ask(self, ticket: Ticket) -> None:
        if ticket.digest in self._known:
            self._known.remove(ticket.digest)
            await self._send(frame(frames.Again(digest=ticket.digest)))
            return
        for raw in ticket.frames():
            await self._send(raw)
            if ticket.over or self._last is not None:
                return

    async def _read(self) -> None:
        while True:
            raw = await self._context.read()
            if raw is grpc.aio.EOF:
                return
            self.heard = time.monotonic()
            came = parse(raw)
            if isinstance(came, frames.Reply):
                await self._begin(came)
            elif isinstance(came, memoryview):
                if self._reply is None:
                    raise BadTensors("a chunk came that belongs to no reply")
                self._reply[2].add(came)
            else:
                raise BadTensors(f"a {type(came).__name__} came in the middle of a stream")
            if self._reply is not None and (self._reply[1] is None or self._reply[1].over):
                self._bear(len(raw))
            if self._reply is not None and self._reply[2].complete:
                self._complete(*self._reply)
                self._reply = None

    def _bear(self, size: int) -> None:
        """What nobody has asked for comes from a site that was slow, and not for long."""
        if self.place.unasked.take(size + _FRAME, time.monotonic()) > 0:
            raise BadTensors("it goes on sending what nobody has asked for")

    async def _begin(self, begun: Any) -> None:
        if self._reply is not None:  # and it is begun anew
            self._bear(0)
            self._reply[2].close()
            self._reply = None
        ticket = self._sent
        if ticket is None or ticket.over or ticket.digest != begun.digest:
            late = self._known_of("late")
            log.info("site %s: a reply that nobody waits for was dropped", self.place.name, extra=late)
            message = Incoming(checked_size("a reply", begun.body, self._most), begun.body_head, drop=True)
            self._reply = begun, None, message
            if not message.complete:
                self._unwanted.append(begun.digest)
                self.wake.set()
            return
        asked = ticket.request
        if (begun.answers, begun.round) != (asked.id, asked.round):
            raise BadTensors(f"a reply says that it answers {clean(begun.answers)!r}, and {asked.id!r} was asked")
        if begun.failed and (begun.body or not begun.error):
            raise BadTensors("a reply that says it failed has a body, or no reason")
        size = checked_size("a reply", begun.body, self._most)
        self._reply = begun, ticket, await self._room.incoming(size, begun.body_head)
        self.heard = time.monotonic()  # what was waited for was not the site

    def _complete(self, begun: Any, ticket: Ticket | None, message: Incoming) -> None:
        if ticket is None or ticket.over:
            message.close()
            return
        asked, error = ticket.request, begun.error if begun.failed else None
        reply = Reply(sender=asked.to, answers=asked.id, round=asked.round, error=error)
        if self.certificate:
            said = signatures.reply(ticket.digest, reply, message.digest())
            signatures.check(self.certificate, said, begun.signature)
            if error is None:
                self._receipts.reply(self.certificate, ticket.digest, reply, message.digest(), begun.signature)
        body, meta = message.read()
        self.place.faults, ticket.answered, self._sent = 0, True, None
        self.place.end(ticket, replace(reply, body=body, meta=meta, error=None if error is None else clean(error)))
