"""One process of a measurement: a coordinator, which takes orders on standard input, or some of its sites.

    python -m benchmarks.deployment.party coordinator fedelta FOLDER SITES BYTES
    python -m benchmarks.deployment.party sites bare FOLDER FIRST LAST PORT

FOLDER has the certificates of all. An order is a line of JSON, and so is the answer. Sites return what they get and do
nothing else; the bare ones do it in frames of the same size, on one gRPC stream each with the same TLS and settings,
and nothing is looked at.
"""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding
from torch import Tensor

from fedelta.core.heap import keep_freed_memory
from fedelta.core.messages import Reply, Request, Requests
from fedelta.core.program import Fleet, Report, Site
from fedelta.fleet import certificate_forms as forms
from fedelta.fleet.limits import Limits
from fedelta.fleet.loop import loop, wait
from fedelta.fleet.member import Member
from fedelta.fleet.remote import Remote
from fedelta.fleet.wire import CHUNK, Credentials, grpc, transport

_KEEPALIVE_S = 20.0
_METHOD = "/bare/Join"


class Coordinator(Protocol):
    port: int

    def wait_for(self, sites: int) -> None: ...

    def round(self, number: int, *, read: bool) -> None:
        """Send the model to every site, and get it back; `read`: and look at every number of it, one site at a time."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Mirror:
    """A program whose sites return the model as it is."""

    def init(self) -> int:
        return 0

    def finished(self, state: int) -> str | None:
        return None

    def step(self, state: int, fleet: Fleet) -> tuple[int, Report]:
        return state + 1, Report(round=state + 1)

    def handle(self, request: Request, site: Site) -> Reply:
        return Reply.to_request(request, request.shared)


class Fedelta:
    def __init__(self, credentials: Credentials, names: list[str], size: int) -> None:
        self._names = names
        self._size = size
        limits = Limits(absence_s=600.0)
        self._fleet = Remote(Mirror(), names, listen="127.0.0.1:0", credentials=credentials, limits=limits)
        self.port = self._fleet.port

    @cached_property
    def _model(self) -> Tensor:
        return torch.randn(self._size // 4)

    def wait_for(self, sites: int) -> None:
        if not self._fleet.wait_for(sites, 300.0):
            raise TimeoutError(f"only {len(self._fleet.connected())} sites have come")

    def round(self, number: int, *, read: bool) -> None:
        self._fleet.submit_many(Requests(to=self._names, op="mirror", round=number, shared={"w": self._model}), 1)
        for _ in self._names:
            reply = self._fleet.next_reply()
            assert isinstance(reply, Reply)
            assert reply.error is None, reply.error
            assert reply.body["w"].shape == self._model.shape
            assert not read or torch.equal(reply.body["w"], self._model)
            del reply  # or it would stay while the next one comes

    def close(self) -> None:
        self._fleet.close(over="measured")


class Bare:
    def __init__(self, credentials: Credentials, names: list[str], size: int) -> None:
        self._size = size
        self._here = threading.Semaphore(0)
        self._sites = len(names)
        self._asked: list[asyncio.Event] = []
        self.port = wait(self._start(credentials))

    @cached_property
    def _chunks(self) -> list[bytes]:
        model = bytes(torch.randn(self._size // 4).numpy().data)
        return [model[start : start + CHUNK] for start in range(0, self._size, CHUNK)]

    def wait_for(self, sites: int) -> None:
        for _ in range(sites):
            self._here.acquire()

    def round(self, number: int, *, read: bool) -> None:
        wait(self._round())

    def close(self) -> None:
        wait(self._server.stop(None))

    async def _round(self) -> None:
        self._left, self._done = self._sites, asyncio.Event()
        for asked in self._asked:
            asked.set()
        await self._done.wait()

    async def _start(self, own: Credentials) -> int:
        self._server = grpc.aio.server(options=transport(_KEEPALIVE_S))
        service, _, method = _METHOD[1:].partition("/")
        handler = grpc.method_handlers_generic_handler(
            service, {method: grpc.stream_stream_rpc_method_handler(self._join)}
        )
        self._server.add_generic_rpc_handlers((handler,))
        credentials = grpc.ssl_server_credentials([(own.key, own.chain)], own.root, require_client_auth=True)
        port = int(self._server.add_secure_port("127.0.0.1:0", credentials))
        await self._server.start()
        return port

    async def _join(self, _requests: object, context: Any) -> None:
        asked = asyncio.Event()
        self._asked.append(asked)
        self._here.release()
        while True:
            await asked.wait()
            asked.clear()
            for chunk in self._chunks:
                await context.write(chunk)
            for _ in self._chunks:
                await context.read()
            self._left -= 1
            if self._left == 0:
                self._done.set()


def mirror(own: Credentials, name: str, port: int) -> None:
    Member(Mirror(), lambda _name: None, name, at=f"127.0.0.1:{port}", credentials=own).run()


async def bare_mirror(own: Credentials, port: int, chunks: int) -> None:
    credentials = grpc.ssl_channel_credentials(own.root, own.key, own.chain)
    with suppress(grpc.aio.AioRpcError):  # the coordinator has closed
        await _mirrored(credentials, port, chunks)


async def _mirrored(credentials: Any, port: int, chunks: int) -> None:
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=transport(_KEEPALIVE_S)) as channel:
        call = channel.stream_stream(_METHOD)()
        while True:
            came = []
            for _ in range(chunks):
                raw = await call.read()
                if raw is grpc.aio.EOF:
                    return
                came.append(raw)
            for raw in came:
                await call.write(raw)


def answers(coordinator: Coordinator, sites: int) -> Iterator[dict[str, float]]:
    """What comes of the orders, one after the other."""
    number = 0
    while line := sys.stdin.readline():
        match json.loads(line):
            case {"wait": None}:
                coordinator.wait_for(sites)
                yield {}
            case {"rounds": rounds, "read": read}:
                began = time.perf_counter()
                for _ in range(rounds):
                    number += 1
                    coordinator.round(number, read=read)
                yield {"seconds": time.perf_counter() - began}
            case {"memory": None}:
                found = Path("/proc/self/status").read_text().split()
                yield {name: 1024 * int(found[found.index(key) + 1]) for name, key in _MEMORY.items()}
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew


_MEMORY = {"now": "VmRSS:", "peak": "VmHWM:"}  # bytes


def coordinate(kind: str, folder: Path, sites: int, size: int) -> None:
    names = [f"site-{place}" for place in range(sites)]
    own = _credentials(folder, "coordinator")
    made: Coordinator = Bare(own, names, size) if kind == "bare" else Fedelta(own, names, size)
    print(json.dumps({"port": made.port}), flush=True)
    for answer in answers(made, sites):
        print(json.dumps(answer), flush=True)
    made.close()


def take_part(kind: str, folder: Path, first: int, last: int, port: int, chunks: int) -> None:
    own = {name: _credentials(folder, name) for name in (f"site-{place}" for place in range(first, last))}
    if kind == "bare":
        coroutines = [bare_mirror(credentials, port, chunks) for credentials in own.values()]
        for future in [asyncio.run_coroutine_threadsafe(one, loop()) for one in coroutines]:
            future.result()
        return
    threads = [threading.Thread(target=mirror, args=(credentials, name, port)) for name, credentials in own.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def certify(folder: Path, sites: int) -> None:
    """Certificates as `fedelta ca` makes them, for a coordinator and so many sites: one file of JSON for each."""
    period = forms.lasting(None, 1)
    authority_key = generate_private_key(SECP256R1())
    authority = forms.new_authority(authority_key, "A measurement", period)
    for name in ("coordinator", *(f"site-{place}" for place in range(sites))):
        key = generate_private_key(SECP256R1())
        hosts = ("127.0.0.1",) if name == "coordinator" else ()
        made = forms.new_certificate(authority, authority_key, name, key.public_key(), hosts, period)
        own = {
            "root": authority.public_bytes(Encoding.PEM).decode(),
            "chain": made.public_bytes(Encoding.PEM).decode(),
            "key": forms.key_text(key).decode(),
        }
        (folder / f"{name}.json").write_text(json.dumps(own))


def _credentials(folder: Path, name: str) -> Credentials:
    return Credentials(
        **{part: pem.encode() for part, pem in json.loads((folder / f"{name}.json").read_text()).items()}
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()  # as in every run
    role, kind, folder, *numbers = sys.argv[1:]
    if role == "coordinator":
        coordinate(kind, Path(folder), *map(int, numbers))
    else:
        take_part(kind, Path(folder), *map(int, numbers))
