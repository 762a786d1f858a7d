"""Frames between a coordinator and a site, and the messages that travel in chunks between them.

A frame is one byte that says its kind, and a payload: a message of `frames.proto`, or up to 1 MiB of a message's body
(the layout of `core/codec.py`). A body is cut out of the tensors' own memory and put together in one buffer, where it
is read in place. A small body is in the frame that announces it: for small models, the number of frames is what costs.

What comes in is not trusted: whatever the bytes, `parse` and `Incoming` give a frame or raise BadTensors, and nothing
is allocated that was not announced and found to be within the limits. Text is cut and cleaned before anybody reads it.
"""

import functools
import mmap
import os
import re
import weakref
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from fedelta.core import codec
from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.extras import require
from fedelta.core.messages import Meta, Plain, Reply, Request, Tensors

require("deployment", "blake3", "google", "grpc")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or it tells of every connection that ends, on standard error

import grpc as grpc  # noqa: E402  # for those who use it: after the line above
from blake3 import blake3  # noqa: E402
from google.protobuf.message import DecodeError, Message  # noqa: E402

from fedelta.fleet import frames_pb2 as frames  # noqa: E402
from fedelta.fleet import signatures  # noqa: E402

PROTOCOL = 1
METHOD = "/fedelta.Fleet/Join"
CHUNK = 2**20  # bytes of a body in one frame
MOST_CONTROL = 2**16  # bytes of a control frame, without heads
MOST_HEAD = 2**16  # bytes of messages that are sent in the frame that announces them
MOST_KNOWN = 64  # requests that a site says it knows
WINDOW = CHUNK  # bytes on the way that the other side has not asked for yet: 10 MB/s or more with a round trip of 0.1 s
DIGEST = 32  # bytes
_CACHED = 8  # frames of a broadcast that are kept for the sites that come next
_SIZES = 64  # bytes of an announcement for what it says of its messages
_TEXT = 600  # characters of a reason
_KINDS: tuple[type[Message] | None, ...] = (
    None,
    frames.Hello,
    frames.Welcome,
    frames.Refused,
    frames.Request,
    frames.Reply,
    None,  # a chunk
    frames.Again,
    frames.Cancel,
    frames.Over,
)
_HEADED = (frames.Request, frames.Reply)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS) if kind is not None}
_CHUNK_KIND = b"\x06"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a party shows and whom it trusts in TLS: PEM."""

    root: bytes  # certificates of the authorities that the other side's is checked against
    chain: bytes  # this party's certificate, and those between it and the root
    key: bytes  # this party's private key

    def __post_init__(self) -> None:
        for field in fields(self):
            if b"-----BEGIN " not in getattr(self, field.name):
                raise BadInput(f"Credentials.{field.name} is not PEM; pass the content of a file that begins with it")


def transport(keepalive_s: float) -> list[tuple[str, int]]:
    """gRPC's settings on both sides: limits, and pings that find a connection of which only one end is left."""
    ms = max(1, int(1000 * keepalive_s))
    return [
        ("grpc.max_receive_message_length", CHUNK + 1),
        ("grpc.max_send_message_length", CHUNK + 1),
        ("grpc.max_metadata_size", 8192),
        ("grpc.http2.lookahead_bytes", WINDOW),
        ("grpc.http2.bdp_probe", 0),  # or the window grows, and with it what each stream holds in memory
        ("grpc.keepalive_time_ms", ms),
        ("grpc.keepalive_timeout_ms", ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", ms // 2),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def frame(message: Message) -> bytes:
    """A control frame."""
    return bytes([_NUMBERS[type(message)]]) + bytes(message.SerializeToString())


def parse(raw: bytes) -> Message | memoryview:
    """A control message, or the payload of a chunk. Raises BadTensors for anything else."""
    if not raw:
        raise BadTensors("a frame of no bytes came in")
    if raw[:1] == _CHUNK_KIND:
        if not 1 < len(raw) <= CHUNK + 1:
            raise BadTensors(f"a chunk has 1 to {CHUNK} bytes, got {len(raw) - 1}")
        return memoryview(raw)[1:]
    kind = _KINDS[raw[0]] if raw[0] < len(_KINDS) else None
    if kind is None:
        raise BadTensors(f"a frame of the unknown kind {raw[0]} came in; is it another version of the protocol?")
    most = MOST_CONTROL + MOST_HEAD if kind in _HEADED else MOST_CONTROL
    if len(raw) > most:
        raise BadTensors(f"a control frame has at most {most} bytes, got {len(raw)}")
    message = kind()
    try:
        message.ParseFromString(memoryview(raw)[1:])
    except (DecodeError, RecursionError):
        raise BadTensors(f"a frame of kind {raw[0]} does not hold a {kind.__name__}") from None
    digests = getattr(message, "known", [getattr(message, "digest", bytes(DIGEST))])
    if len(digests) > MOST_KNOWN or any(len(digest) != DIGEST for digest in digests):
        raise BadTensors(f"a {kind.__name__} has at most {MOST_KNOWN} digests of {DIGEST} bytes each")
    return message


def clean(text: str) -> str:
    """What another party says, on one line without control characters, and not endlessly."""
    text = re.sub(r"\s+", " ", "".join(c if c.isprintable() or c.isspace() else "?" for c in text)).strip()
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"


def sendable(text: str) -> str:
    """`text` as a control frame can carry it."""
    return clean(text.encode("utf-8", "replace").decode())


def checked_size(what: str, size: int, most: int) -> int:
    """Raises BadTensors where an announced size is beyond the limit: before anything is allocated for it."""
    if size > most:
        raise BadTensors(
            f"{what} of {size} bytes is announced, and at most {most} are taken; where that is too little, raise "
            "--largest-message"
        )
    return size


class Outgoing:
    """Tensors and metadata as the frames of a message, cut out of the tensors' memory when they are sent.

    The tensors must not change until then. The frames made last are kept: sites that get the same broadcast at about
    the same time get the same objects.
    """

    def __init__(self, tensors: Tensors, meta: Meta | None = None) -> None:
        self.tensors = tensors
        pieces = codec.chunks(tensors, meta) if tensors or meta else ()
        self._pieces = [memoryview(piece) for piece in pieces if len(piece)]
        self._starts = [0, *accumulate(piece.nbytes for piece in self._pieces)]
        self.size = self._starts[-1]  # bytes; 0 where there is nothing to send
        self._frames: OrderedDict[int, bytes] = OrderedDict()
        self._head: bytes | None = None
        self._digest: bytes | None = None

    def digest(self) -> bytes:
        """BLAKE3 of the message: a third of the time of SHA-256, or less, and models are large."""
        if self._digest is None:
            found = blake3()
            for piece in self._pieces:
                found.update(piece)
            self._digest = found.digest()
        return self._digest

    def head(self) -> bytes:
        """The whole of a small message, for the frame that announces it."""
        if self._head is None:
            self._head = b"".join(self._pieces)
        return self._head

    def frames(self) -> Iterator[bytes]:
        for start in range(0, self.size, CHUNK):
            found = self._frames.get(start)
            if found is None:
                found = self._frames[start] = self._cut(start, min(start + CHUNK, self.size))
                if len(self._frames) > _CACHED:
                    self._frames.popitem(last=False)
            yield found

    def _cut(self, begin: int, end: int) -> bytes:
        parts: list[bytes | memoryview] = [_CHUNK_KIND]
        place = bisect_right(self._starts, begin) - 1
        while begin < end:
            piece, start = self._pieces[place], self._starts[place]
            parts.append(piece[begin - start : end - start])
            place += 1
            begin = self._starts[place]
        return b"".join(parts)


class Incoming:
    """A message that comes in chunks, put together in one buffer: in memory, in a file, or nowhere.

    The memory is not touched before bytes arrive for it, so that an announcement alone takes none. A message that is
    whole in its announcement stays there.
    """

    def __init__(self, size: int, head: bytes = b"", *, file: BinaryIO | None = None, drop: bool = False) -> None:
        """`head`: the bytes that came with the announcement; `drop`: only count.

        `file`: an empty one that is open for reading and writing, which is closed here. Raises BadTensors unless the
        head has all bytes or none.
        """
        if head and len(head) != size:
            raise BadTensors(f"an announcement of {size} bytes has {len(head)} of them, where all or none belong")
        self.size = size
        self.whole = head if len(head) == size and not drop else None
        self.memory = None if self.whole is not None or file is not None or drop else _memory(size)
        self._there = len(head)
        self._hash = None if self.whole is not None or drop else blake3()
        self._file = file
        self._buffer = None if self.memory is None else self.memory.data

    @property
    def complete(self) -> bool:
        return self._there == self.size

    def add(self, payload: memoryview) -> None:
        """The next chunk. Raises BadTensors where more comes than was announced, or in pieces that only cost time."""
        end = self._there + payload.nbytes
        if end > self.size:
            raise BadTensors(f"{end} bytes or more came of a message that was announced with {self.size}")
        if payload.nbytes < CHUNK and end < self.size:
            raise BadTensors(f"a chunk that is not the last of its message has {CHUNK} bytes, got {payload.nbytes}")
        if self._buffer is not None:
            self._buffer[self._there : end] = payload
        elif self._file is not None:
            self._file.write(payload)
        if self._hash is not None:
            self._hash.update(payload)
        self._there = end

    def digest(self) -> bytes:
        """BLAKE3 of what has come, where it was not dropped."""
        if self._hash is None:
            assert self.whole is not None
            self._hash = blake3(self.whole)
        return self._hash.digest()

    def read(self) -> tuple[dict[str, Tensor], dict[str, Plain]]:
        """The complete message; the tensors are views of the buffer. Raises BadTensors if it is not well formed."""
        if self.size == 0:
            return {}, {}
        if self.whole is not None:
            return codec.decode(self.whole)
        if self._file is not None:
            self._file.flush()
            # private: what is read here may be written to, and stays here
            mapped = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_COPY)
            self.close()
            return codec.decode(memoryview(mapped))
        assert self._buffer is not None
        return codec.decode(self._buffer)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


_spare: deque[mmap.mmap] = deque(maxlen=1)


def _memory(size: int) -> "np.ndarray[Any, Any]":
    """Memory for a message. That of a large one is used again: messages are of one size, and fresh pages cost more than
    copying into them."""
    if size < CHUNK:
        return np.empty(size, dtype=np.uint8)
    try:
        mapped = _spare.popleft()
    except IndexError:
        mapped = None
    if mapped is None or len(mapped) != size:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # no fork shares it
    memory = np.frombuffer(mapped, dtype=np.uint8)
    weakref.finalize(memory, _spare.append, mapped).atexit = False
    return memory


def announcement(request: Request, digest: bytes, signature: bytes = b"") -> Any:
    """What begins a request, but for what it announces. Raises BadInput for text or numbers that no frame carries."""
    try:
        message = frames.Request(
            digest=digest,
            to=request.to,
            op=request.op,
            job=request.job,
            round=request.round,
            attempt=request.attempt,
            base=request.base,
            signature=signature,
        )
    except (ValueError, TypeError, UnicodeError) as error:
        raise BadInput(f"request {request.id!r} cannot be sent: {error}") from None
    if message.ByteSize() > MOST_CONTROL - _SIZES:
        most = MOST_CONTROL - _SIZES
        raise BadInput(f"the name and job of a request have {message.ByteSize()} bytes, and at most {most} are sent")
    return message


def asking(begun: Any, shared: Outgoing, body: Outgoing) -> Iterator[bytes]:
    """The frames of a request: an announcement, and what it does not hold in chunks."""
    begun.shared, begun.body = shared.size, body.size
    if shared.size + body.size <= MOST_HEAD:
        yield _headed(begun, shared_head=shared, body_head=body)
        return
    yield frame(begun)
    yield from shared.frames()
    yield from body.frames()


def _headed(begun: Message, **heads: Outgoing) -> bytes:
    """A frame with heads: fields at the end of a message of Protocol Buffers, which are copied once this way."""
    parts = [frame(begun)]
    for name, message in heads.items():
        if message.size:
            parts += [_tag(begun.DESCRIPTOR.fields_by_name[name].number, message.size), message.head()]
    return b"".join(parts)


@functools.lru_cache(maxsize=64)  # sites of a round send as much
def _tag(field: int, size: int) -> bytes:
    """What stands before the bytes of a field."""
    found = bytearray()
    for number in (field << 3 | 2, size):
        while number > 0x7F:
            found.append(number & 0x7F | 0x80)
            number >>= 7
        found.append(number)
    return bytes(found)


def request_of(begun: Any, shared: Tensors, body: Tensors, meta: Meta) -> Request:
    """The request that an announcement and its two messages make."""
    return Request(
        to=begun.to,
        op=begun.op,
        round=begun.round,
        job=begun.job,
        attempt=begun.attempt,
        base=begun.base,
        shared=shared,
        body=body,
        meta=meta,
    )


def digest_of(run: str, request: Request, shared: bytes, body: bytes) -> bytes:
    """Of all that a request says; `shared` and `body` are the digests of its messages."""
    named = (run, request.to, request.op, request.job, str(request.round), str(request.attempt), str(request.base))
    return signatures.statement(*signatures.texts(*named), shared, body)


def replying(reply: Reply, digest: bytes, body: Outgoing, signature: bytes = b"") -> Iterator[bytes]:
    """The frames of a reply: an announcement, and what it does not hold in chunks."""
    begun = frames.Reply(
        digest=digest,
        answers=reply.answers,
        round=reply.round,
        failed=reply.error is not None,
        error="" if reply.error is None else sendable(reply.error),
        body=body.size,
        signature=signature,
    )
    if body.size <= MOST_HEAD:
        yield _headed(begun, body_head=body)
        return
    yield frame(begun)
    yield from body.frames()


def versions() -> dict[str, str]:
    """Of the libraries that decide on the bits of a result; those of PyTorch for CUDA and for CPUs are one."""
    import torch

    from fedelta import __version__

    return {"fedelta": __version__, "torch": torch.__version__.partition("+")[0], "numpy": np.__version__}
