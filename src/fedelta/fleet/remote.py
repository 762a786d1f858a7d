"""A fleet of sites that are elsewhere: they open a stream to this process, which opens none (gRPC, mutual TLS).

The sites are those that are registered, by name, connected or not. With TLS a site's name is the common name of its
certificate. A request waits for its site and is sent again to a stream that takes the place of a broken one, until it
is answered; a reply counts by the digest of its request, so that duplicates and late ones are dropped.

Limits: each site is asked one thing at a time, and for itself (`submit_many` never asks many in one go). Requests wait
in this process: what was not answered when it ends is asked again by whoever resumes the run.
"""

import asyncio
import ipaddress
import logging
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from ssl import PEM_cert_to_DER_cert
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from fedelta.core.digest import digest
from fedelta.core.errors import BadInput, BadTensors, FedeltaError
from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests, Tensors
from fedelta.core.program import Program
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet.answer import check_message, check_spill, checked_names, parts, twice, unknown_site
from fedelta.fleet.loop import loop, wait
from fedelta.fleet.session import Place, Session, Ticket
from fedelta.fleet.wire import (
    METHOD,
    PROTOCOL,
    Credentials,
    Incoming,
    Outgoing,
    Refused,
    clean,
    digest_of,
    frame,
    grpc,
    parse,
    sendable,
    transport,
    versions,
)

log = logging.getLogger(__name__)
_TICK_S = 0.2  # between two looks at what is due
Allowed = Callable[[PartyId, bytes], str | None]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a coordinator takes from a site, and how long it waits."""

    deadline_s: float = 3600.0  # from when a site is asked until its reply is there
    absence_s: float = 60.0  # that a site may be away before it counts as absent
    stall_s: float = 60.0  # without a byte in the middle of a message; and for the greeting
    check_s: float = 5.0  # between two looks at who may stay
    keepalive_s: float = 20.0  # of silence before a connection is tried
    message: int = 8 * 2**30  # bytes of a reply
    room: int = (
        128 * 2**20
    )  # bytes of replies in memory at a time, at least one; others lie in files until they are read
    faults: int = 3  # streams in a row with what a site must not send, until it is let in no more

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise BadInput(f"Limits.{field.name} must be > 0, got {getattr(self, field.name)}")


class Remote:
    """A coordinator's fleet; to be closed, or used in a `with`.

    `listen` is HOST:PORT; port 0 takes a free one, and `port` says which. `credentials` None means no TLS, on a
    loopback address only: whoever reaches the port may then take any name. `allowed(name, certificate)` gives the
    reason why a site may not take part, or None; it is asked when a site connects and every `Limits.check_s` seconds
    after that, with the certificate in DER. `run` names the run: what sites keep belongs to it, and a run that is
    resumed has the name that it had. `spill` is an existing folder for the files of replies.

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
    ) -> None:
        check_spill(spill, "Remote")
        check_address(listen, credentials)
        self._names = checked_names(names)
        self._experiment = digest(program)
        self._credentials = credentials
        self._allowed = allowed
        self._run = run
        self._limits = limits
        self._spill = spill
        self._news = threading.Condition()  # guards the five below
        self._tickets: dict[str, Ticket] = {}
        self._arrived: deque[tuple[Ticket, Reply]] = deque()
        self._connected: dict[PartyId, None] = {}
        self._held = 0  # bytes of memory in replies that were not handed over
        self._closed = False
        self._broadcasts: weakref.WeakValueDictionary[int, Outgoing] = weakref.WeakValueDictionary()
        self._digests: weakref.WeakKeyDictionary[Outgoing, bytes] = weakref.WeakKeyDictionary()
        now = time.monotonic()
        self._places = {name: Place(name=name, left=now, finish=self._finish) for name in self._names}
        self._streams: set[asyncio.Task[Any]] = set()
        self._loop = loop()
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
            self._closed = True
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
        shared, body = self._broadcast(request.shared), Outgoing(request.body, request.meta)
        said = digest_of(self._run, request, self._digests[shared], body.digest())
        ticket = Ticket(request, shared, body, said)
        _ = ticket.announcement  # raises for what cannot be sent
        with self._news:
            if self._closed:
                raise RuntimeError("this fleet is closed; submit inside its `with` block")
            if request.id in self._tickets:
                raise twice(request.id)
            self._tickets[request.id] = ticket
        self._loop.call_soon_threadsafe(self._places[request.to].add, ticket)

    def submit_many(self, requests: Requests, together: int) -> None:
        """Each site is asked for itself, whatever `together` says. Raises BadInput as `submit`, or for a site twice."""
        parts(requests, together, self._places.keys())
        outstanding = next((request.id for request in requests if request.id in self._tickets), None)
        if outstanding is not None:
            raise twice(outstanding)
        for request in requests:
            self.submit(request)

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        """As Fleet.next_reply."""
        with self._news:
            self._news.wait_for(lambda: self._arrived or not self._tickets, timeout_s)
            if not self._arrived:
                return None
            ticket, reply = self._arrived.popleft()
            del self._tickets[ticket.request.id]
            self._held -= ticket.held
            return reply

    def cancel(self, request_id: str) -> None:
        """As Fleet.cancel. What a site is working on runs to its end, and its reply is dropped."""
        with self._news:
            found = [id for id, ticket in self._tickets.items() if request_id in (id, _of_all(ticket.request))]
            tickets = [self._tickets.pop(id) for id in found]
            self._held -= sum(ticket.held for ticket, _ in self._arrived if ticket in tickets)
            self._arrived = deque(item for item in self._arrived if item[0] not in tickets)
            if self._closed:
                return
        for ticket in tickets:
            self._loop.call_soon_threadsafe(self._withdraw, ticket)

    def _broadcast(self, shared: Tensors) -> Outgoing:
        """One object for the whole cohort: encoded once."""
        found = self._broadcasts.get(id(shared))
        if found is None or found.tensors is not shared:
            check_message(shared)
            found = self._broadcasts[id(shared)] = Outgoing(shared)
            self._digests[found] = found.digest()
        return found

    # What follows runs in the event loop.

    async def _start(self, listen: str) -> int:
        options = [*transport(self._limits.keepalive_s), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        handler = grpc.stream_stream_rpc_method_handler(self._join)
        service, _, method = METHOD[1:].partition("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(listen)
            else:
                own = self._credentials
                pair = [(own.key, own.chain)]
                server = grpc.ssl_server_credentials(pair, root_certificates=own.root, require_client_auth=True)
                port = self._server.add_secure_port(listen, server)
        except RuntimeError as error:
            raise BadInput(f"nothing can listen at {listen}: {error}; choose another --listen") from None
        if port == 0:
            raise BadInput(f"nothing can listen at {listen}; choose another --listen, or look at the certificates")
        await self._server.start()
        self._watcher = asyncio.create_task(self._watch())
        return int(port)

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
        name, certificate = _peer(context)
        try:
            async with asyncio.timeout(self._limits.stall_s):
                raw = await context.read()
            hello = None if raw is grpc.aio.EOF else parse(raw)
            place = self._welcomed(hello, name, certificate)
        except (Refused, BadTensors, TimeoutError) as error:
            reason = str(error) or "it sent no greeting"
            log.warning("%s is not let in: %s", clean(name or context.peer()), reason)
            await context.write(frame(frames.Refused(reason=sendable(reason), final=isinstance(error, Refused))))
            return
        session = Session(place, context, self, self._limits.message, hello, certificate)
        if place.session is not None:
            place.session.end(f"another process has joined as {place.name}, and takes its place", final=True)
        place.session = session
        await context.write(frame(frames.Welcome(protocol=PROTOCOL, run=self._run)))
        self._tell(place, here=True)
        try:
            await session.run()
            log.info("site %s has gone", place.name)
        finally:
            if place.session is session:
                place.session, place.left = None, time.monotonic()
                self._tell(place, here=False)

    def _welcomed(self, hello: Any, name: str | None, certificate: bytes) -> Place:
        """The place of a site that may join. Raises Refused with the reason why it may not."""
        if not isinstance(hello, frames.Hello):
            raise Refused("a stream begins with a Hello")
        if hello.protocol != PROTOCOL:
            raise Refused(f"this coordinator speaks version {PROTOCOL} of the protocol, and the site {hello.protocol}")
        said = clean(hello.name)
        if self._credentials is not None and name != hello.name:
            raise Refused(f"the site calls itself {said!r}, and its certificate is of {clean(name or 'nobody')!r}")
        place = self._places.get(hello.name)
        if place is None:
            raise Refused(f"{said!r} is not a registered site; the coordinator's operator has to add it")
        if place.faults >= self._limits.faults:
            raise Refused(f"{said!r} broke the protocol {place.faults} times in a row: shut out; ask the operator")
        why = self._why_not(hello.name, certificate)
        if why is not None:
            raise Refused(why)
        if hello.experiment != self._experiment:
            raise Refused(
                f"{said} has another experiment: {clean(hello.experiment)[:12]}…, here {self._experiment[:12]}…; "
                "install the same experiment file at both"
            )
        for library, here in versions().items():
            there = clean(hello.versions.get(library, "none"))
            if there != here:
                raise Refused(f"{said} has {library} {there} and the coordinator {here}; install the same version")
        return place

    def _why_not(self, name: PartyId, certificate: bytes) -> str | None:
        """What `allowed` says; where it cannot say anything nobody is let in."""
        try:
            return self._allowed(name, certificate)
        except (FedeltaError, OSError) as error:
            return f"whether {name} may join could not be looked up: {error}"

    def _tell(self, place: Place, *, here: bool) -> None:
        if here:
            log.info("site %s has joined", place.name)
        with self._news:
            self._connected.pop(place.name, None)
            if here:
                self._connected[place.name] = None
            self._news.notify_all()

    def incoming(self, ticket: Ticket, size: int) -> Incoming:
        """The buffer for a reply: in memory while there is room."""
        with self._news:
            self._held -= ticket.held  # of a stream that broke
            ticket.held = 0
            if self._held == 0 or self._held + size <= self._limits.room:
                ticket.held = size
                self._held += size
                return Incoming(size)
        return Incoming(size, file=cast(BinaryIO, tempfile.TemporaryFile(dir=self._spill)))

    def _finish(self, ticket: Ticket, reply: Reply) -> None:
        with self._news:
            if self._tickets.get(ticket.request.id) is ticket:
                self._arrived.append((ticket, reply))
                self._news.notify_all()
            else:  # withdrawn in the meantime
                self._held -= ticket.held

    def _withdraw(self, ticket: Ticket) -> None:
        if not ticket.over:
            with self._news:
                self._held -= ticket.held
            self._places[ticket.request.to].end(ticket, None)

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
                    why = self._why_not(place.name, place.session.certificate)
                    if why is not None:
                        log.warning("site %s may not stay: %s", place.name, why)
                        place.session.end(why, final=True)

    def _look_at(self, place: Place, now: float) -> None:
        limits, session = self._limits, place.session
        if session is not None:
            waiting = [session.heard] if session.receiving else []
            waiting += [session.moved] if session.writing else []
            if waiting and now - min(waiting) > limits.stall_s:
                log.warning("site %s: its stream stands still and is given up", place.name)
                session.end(f"nothing moved for {limits.stall_s:g} s in the middle of a message")
        head = place.head
        if head is None or head.asked is None:
            return
        if session is None and now - place.left > limits.absence_s:
            place.fail(head, f"it has not been connected for {limits.absence_s:g} s")
        elif now - head.asked > limits.deadline_s:
            place.fail(head, f"it did not answer within {limits.deadline_s:g} s")


def check_address(address: str, credentials: Credentials | None) -> None:
    """Raises BadInput unless the address is HOST:PORT, and a loopback address where there is no TLS."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise BadInput(f"{address!r} is not HOST:PORT")
    if credentials is None and not is_loopback(host):
        raise BadInput(f"{host} is not a loopback address, and beyond this machine there is no connection without TLS")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its address, or is called localhost."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _peer(context: Any) -> tuple[str | None, bytes]:
    """The common name and the certificate (DER) that the other side has proved to have; none without TLS."""
    said = context.auth_context()
    names, certificates = list(said.get("x509_common_name", ())), list(said.get("x509_pem_cert", ()))
    if len(names) != 1 or len(certificates) != 1:
        return None, b""
    return names[0].decode("utf-8", "replace"), PEM_cert_to_DER_cert(certificates[0].decode())


def _of_all(request: Request) -> str:
    """The id of the requests that this one may be one of."""
    return request.id.removesuffix(f"/{request.to}")
