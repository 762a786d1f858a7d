"""Whatever comes in on a stream: each side has to refuse it in its own words, and nothing else may be raised.

Frames, from the greeting on, are read by the parts that read them in a deployment; the stream of gRPC, which is not
ours, gives the bytes of an input. Limits: without TLS, but for the certificates that a coordinator shows; what is
behind the digest of a request, which nobody guesses, is for other tests.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tests.fleet.fleet_program import Play, load
from tests.fleet.remote_sites import issued

from fedelta.core import codec
from fedelta.core.digest import digest
from fedelta.core.errors import BadTensors, Refused
from fedelta.core.messages import Reply, Request
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet import signatures
from fedelta.fleet.admission import Admission
from fedelta.fleet.known_sites import NoRegister
from fedelta.fleet.limits import Limits
from fedelta.fleet.member import Member, Patience
from fedelta.fleet.rate import Bucket
from fedelta.fleet.receipts import Receipts
from fedelta.fleet.room import Room
from fedelta.fleet.session import Place, Session, Ticket
from fedelta.fleet.site_stream import SiteStream, next_frame
from fedelta.fleet.wire import CHUNK, PROTOCOL, Outgoing, announcement, asking, frame, grpc, replying, versions

MOST = 2**22  # bytes of a message
SAID = bytes(range(32))  # the digest of what the site is asked
ASKED = Request(to="amber", op="echo", round=1)
BODY = {"w": torch.arange(6.0), "n": torch.tensor(3)}


@dataclass
class Stream:
    """The other side of a stream, which sends these frames and takes all that it is sent."""

    came: Sequence[bytes]
    _sent: int = 0
    taken: list[bytes] = field(default_factory=list)

    async def read(self) -> object:
        for _ in range(4):  # so that whoever writes has its turn
            await asyncio.sleep(0)
        self._sent += 1
        return self.came[self._sent - 1] if self._sent <= len(self.came) else grpc.aio.EOF

    async def write(self, raw: bytes) -> None:
        self.taken.append(raw)

    async def abort(self, *_: object) -> None:
        pass

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return "nobody"


def packed(came: Sequence[bytes]) -> bytes:
    """Frames as an input: each with its length and its padding before it; zeros at the end of a chunk are left out."""
    parts = []
    for one in came:
        padded = len(one) == CHUNK + 1
        kept = one.rstrip(b"\0") if padded else one
        parts.append(len(kept).to_bytes(2, "little") + bytes([padded]) + kept)
    return b"".join(parts)


def unpacked(raw: bytes) -> Iterator[bytes]:
    while len(raw) > 3:
        end = 3 + int.from_bytes(raw[:2], "little")
        yield raw[3:end].ljust(CHUNK + 1, b"\0") if raw[2] % 2 else raw[3:end]
        raw = raw[end:]


@cache
def _admission() -> tuple[Admission, dict[str, Place]]:
    places: dict[str, Place] = {}
    limits = Limits(message=MOST)
    return Admission(Play(), places, tls=False, allowed=lambda *_: None, limits=limits, register=NoRegister()), places


@cache
def _member() -> Member:
    member = Member(Play(), load, "amber", at="127.0.0.1:1", credentials=None, patience=Patience(message=MOST))
    member._enter("run")
    return member


class Watched(Session):
    """A session that hides nothing: in a deployment whatever its reader raises ends the stream."""

    def _fault(self, error: BaseException | None) -> None:
        super()._fault(error)
        if error is not None and self.broke is None:
            raise error


async def at_the_coordinator(came: Sequence[bytes]) -> list[Reply]:
    """A site's stream, from its greeting on; the replies to the one request that waits for it."""
    (admission, places), now, limits = _admission(), time.monotonic(), Limits()
    finished: list[Reply] = []
    place = Place(
        name="amber",
        left=now,
        finish=lambda _, reply: finished.append(reply),
        streams=Bucket(limits.streams, now),
        unasked=Bucket(limits.unasked, now),
    )
    places["amber"] = place
    stream = Stream(came)
    found = await admission.ask(stream)
    if found is None:
        assert stream.taken  # who is refused is told why
        return finished
    place.session = session = Watched(place, stream, Room(MOST, None), Receipts(None), MOST, found[1], b"")
    place.add(Ticket(ASKED, Outgoing({}), Outgoing({}), announcement(ASKED, SAID)))
    await session.run()
    assert len(finished) <= 1
    if session.broke is not None:
        assert session.broke.isprintable()
    return finished


async def at_the_site(came: Sequence[bytes]) -> None:
    """A coordinator's stream, from its welcome on."""
    stream = Stream(came)
    welcome = await next_frame(stream)
    if isinstance(welcome, frames.Welcome):
        signatures.coordinator(welcome.certificate, issued("coordinator").root, "127.0.0.1")
    await _member()._read(SiteStream(stream))


TARGETS: list[Callable[[Sequence[bytes]], Any]] = [at_the_coordinator, at_the_site]


def one_input(raw: bytes) -> None:
    """The first byte says on which side it comes in. Raises what neither side may raise."""
    if raw:
        with suppress(BadTensors, Refused):  # for the member's own loop
            _loop().run_until_complete(TARGETS[raw[0] % len(TARGETS)](list(unpacked(raw[1:]))))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def seeds() -> list[bytes]:
    """Inputs that are as they should be, and some that are not."""
    hello = frames.Hello(protocol=PROTOCOL, name="amber", experiment=digest(Play()), versions=versions(), known=[SAID])
    reply, small = Reply(sender="amber", answers=ASKED.id, round=1), Outgoing(BODY, {"n": [1, None, "x"]})
    large = Outgoing({"w": torch.zeros(CHUNK // 4 + 9)})
    failed = frames.Reply(digest=SAID, answers=ASKED.id, round=1, failed=True, error="it is full")
    unknown = frames.Reply(digest=SAID[::-1], answers="what", body=CHUNK + 9)
    sites = [
        [frame(hello), *replying(reply, SAID, small)],
        [frame(hello), *replying(reply, SAID, large)],
        [frame(hello), frame(failed)],
        [frame(hello), frame(unknown), *replying(reply, SAID, Outgoing({}))],
        [frame(frames.Hello(protocol=9, name="nobody"))],
        [],
    ]
    welcome = frame(frames.Welcome(protocol=PROTOCOL, run="run", certificate=issued("coordinator").chain))
    asked = [list(asking(announcement(ASKED, SAID), one, small)) for one in (small, large)]
    coordinators = [
        [welcome, *asked[0], frame(frames.Cancel(digest=SAID)), frame(frames.Over(reason="all is done"))],
        [welcome, *asked[1]],
        [welcome, frame(frames.Again(digest=SAID))],
        [frame(frames.Refused(reason="not you", final=True)), frame(frames.Refused(reason="not now"))],
    ]
    headers = [codec.encode(BODY)[:40], b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
    return [
        *(bytes([side]) + packed(came) for side, inputs in enumerate((sites, coordinators)) for came in inputs),
        *(bytes([side]) + packed([one]) for side in (0, 1) for one in headers),
    ]
