"""Sites that do their work as others do, and then send what no site sends; and strangers at the door.

Each of them is a stream with frames made by hand. What it did, and what it was told, is a line of rogues.jsonl.
"""

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from fedelta.cli.deployment import loaded
from fedelta.core import codec
from fedelta.core.digest import digest
from fedelta.core.messages import Reply, Request
from fedelta.core.threads import intra_op_threads
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet import signatures
from fedelta.fleet.answer import Sites, answer
from fedelta.fleet.wire import (
    CHUNK,
    METHOD,
    PROTOCOL,
    Incoming,
    frame,
    grpc,
    parse,
    request_of,
    versions,
)

PAUSE_S = 0.05
HEADER = (10**10).to_bytes(8, "little") + bytes(92)
STOP = b""  # in place of a frame: send nothing more


@dataclass(frozen=True)
class Asked:
    """What a trick has to play with."""

    digest: bytes
    reply: Reply  # the honest one
    earlier: Sequence[bytes]  # the frames of the reply before
    sign: Callable[[bytes], bytes]

    @property
    def raw(self) -> bytes:
        return codec.encode(self.reply.body)

    def frames(self, piece: int = CHUNK, **changes: Any) -> list[bytes]:
        """Those of the reply, or of what is made of its tensors."""
        body = {**self.reply.body, **changes}
        raw = codec.encode({name: tensor for name, tensor in body.items() if tensor is not None})
        chunks = [b"\x06" + raw[start : start + piece] for start in range(0, len(raw), piece)]
        return [self.announced(raw), *chunks]

    def announced(self, raw: bytes, **changes: Any) -> bytes:
        """Signed as what it says, whatever that is."""
        said = replace(self.reply, error=changes.get("error"))
        signature = self.sign(signatures.reply(self.digest, said, blake3(raw).digest()))
        own = {"digest": self.digest, "answers": said.answers, "round": said.round, "body": len(raw)}
        return frame(frames.Reply(**(own | {"signature": signature} | changes)))

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> list[bytes]:
        return self.frames(difference=change(self.reply.body["difference"].clone()))


def _nan(vector: torch.Tensor) -> torch.Tensor:
    vector[7] = float("nan")
    return vector


# Name -> what is sent, and what the report then says of the site; nothing where its reply counts.
TRICKS: dict[str, tuple[Callable[[Asked], list[bytes]], str]] = {
    "a reply twice": (lambda a: a.frames() * 2, ""),
    "a reply to nothing first": (
        lambda a: [a.announced(bytes(9), digest=bytes(32)), b"\x06" + bytes(9), *a.frames()],
        "",
    ),
    "an earlier reply first": (lambda a: [*a.earlier, *a.frames()], ""),
    "a reply begun twice": (lambda a: [a.frames()[0], *a.frames()], ""),
    "many small chunks": (lambda a: a.frames(3), "not the last of its message"),
    "no chunk at all": (lambda a: [a.announced(a.raw, body_head=a.raw)], ""),
    "a part of it no chunk": (
        lambda a: [a.announced(a.raw, body_head=a.raw[:99]), b"\x06" + a.raw[99:]],
        "all or none belong",
    ),
    "more than announced, in one frame": (
        lambda a: [a.announced(a.raw[:98], body_head=a.raw[:99])],
        "all or none belong",
    ),
    "bytes": (lambda _: [b"\xff\xfe\xfd"], "unknown kind 255"),
    "an unknown kind": (lambda _: [b"\x63" + bytes(20)], "unknown kind 99"),
    "nothing at all": (lambda _: [b"\x06"], "a chunk has 1 to"),
    "half a frame": (lambda a: [a.frames()[0][:20]], "does not hold a Reply"),
    "a frame of the other side": (lambda _: [frame(frames.Over(reason="it is over"))], "in the middle of a stream"),
    "a second greeting": (lambda _: [frame(frames.Hello(name="h00"))], "in the middle of a stream"),
    "a digest of five bytes": (lambda a: [a.announced(bytes(9), digest=b"12345")], "digests of 32 bytes"),
    "a chunk of no reply": (lambda _: [b"\x06abc"], "belongs to no reply"),
    "bytes in reverse": (lambda a: [a.frames()[0], b"\x06" + a.raw[::-1]], "signature is not of what was sent"),
    "another's signature": (
        lambda a: [a.announced(a.raw, body_head=a.raw, signature=a.sign(b"x"))],
        "signature is not",
    ),
    "no signature": (lambda a: [a.announced(a.raw, body_head=a.raw, signature=b"")], "signature is not"),
    "10 GB announced": (lambda a: [a.announced(b"", body=10**10)], "10000000000 bytes is announced"),
    "10 GB of header": (
        lambda a: [a.announced(HEADER), b"\x06" + HEADER],
        "this one claims 10000000000",
    ),
    "more than announced": (lambda a: [a.announced(bytes(10)), b"\x06" + bytes(11)], "announced with 10"),
    "the reply of another round": (
        lambda a: [a.announced(bytes(9), answers=f"/{a.reply.round - 1}/train/0/r0"), b"\x06" + bytes(9)],
        "says that it answers",
    ),
    "NaN": (lambda a: a.changed(_nan), "holds nan"),
    "infinity": (lambda a: a.changed(lambda v: v / 0), "holds inf"),
    "another shape": (lambda a: a.changed(lambda v: v[:-1]), "malformed"),
    "another dtype": (lambda a: a.changed(lambda v: v.double()), "malformed"),
    "another name": (lambda a: a.frames(difference=None, delta=torch.zeros(21)), "malformed"),
    "no weight": (lambda a: a.frames(weight=None), "malformed"),
    "a weight below zero": (lambda a: a.frames(weight=torch.tensor(-1.0, dtype=torch.float64)), "malformed"),
    "a failure with escapes": (
        lambda a: [a.announced(b"", failed=True, error="\x1b[2J\nround 9 is lost\n{'reason'}")],
        r"\?\[2J round 9 is lost",
    ),
}
# The stream breaks and the site comes back; it is asked again then, and the reply counts.
LOST = "a frame of 3 MiB"  # of which gRPC sees to it that nobody sees it
HUNG = "hanging up in the middle"
SLOW = "a reply that stands still"
BROKEN: dict[str, Callable[[Asked], list[bytes]]] = {
    LOST: lambda _: [bytes(3 * CHUNK)],
    HUNG: lambda a: a.frames()[:1],
    SLOW: lambda a: [a.frames()[0], STOP],
}
ALL: dict[str, tuple[Callable[[Asked], list[bytes]], str]] = TRICKS | {
    name: (make, "") for name, make in BROKEN.items()
}
AGAIN = "bytes"  # what the last of them plays at the end, in every round, until it is let in no more


def plan(seed: int, rounds: int, names: Sequence[str]) -> dict[tuple[str, int], str]:
    """Which site plays which trick in which round; in the rounds between, it is a site like others."""
    found: dict[tuple[str, int], str] = {}
    for place, name in enumerate(names):
        rng = random.Random(f"{seed}/{name}")
        tricks: list[str] = []
        for round in range(3 + place % 2, rounds - 1, 2):
            if not tricks:
                tricks = [trick for trick in ALL if trick != SLOW]  # which takes seconds
                rng.shuffle(tricks)
            found[name, round] = tricks.pop()
    for number in range(max(2, rounds // 100)):
        at = random.Random(f"{seed}/slow/{number}").randrange(rounds * 2 // 3, rounds * 9 // 10)
        found[names[0], at | 1] = SLOW
    for round in range(rounds * 9 // 10, rounds):
        found[names[-1], round] = AGAIN
    return found


class Rogue:
    """One of the sites; `final` is what it is told when it is let in no more."""

    def __init__(self, name: str, at: str, tricks: dict[int, str], note: Callable[..., None]) -> None:
        self._name, self._at, self._tricks, self._note = name, at, tricks, note
        self.experiment, federation = loaded(Path("experiment.py"), (), test=False)
        self._program = federation
        self.digest = digest(federation)
        spill = Path("rogues") / name
        spill.mkdir(parents=True, exist_ok=True)
        self._sites = Sites(self.experiment.data, spill)
        self._sign = signatures.Signer((Path(name) / "private.key").read_bytes())
        self._earlier: list[bytes] = []
        self.round = 0
        self._trick: str | None = None  # that was played last, and to which nothing was said yet

    async def stay(self) -> None:
        while True:
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
                if await self._visit():
                    return
            await asyncio.sleep(PAUSE_S)

    def hello(self, **changes: Any) -> bytes:
        own = {"protocol": PROTOCOL, "name": self._name, "experiment": self.digest, "versions": versions()}
        return frame(frames.Hello(**(own | changes)))

    async def _visit(self) -> bool:
        async with channel(self._name, self._at) as opened:
            call = opened.stream_stream(METHOD)()
            await call.write(self.hello())
            begun: Any = None
            parts: list[Incoming] = []
            while (raw := await call.read()) is not grpc.aio.EOF:
                came = parse(raw)
                if isinstance(came, frames.Refused):
                    self._note(who=self._name, round=self.round, trick=self._trick, said=came.reason, final=came.final)
                    return bool(came.final)
                if isinstance(came, frames.Over):
                    return True
                if isinstance(came, frames.Request):
                    begun, parts = came, [Incoming(came.shared, came.shared_head), Incoming(came.body, came.body_head)]
                elif isinstance(came, memoryview):
                    parts[int(parts[0].complete)].add(came)
                if begun is not None and all(part.complete for part in parts):
                    (shared, _), (body, meta) = (part.read() for part in parts)
                    for each in self._made(request_of(begun, shared, body, meta), begun.digest):
                        if each == STOP:
                            break
                        await call.write(each)
                    begun = None
                    if self._trick == HUNG:
                        return False
        return False

    def _made(self, request: Request, said: bytes) -> Iterator[bytes]:
        """The frames with which this site answers."""
        self.round = request.round
        with intra_op_threads(1):
            reply = answer(self._program, request, self._sites.of(request))
        asked = Asked(said, reply, self._earlier, self._sign)
        if request.op != "train":
            failed = asked.announced(b"", failed=True, error="not here")
            yield from [failed] if reply.error is not None else asked.frames()
            return
        if reply.error is not None:
            self._note(who=self._name, round=request.round, trick="bug", said=reply.error, final=False)
        honest = asked.frames()
        self._trick = self._tricks.pop(request.round, None)
        if self._trick is None:
            yield from honest
        else:
            self._note(who=self._name, round=request.round, trick=self._trick, said=None, final=False)
            yield from ALL[self._trick][0](asked)
        self._earlier = honest


# Who knocks with whose certificate and which first frame, and what is said to that; from the rogue of that certificate.
KNOCKS: dict[str, tuple[str, Callable[[Rogue], bytes], str]] = {
    "a greeting of another": (
        "r0",
        lambda r: r.hello(name="h03"),
        "calls itself 'h03', and its certificate is of 'r0'",
    ),
    "a stranger": ("r1", lambda r: r.hello(name="fir\n\x1b[2J"), "calls itself 'fir"),
    "another experiment": ("r2", lambda r: r.hello(experiment="0" * 64), "r2 has another experiment than"),
    "another version": ("r3", lambda r: r.hello(versions={"torch": "0.1"}), "r3 has torch 0.1"),
    "another protocol": ("r0", lambda r: r.hello(protocol=99), "and the site 99"),
    "bytes for a greeting": ("r1", lambda _: b"\xff" * 100, "unknown kind 255"),
    "a reply for a greeting": ("r2", lambda _: frame(frames.Reply(digest=bytes(32))), "begins with a Hello"),
    "a greeting of 70 kB": ("r3", lambda _: b"\x01" + bytes(70_000), "at most 65536 bytes"),
    "no greeting": ("r0", lambda _: STOP, "no greeting"),
}
REVOKED = "a certificate that is revoked"
EXPIRED = "a certificate that has expired"
OTHER = "a certificate of another authority"
LATE: dict[str, tuple[str, Callable[[Rogue], bytes], str]] = {
    REVOKED: ("h18", lambda r: r.hello(name="h18"), "is revoked since"),
    EXPIRED: ("expired", lambda r: r.hello(), ""),
    OTHER: ("other", lambda r: r.hello(), ""),
}


async def knock(rogue: Rogue, at: str, what: str, note: Callable[..., None]) -> None:
    """Until somebody says something; one whom TLS does not let in is told nothing."""
    folder, make, _ = (KNOCKS | LATE)[what]
    for _ in range(200):
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with channel(folder, at) as opened:
                call = opened.stream_stream(METHOD)()
                raw = make(rogue)
                if raw != STOP:
                    await call.write(raw)
                said = await call.read()
                if said is not grpc.aio.EOF:
                    came: Any = parse(said)
                    if raw != STOP and "no greeting" in getattr(came, "reason", ""):
                        continue  # on a busy machine it came too late
                    note(who=folder, round=rogue.round, trick=what, said=getattr(came, "reason", "welcome"), final=True)
                    return
        if what in (EXPIRED, OTHER):
            note(who=folder, round=rogue.round, trick=what, said=None, final=True)
            return
        await asyncio.sleep(PAUSE_S)


def channel(folder: str, at: str) -> Any:
    """Not by way of Party.read, which sees what is wrong with a certificate before anybody else does."""
    path = Path(folder)
    root, chain, key = ((path / name).read_bytes() for name in ("ca.pem", "certificate.pem", "private.key"))
    options = [
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.aio.secure_channel(at, grpc.ssl_channel_credentials(root, key, chain), options=options)


async def _all(at: str, seed: int, rounds: int, names: Sequence[str]) -> None:
    with open("rogues.jsonl", "a", buffering=1) as file:

        def note(**said: Any) -> None:
            file.write(json.dumps(said) + "\n")

        tricks = plan(seed, rounds, names)
        own = {name: {round: trick for (who, round), trick in tricks.items() if who == name} for name in names}
        rogues = [Rogue(name, at, own[name], note) for name in names]
        staying = [asyncio.create_task(rogue.stay()) for rogue in rogues]
        knocks = [*KNOCKS, *LATE]
        for place, what in enumerate(knocks):
            due = 4 + place * rounds // 40 if what in KNOCKS else rounds * 4 // 5 + place - len(KNOCKS)
            while max(rogue.round for rogue in rogues) < due and not all(task.done() for task in staying):
                await asyncio.sleep(PAUSE_S)
            by = int(KNOCKS[what][0][1]) if what in KNOCKS else 0
            await knock(rogues[by], at, what, note)
        await asyncio.gather(*staying)


def main(arguments: list[str]) -> None:
    at, seed, rounds, *names = arguments
    asyncio.run(_all(at, int(seed), int(rounds), names))
