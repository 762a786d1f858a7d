"""A fleet of sites that are elsewhere: they open a stream to this process, which opens none (gRPC, mutual TLS).

The sites are those that are registered, by name, connected or not. With TLS a site's name is the common name of its
certificate. A request waits for its site and is sent again to a stream that takes the place of a broken one, until it
is answered; a reply counts by the digest of its request, so that duplicates and late ones are dropped.

Limits: each site is asked one thing at a time, and for itself (`submit_many` never asks many in one go). Requests wait
in this process: what was not answered when it ends is asked again by whoever resumes the run.
"""

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests, Tensors
from fedelta.core.program import Program
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet import signatures
from fedelta.fleet.address import check_address
from fedelta.fleet.admission import Admission, Allowed, is_final
from fedelta.fleet.answer import check_message, check_spill, checked_names, parts, twice, unknown_site
from fedelta.fleet.known_sites import NoRegister, Register
from fedelta.fleet.limits import Limits
from fedelta.fleet.listening import listening
from fedelta.fleet.loop import call, loop, wait
from fedelta.fleet.rate import Bucket
from fedelta.fleet.receipts import Receipts
from fedelta.fleet.room import Room
from fedelta.fleet.session import Place, Session, Ticket
from fedelta.fleet.wire import (
    PROTOCOL,
    Credentials,
    Outgoing,
    announcement,
    digest_of,
    frame,
    grpc,
)

log = logging.getLogger(__name__)
_TICK_S = 0.2  # between two looks at what is due
_PAUSE_S = 0.005  # between two times that whoever waits is woken, unless all replies are there


class Remote:
    """A coordinator's fleet; to be closed, or used in a `with`.

    `listen` is HOST:PORT; port 0 takes a free one, and `port` says which. `credentials` None means no TLS, on a
    loopback address only: whoever reaches the port may then take any name. `allowed(name, certificate)` gives the
    reason why a site may not take part, or None, and raises NotNow with one that passes without the site; it is asked
    when a site connects and every `Limits.check_s` seconds after that, with the certificate in DER. `run` names the
    run: what sites keep belongs to it, and a run that is resumed has the name that it had. `spill` is an existing
    folder for the files of replies, `receipts` one for what sites have signed (receipts.py). `register` is told of
    joins, refusals and faults, and says who is shut out whether connected or not.

    A bug at a site is a failure of that site here, since other organisations' code must not end the run; its own log
    has the traceback. The tensors of a request must not change until its reply is there.
    """

    def __init__(
        self,
        program: Program[Any],
        names: Sequence[PartyId],
        *,
        listen: str,
        credentials: Credentials | None,
        allowed: Allowed = lambda _name, _certificate: None,
        run: str = "",
        limits: Limits = Limits(),
        spill: Path | None = None,
        receipts: Path | None = None,
        register: Register = NoRegister(),
    ) -> None:
        check_spill(spill, "Remote")
        check_address(listen, credentials)
        self._names = checked_names(names)
        self._credentials = credentials
        self._run = run
        self._limits = limits
        self._room = Room(limits.room, spill)
        self._receipts = Receipts(receipts)
        self._register = register
        self._news = threading.Condition()  # guards the four below
        self._tickets: dict[str, Ticket] = {}
        self._arrived: deque[tuple[Ticket, Reply]] = deque()
        self._connected: dict[PartyId, None] = {}
        self._closed = False
        self._broadcasts: weakref.WeakValueDictionary[int, Outgoing] = weakref.WeakValueDictionary()
        self._signer = None if credentials is None else signatures.Signer(credentials.key)
        self._latest: tuple[object, bytes] = None, b""  # what was signed last, and the signature
        now = time.monotonic()
        self._places = {
            name: Place(
                name=name,
                left=now,
                finish=self._finish,
                streams=Bucket(limits.streams, now),
                unasked=Bucket(limits.unasked, now),
            )
            for name in self._names
        }
        self._admission = Admission(
            program, self._places, tls=credentials is not None, allowed=allowed, limits=limits, register=register
        )
        self._streams: set[asyncio.Task[Any]] = set()
        self._waking, self._woken = False, 0.0
        self.port = wait(self._start(listen))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self, over: str | None = None) -> None:
        """Let go of all sites. `over` says that the run is over, and why; without it sites will try to come back."""
        with self._news:
            if self._closed:
                return
            self._closed = self._admission.closed = True
        wait(self._stop(over))
        with self._news:
            self._tickets.clear()
            self._arrived.clear()
            self._news.notify_all()

    def parties(self) -> Sequence[PartyId]:
        return self._names

    def connected(self) -> Sequence[PartyId]:
        """The sites that have a stream now, in the order in which they came."""
        with self._news:
            return tuple(self._connected)

    def wait_for(self, sites: int, timeout_s: float | None = None) -> bool:
        """Wait until at least so many sites are connected; False if they were not within `timeout_s` seconds."""
        with self._news:
            return self._news.wait_for(lambda: len(self._connected) >= sites or self._closed, timeout_s)

    def submit(self, request: Request) -> None:
        """Hand over a request. Raises BadInput for an unknown site, an outstanding id, or what cannot be sent."""
        if request.to not in self._places:
            raise unknown_site(request.to, self._names)
        check_message(request.body, request.meta)
        self._submit([self._ticket(request)])

    def submit_many(self, requests: Requests, together: int) -> None:
        """Each site is asked for itself, whatever `together` says. Raises BadInput as `submit`, or for a site twice."""
        parts(requests, together, self._places.keys())
        self._submit([self._ticket(request) for request in requests])

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        """As Fleet.next_reply."""
        with self._news:
            self._news.wait_for(lambda: self._arrived or not self._tickets, timeout_s)
            if not self._arrived:
                return None
            ticket, reply = self._arrived.popleft()
            del self._tickets[ticket.request.id]
            return reply

    def cancel(self, request_id: str) -> None:
        """As Fleet.cancel. What a site is working on runs to its end, and its reply is dropped."""
        with self._news:
            found = [id for id, ticket in self._tickets.items() if request_id in (id, _of_all(ticket.request))]
            tickets = [self._tickets.pop(id) for id in found]
            self._arrived = deque(item for item in self._arrived if item[0] not in tickets)
            if self._closed:
                return
        for ticket in tickets:
            call(self._withdraw, ticket)

    def _ticket(self, request: Request) -> Ticket:
        shared, body = self._broadcast(request.shared), Outgoing(request.body, request.meta)
        said = digest_of(self._run, request, shared.digest(), body.digest())
        return Ticket(request, shared, body, announcement(request, said, self._signed(request, shared.digest())))

    def _submit(self, tickets: Sequence[Ticket]) -> None:
        """All of them, or none."""
        with self._news:
            if self._closed:
                raise RuntimeError("this fleet is closed; submit inside its `with` block")
            for ticket in tickets:
                if ticket.request.id in self._tickets:
                    raise twice(ticket.request.id)
            self._tickets |= {ticket.request.id: ticket for ticket in tickets}
        call(self._add, tickets)

    def _broadcast(self, shared: Tensors) -> Outgoing:
        """One object for the whole cohort: encoded once."""
        found = self._broadcasts.get(id(shared))
        if found is None or found.tensors is not shared:
            check_message(shared)
            found = self._broadcasts[id(shared)] = Outgoing(shared)
        return found

    def _signed(self, request: Request, shared: bytes) -> bytes:
        """The signature of a broadcast with this digest: one for the whole cohort."""
        if self._signer is None:
            return b""
        said = (self._run, request.op, request.job, request.round, request.attempt, shared)
        if self._latest[0] != said:
            self._latest = said, self._signer(signatures.broadcast(*said))
        return self._latest[1]

    # What follows runs in the event loop.

    async def _start(self, listen: str) -> int:
        self._server, port = await listening(self._join, listen, self._credentials, self._limits, len(self._names))
        self._watcher = asyncio.create_task(self._watch())
        return port

    async def _stop(self, over: str | None) -> None:
        self._watcher.cancel()
        sessions = [place.session for place in self._places.values() if place.session is not None]
        if over is not None:
            for session in sessions:
                session.end(over, over=True)
            while any(place.session is not None for place in self._places.values()) and sessions:
                await asyncio.sleep(0.01)  # each ends by itself, within two seconds
        await self._server.stop(None if over is None else 1)  # with time for the last frame to go out
        await asyncio.gather(self._watcher, *self._streams, return_exceptions=True)

    async def _join(self, _requests: object, context: Any) -> None:
        """The stream of a site, from its greeting to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)
        found = await self._admission.ask(context)
        if found is None:
            return
        place, hello, certificate = found
        session = Session(place, context, self._room, self._receipts, self._limits.message, hello, certificate)
        if place.session is not None:
            why = f"another process has joined as {place.name}, and takes its place"
            log.warning("site %s: %s", place.name, why, extra={"event": "replaced", "site": place.name})
            place.session.end(why, final=True)
        place.session = session
        try:
            await self._take_part(session, context)
        finally:
            if session.broke is not None:
                self._register.tell("protocol broken", place.name, session.broke)
            if place.session is session:
                place.session, place.left = None, time.monotonic()
                self._tell(place, here=False)

    async def _take_part(self, session: Session, context: Any) -> None:
        """From the welcome of a site until it goes."""
        place, own = session.place, b"" if self._credentials is None else self._credentials.chain
        welcome = frame(frames.Welcome(protocol=PROTOCOL, run=self._run, certificate=own))
        try:
            async with asyncio.timeout(self._limits.stall_s):
                await context.write(welcome)
        except TimeoutError:
            log.warning("site %s takes no welcome", place.name, extra={"event": "stalled", "site": place.name})
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the welcome was not taken")
        self._tell(place, here=True)
        self._register.tell("joined", place.name, certificate=session.certificate)
        try:
            await session.run()
            log.info("site %s has gone", place.name, extra={"event": "left", "site": place.name})
        finally:
            if place.session is session:  # and no other has taken its place
                self._register.tell("left", place.name)

    def _tell(self, place: Place, *, here: bool) -> None:
        if here:
            log.info("site %s has joined", place.name, extra={"event": "joined", "site": place.name})
        with self._news:
            self._connected.pop(place.name, None)
            if here:
                self._connected[place.name] = None
            self._news.notify_all()

    def _finish(self, ticket: Ticket, reply: Reply) -> None:
        with self._news:
            if self._tickets.get(ticket.request.id) is ticket:
                self._arrived.append((ticket, reply))
            all_are_here = len(self._arrived) == len(self._tickets)
        due = self._woken + _PAUSE_S - time.monotonic()
        if all_are_here or (due <= 0 and not self._waking):
            self._wake()
        elif not self._waking:
            self._waking = True
            loop().call_later(due, self._wake)

    def _wake(self) -> None:
        self._waking, self._woken = False, time.monotonic()
        with self._news:
            self._news.notify_all()

    def _withdraw(self, ticket: Ticket) -> None:
        if not ticket.over:
            self._places[ticket.request.to].end(ticket, None)

    def _add(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            place = self._places[ticket.request.to]
            place.add(ticket)
            barred = self._register.barred(place.name)
            if barred is not None and not ticket.over:
                place.fail(ticket, barred)

    async def _watch(self) -> None:
        """Deadlines, absences, stalled streams, and who may stay."""
        checked = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            check = now - checked >= self._limits.check_s
            checked = now if check else checked
            for place in self._places.values():
                self._look_at(place, now)
                if check and place.session is not None:
                    why = self._admission.why_not(place.name, place.session.certificate)
                    if why is not None:
                        self._shut_out(place.session, str(why), final=is_final(why))

    def _shut_out(self, session: Session, why: str, *, final: bool) -> None:
        if not session.ending:
            name = session.place.name
            log.warning("site %s may not stay: %s", name, why, extra={"event": "shut out", "site": name})
            self._register.tell("shut out", name, why)
            session.end(why, final=final)

    def _look_at(self, place: Place, now: float) -> None:
        limits, session = self._limits, place.session
        barred = self._register.barred(place.name)
        if barred is not None:
            if session is not None:
                self._shut_out(session, barred, final=True)
            if place.head is not None:  # the next one in a moment
                place.fail(place.head, barred)
            return
        if session is not None:
            waiting = [session.heard] if session.receiving else []
            waiting += [session.moved] if session.writing else []
            if waiting and now - min(waiting) > limits.stall_s:
                still = {"event": "stalled", "site": place.name}
                why = f"nothing moved for {limits.stall_s:g} s in the middle of a message"
                log.warning("site %s: its stream is given up: %s", place.name, why, extra=still)
                session.end(why)
        head = place.head
        if head is None or head.asked is None:
            return
        if session is None and now - place.left > limits.absence_s:
            place.fail(head, f"it has not been connected for {limits.absence_s:g} s")
        elif now - head.asked > limits.deadline_s:
            place.fail(head, f"it did not answer within {limits.deadline_s:g} s")


def _of_all(request: Request) -> str:
    """The id of the requests that this one may be one of."""
    return request.id.removesuffix(f"/{request.to}")
