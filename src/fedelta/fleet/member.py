"""A site: it opens a stream to the coordinator, answers what it is asked, and comes back when the stream breaks.

One request is worked on at a time, in a thread that the sites of a process share. A request is known by its digest: the
same one again gets the stored reply, and is not answered a second time.

With a folder, what must outlast the process is in it, for each run apart: the site's memory, which rounds it has worked
on (Site.given), and its replies of the latest round. They survive `kill -9`; `given` a power cut as well.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from fedelta.core.digest import digest
from fedelta.core.errors import BadInput, BadTensors, Refused
from fedelta.core.messages import PartyId, Reply, Request
from fedelta.core.program import Program
from fedelta.fleet import certificate_forms as forms
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet import signatures
from fedelta.fleet.address import check_address, is_loopback
from fedelta.fleet.answer import frozen
from fedelta.fleet.kept import Kept, Stored
from fedelta.fleet.loop import call, wait, work
from fedelta.fleet.receipts import Receipts
from fedelta.fleet.site_stream import SiteStream, next_frame, read_broadcast, why_broken
from fedelta.fleet.wire import (
    METHOD,
    MOST_KNOWN,
    PROTOCOL,
    Credentials,
    Incoming,
    checked_size,
    clean,
    digest_of,
    frame,
    grpc,
    replying,
    request_of,
    sendable,
    transport,
    versions,
)
from fedelta.fleet.working import Guards, Work

log = logging.getLogger(__name__)
_BROKEN = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, BadTensors, OSError, MemoryError)
_AHEAD = 4  # requests that wait at a site; a coordinator sends the next one when nobody waits for the one before


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a site waits, and what it takes."""

    first_pause_s: float = 0.5  # before it comes back; doubled each time, and varied by half
    longest_pause_s: float = 10.0
    connect_s: float = 20.0  # for the coordinator to greet
    keepalive_s: float = 20.0  # of silence before a connection is tried
    message: int = 8 * 2**30  # bytes of a broadcast, and of what a request has besides

    def __post_init__(self) -> None:
        for one in fields(self):
            if not getattr(self, one.name) > 0:
                raise BadInput(f"Patience.{one.name} must be > 0, got {getattr(self, one.name)}")


class Member:
    """The site `name` of an experiment, to be run by `run`; `stop`, from another thread or a signal, ends it.

    `at` is the coordinator's HOST:PORT. `credentials` None means no TLS, to a loopback address only. `folder` is made
    where it is not there, and belongs to this site alone; None: everything ends with the process. `keep(model, round)`
    gets the model with which the run ends, if the coordinator hands it over; None: it is not taken. `threads` is the
    number of intra-op threads, as in Local.
    """

    def __init__(
        self,
        program: Program[Any],
        site: Callable[[str], object],
        name: PartyId,
        *,
        at: str,
        credentials: Credentials | None,
        folder: Path | None = None,
        keep: Callable[[nn.Module, int], object] | None = None,
        threads: int = 1,
        guards: Guards | None = None,
        patience: Patience = Patience(),
    ) -> None:
        if threads < 1:
            raise BadInput(f"Member.threads must be >= 1, got {threads}")
        check_address(at, credentials)
        self._name = name
        self._experiment, self._model = digest(program), frozen(program)
        self._at, self._credentials = at, credentials
        self._signer = None if credentials is None else signatures.Signer(credentials.key)
        self._coordinator = b""  # its certificate, in DER
        self._receipts = Receipts(None)
        self._patience = patience
        self._kept = Kept(folder)
        self._entered: str | None = None  # the run whose folder is open
        self._work = Work(program, site, self._kept, keep=keep, guards=guards, threads=threads)
        self._waiting: dict[bytes, Request] = {}  # those that were not begun
        self._pending: set[bytes] = set()  # requests that wait, or are worked on
        self._answers: dict[bytes, Stored] = {}  # of the latest round
        self._stream: SiteStream | None = None
        self._stopped = asyncio.Event()

    def run(self) -> str | None:
        """Take part until the coordinator says why the run is over, or until `stop`: then None.

        Raises Refused with the coordinator's reason where it does not let this site in.
        """
        try:
            return wait(self._stay())
        finally:
            self._waiting.clear()
            if self._pending:
                call(work, self._kept.close)  # after what is being worked on, which writes there
            else:
                self._kept.close()

    def stop(self) -> None:
        """End `run`; what the site works on is given up."""
        call(self._stopped.set)

    # In the thread that works.

    def _turn(self, said: bytes) -> None:
        request = self._waiting.pop(said, None)
        if request is not None:  # it was not cancelled
            call(self._answered, said, self._work.stored(said, request))

    # In the event loop.

    async def _stay(self) -> str | None:
        pause = self._patience.first_pause_s
        while not self._stopped.is_set():
            came = asyncio.create_task(self._visit())
            stopped = asyncio.create_task(self._stopped.wait())
            await asyncio.wait({came, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if not came.done():
                came.cancel()
                await asyncio.wait({came})
                return None
            try:
                over = came.result()
            except (*_BROKEN, asyncio.CancelledError) as error:  # the other side may have cancelled the call
                details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                why = why_broken(clean(details or type(error).__name__))
                broken = {"event": "broken", "site": self._name}
                log.warning("no connection to %s, and another try in a moment: %s", self._at, why, extra=broken)
                self._check_certificate()
                over = None
            if over is not None:
                return over
            if self._stream is not None and self._stream.asked:  # a coordinator that only greets may be at fault
                pause = self._patience.first_pause_s
            self._stream = None
            with suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.5, 1.5)):
                    await self._stopped.wait()
            pause = min(2 * pause, self._patience.longest_pause_s)
        return None

    async def _visit(self) -> str | None:
        """One stream; returns why the run is over, or None where the stream broke. Raises Refused."""
        options = transport(self._patience.keepalive_s)
        if is_loopback(self._at.rpartition(":")[0]):
            options.append(("grpc.enable_http_proxy", 0))
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(self._at, options=options)
        else:
            own = self._credentials
            channel = grpc.aio.secure_channel(
                self._at, grpc.ssl_channel_credentials(own.root, own.key, own.chain), options=options
            )
        async with channel:
            call = channel.stream_stream(METHOD)()
            hello = frames.Hello(
                protocol=PROTOCOL,
                name=self._name,
                experiment=self._experiment,
                model=self._model,
                versions=versions(),
                known=self._known(),
            )
            async with asyncio.timeout(self._patience.connect_s):
                await call.write(frame(hello))
                welcome = await next_frame(call)
            if isinstance(welcome, frames.Refused):
                return self._heard(welcome)
            if not isinstance(welcome, frames.Welcome) or welcome.protocol != PROTOCOL:
                raise BadTensors(f"a coordinator begins with a Welcome of version {PROTOCOL}")
            if self._credentials is not None:
                host = self._at.rpartition(":")[0]
                self._coordinator = signatures.coordinator(welcome.certificate, self._credentials.root, host)
            log.info("connected to %s", self._at, extra={"event": "joined", "site": self._name})
            self._enter(welcome.run)
            self._stream = stream = SiteStream(call)
            writer = asyncio.create_task(self._write(stream))
            try:
                return await self._read(stream)
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    def _check_certificate(self) -> None:
        """TLS ends a connection without a word: nobody else says that a certificate has expired."""
        if self._credentials is not None:
            end = forms.read_certificate(self._credentials.chain, "its certificate").not_valid_after_utc
            if datetime.now(UTC) > end:
                raise Refused(
                    f"the certificate of {self._name!r} has expired on {forms.day(end)}; ask the authority for another"
                )

    def _heard(self, said: Any) -> str | None:
        """Why the coordinator ended the stream; raises Refused if coming back would not help."""
        reason = clean(said.reason)
        if said.final:
            raise Refused(reason)
        log.warning("the coordinator ended the stream: %s", reason, extra={"event": "ended", "site": self._name})
        return None

    def _known(self) -> list[bytes]:
        """What need not be sent again: requests that are worked on, and those whose replies are here."""
        kept = [said for said, stored in self._answers.items() if stored.error is None or not stored.sent]
        return [*self._pending, *kept][-MOST_KNOWN:]

    def _enter(self, run: str) -> None:
        """Begin to take part in a run, or go on with it."""
        if run == self._entered:
            return
        if self._pending:
            raise OSError("this site still works on a request of another run")
        self._entered = None  # until all of what follows is done
        self._answers = self._kept.enter(run)
        self._receipts = Receipts(self._kept.folder)
        self._work.enter()
        self._entered = run

    async def _write(self, stream: SiteStream) -> None:
        while True:
            said = await stream.outbox.get()
            stored = self._answers.get(said)
            if stored is None or said in stream.dropped:
                continue
            error = None if stored.error is None else sendable(stored.error)
            reply = Reply(sender=self._name, answers=stored.answers, round=stored.round, error=error)
            signature = b""
            if self._signer is not None:
                signature = self._signer(signatures.reply(said, reply, stored.message.digest()))
            for raw in replying(reply, said, stored.message, signature):
                if said in stream.dropped:
                    break
                await stream.call.write(raw)
            else:
                stored.sent = True

    async def _read(self, stream: SiteStream) -> str | None:
        while True:
            came = await next_frame(stream.call)
            if came is None:
                return None
            if isinstance(came, memoryview):
                if not stream.parts:
                    raise BadTensors("a chunk came that belongs to no request")
                first, second = stream.parts
                (second if first.complete else first).add(came)
            elif isinstance(came, frames.Request):
                self._begin(stream, came)
            elif isinstance(came, frames.Again):
                self._wanted(stream, came.digest)
            elif isinstance(came, frames.Cancel):
                if came.digest not in stream.dropped:
                    stream.dropped.append(came.digest)
                if self._waiting.pop(came.digest, None) is not None:
                    self._pending.discard(came.digest)
            elif isinstance(came, frames.Over):
                return clean(came.reason) or "the run is over"
            elif isinstance(came, frames.Refused):
                return self._heard(came)
            else:
                raise BadTensors(f"a {type(came).__name__} came in the middle of a stream")
            if stream.parts and all(part.complete for part in stream.parts):
                self._complete(stream)

    def _begin(self, stream: SiteStream, begun: Any) -> None:
        most = self._patience.message
        if begun.to != self._name:
            raise BadTensors(f"a request for {clean(begun.to)!r} came to {self._name!r}")
        if any(clean(text) != text for text in (begun.op, begun.job)):  # they stand in logs
            raise BadTensors("what a request asks for is not plain text of one line")
        sizes = checked_size("a broadcast", begun.shared, most), checked_size("a request", begun.body, most)
        stream.begun = begun
        heads = begun.shared_head, begun.body_head
        stream.parts = [Incoming(size, head) for size, head in zip(sizes, heads, strict=True)]

    def _complete(self, stream: SiteStream) -> None:
        begun, (broadcast, own) = stream.begun, stream.parts
        stream.begun, stream.parts = None, []
        of_shared, shared = read_broadcast(broadcast)
        request = request_of(begun, shared, *own.read())
        self._check(begun, request, of_shared, own.digest())
        stream.wanted(begun.digest)
        stored = self._answers.get(begun.digest)
        if begun.digest in self._pending or (stored is not None and (stored.error is None or not stored.sent)):
            self._wanted(stream, begun.digest)
            return
        if len(self._pending) >= _AHEAD:
            raise BadTensors(f"{len(self._pending)} requests wait already, and a site takes one at a time")
        if self._coordinator:
            self._receipts.broadcast(self._coordinator, request, self._kept.run or "", of_shared, begun.signature)
        self._pending.add(begun.digest)
        self._waiting[begun.digest] = request
        work(self._turn, begun.digest)

    def _check(self, begun: Any, request: Request, shared: bytes, body: bytes) -> None:
        """Raises BadTensors for a request that is not what its digest says, or not signed by the coordinator."""
        run = self._kept.run or ""
        if digest_of(run, request, shared, body) != begun.digest:
            raise BadTensors("the digest of a request is not of what came")
        if self._coordinator:
            said = signatures.broadcast(run, request.op, request.job, request.round, request.attempt, shared)
            signatures.check(self._coordinator, said, begun.signature)

    def _wanted(self, stream: SiteStream, said: bytes) -> None:
        """Send a reply that is here; one that is worked on is sent when it is there."""
        stream.wanted(said)
        if said in self._answers:
            if stream.outbox.qsize() < MOST_KNOWN:
                stream.outbox.put_nowait(said)
        elif said not in self._pending:
            raise BadTensors("the coordinator asked again what this site does not know")

    def _answered(self, said: bytes, stored: Stored) -> None:
        self._pending.discard(said)
        latest = {(one.job, one.round) for one in self._answers.values()}
        if latest - {(stored.job, stored.round)}:
            self._answers.clear()
        self._answers[said] = stored
        if self._stream is not None:
            self._stream.outbox.put_nowait(said)
