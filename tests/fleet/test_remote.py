"""What networks, machines and strangers do to a fleet whose sites are elsewhere."""

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from ssl import PEM_cert_to_DER_cert
from typing import Any

import grpc
import pytest
import torch
from blake3 import blake3
from tests.ports import free_port

from fedelta.core.digest import digest
from fedelta.core.errors import BadInput, NotNow, Refused
from fedelta.core.messages import Reply, Request
from fedelta.core.program import Fleet, Site
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet import signatures
from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.kept import Kept
from fedelta.fleet.limits import Limits
from fedelta.fleet.member import Patience
from fedelta.fleet.rate import Rate
from fedelta.fleet.remote import Remote
from fedelta.fleet.wire import (
    CHUNK,
    METHOD,
    MOST_KNOWN,
    PROTOCOL,
    Credentials,
    Outgoing,
    announcement,
    digest_of,
    frame,
    parse,
    versions,
)
from fleet_program import Play, load
from remote_sites import PATIENCE_S, Authority, authority, coordinator, far, issued, site, until

LARGE = {"w": torch.arange(2 * CHUNK, dtype=torch.float32)}  # 8 MiB: more than what lies in the buffers on the way
SMALL = {"w": torch.arange(5.0)}


def ask(fleet: Fleet, to: str, op: str, **parts: Any) -> Reply:
    fleet.submit(Request(to=to, op=op, **({"round": 1} | parts)))
    reply = fleet.next_reply(PATIENCE_S)
    assert isinstance(reply, Reply)
    return reply


class Counting(Play):
    """Notes every request that it handles."""

    handled: list[str]

    def __new__(cls, *_: Any, **__: Any) -> "Counting":
        made = super().__new__(cls)
        object.__setattr__(made, "handled", [])
        return made

    def handle(self, request: Request, site: Site) -> Reply:
        self.handled.append(request.id)
        return super().handle(request, site)

    def once(self, request: Request, site: Site) -> Reply:
        """Work on each round only once, as what must not be answered twice does."""
        if site.given.get("once", -1) >= request.round:
            raise BadInput("this round was answered before")
        site.given["once"] = request.round
        return Reply.to_request(request, {"x": torch.rand(3, generator=torch.Generator().manual_seed(request.round))})


class Proxy:
    """Passes bytes on between sites and a coordinator, until it is told to cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.limits: dict[str, int] = {}  # direction -> bytes until both ends are closed, once
        self.connections = 0
        self._open: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self.connections += 1
                self._open += [near, far]
                for way, one, other in (("up", near, far), ("down", far, near)):
                    threading.Thread(target=self._pass, args=(way, one, other), daemon=True).start()

    def _pass(self, way: str, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if way in self.limits:
                    self.limits[way] -= len(data)
                    if self.limits[way] < 0:
                        del self.limits[way]
                        break
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):  # it is closed already
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def proxied(program: Play, **options: Any) -> Iterator[tuple[Remote, Proxy]]:
    """A coordinator with the site "amber" behind a proxy."""
    with coordinator(program, ("amber", "birch"), **options) as fleet:
        proxy = Proxy(fleet.port)
        try:
            with site(program, load, "amber", proxy.port):
                assert fleet.wait_for(1, PATIENCE_S)
                yield fleet, proxy
        finally:
            proxy.close()


def test_a_stream_that_is_cut_in_the_middle_of_a_request_is_taken_up_again() -> None:
    program = Counting()
    with proxied(program) as (fleet, proxy):
        proxy.limits["down"] = 3 * CHUNK
        reply = ask(fleet, "amber", "echo", shared=LARGE)
        assert reply.error is None
        assert torch.equal(reply.body["shared/w"], LARGE["w"])
        assert proxy.connections == 2
    assert program.handled == ["/1/echo/0/amber"]


def test_a_stream_that_is_cut_in_the_middle_of_a_reply_gets_the_stored_reply() -> None:
    program = Counting()
    with proxied(program) as (fleet, proxy):
        proxy.limits["up"] = 3 * CHUNK
        reply = ask(fleet, "amber", "echo", shared=LARGE)
        assert torch.equal(reply.body["shared/w"], LARGE["w"])
        assert proxy.connections == 2
        assert ask(fleet, "amber", "echo", round=2).error is None
        assert fleet.next_reply() is None
    assert program.handled == ["/1/echo/0/amber", "/2/echo/0/amber"]  # not worked on twice


def test_a_site_that_works_when_the_stream_breaks_goes_on(tmp_path: Path) -> None:
    program = Counting()
    with proxied(program) as (fleet, proxy):
        fleet.submit(Request(to="amber", op="wait", round=1, meta={"folder": str(tmp_path)}))
        until(lambda: (tmp_path / "begun").exists())
        proxy.cut()
        until(lambda: proxy.connections == 2)
        (tmp_path / "go").touch()
        reply = fleet.next_reply(PATIENCE_S)
        assert isinstance(reply, Reply)
        assert reply.error is None
    assert len(program.handled) == 1


def test_a_site_that_restarts_has_its_memory_and_does_not_answer_a_round_twice(tmp_path: Path) -> None:
    program = Counting()
    with coordinator(program, ("amber",), run="r") as fleet:
        with site(program, load, "amber", fleet.port, folder=tmp_path):
            first = [ask(fleet, "amber", "count", round=n, base=n - 1 if n > 1 else -1) for n in (1, 2)]
            given = ask(fleet, "amber", "once", round=3)
        with site(program, load, "amber", fleet.port, folder=tmp_path):
            again = ask(fleet, "amber", "once", round=3)  # the same request: the same reply
            other = ask(fleet, "amber", "once", round=3, attempt=1)
            third = ask(fleet, "amber", "count", round=4, base=2)
    assert [int(reply.body["asked"]) for reply in (*first, third)] == [1, 2, 3]
    assert torch.equal(again.body["x"], given.body["x"])
    assert other.error == "this round was answered before"
    assert program.handled.count("/3/once/0/amber") == 1
    with (  # what a site keeps belongs to one run
        coordinator(program, ("amber",), run="another") as fleet,
        site(program, load, "amber", fleet.port, folder=tmp_path),
    ):
        assert ask(fleet, "amber", "once", round=3).error is None


@pytest.mark.parametrize("durable", [False, True])
def test_another_name_of_the_run_gets_nothing_twice_from_a_process(durable: bool, tmp_path: Path) -> None:
    folder = tmp_path if durable else None
    with (
        coordinator(Counting(), ("amber",), run="r") as first,
        site(Counting(), load, "amber", first.port, folder=folder),
    ):
        assert ask(first, "amber", "once", round=3).error is None
        first.close()
        with coordinator(Counting(), ("amber",), run="another", listen=f"127.0.0.1:{first.port}") as second:
            assert ask(second, "amber", "once", round=3).error == "this round was answered before"
            assert ask(second, "amber", "once", round=4).error is None


def test_a_folder_is_of_one_process(tmp_path: Path) -> None:
    with coordinator(Play(), ("amber", "birch")) as fleet, site(Play(), load, "amber", fleet.port, folder=tmp_path):
        assert fleet.wait_for(1, PATIENCE_S)
        assert ask(fleet, "amber", "echo").error is None
        with site(Play(), load, "birch", fleet.port, folder=tmp_path) as second:
            assert isinstance(second.result(), BadInput)


def test_a_coordinator_that_comes_back_finds_its_sites_again() -> None:
    program = Counting()
    listen = f"127.0.0.1:{free_port()}"
    with (
        coordinator(program, ("amber",), listen=listen) as fleet,
        site(program, load, "amber", fleet.port) as running,
    ):
        assert ask(fleet, "amber", "echo").error is None
        fleet.close()
        with coordinator(program, ("amber",), listen=listen) as second:
            assert ask(second, "amber", "echo").error is None  # the same request of a run that is resumed
            second.close(over="all rounds are done")
            assert running.result() == "all rounds are done"
    assert len(program.handled) == 1


def test_who_does_not_answer_in_time_and_who_does_not_come_is_absent(tmp_path: Path) -> None:
    limits = Limits(deadline_s=1.5, absence_s=0.3)
    with coordinator(Play(), ("amber", "birch"), limits=limits) as fleet, site(Play(), load, "amber", fleet.port):
        assert fleet.wait_for(1, PATIENCE_S)
        late = ask(fleet, "amber", "wait", meta={"folder": str(tmp_path)})
        assert late.error == "it did not answer within 1.5 s"
        (tmp_path / "go").touch()  # its reply is late, and dropped
        until(lambda: ask(fleet, "amber", "echo", round=2).error is None)  # a busy machine may be late again
        assert fleet.next_reply() is None
        assert "not been connected for 0.3 s" in str(ask(fleet, "birch", "echo").error)
        assert fleet.connected() == ("amber",)
        assert fleet.parties() == ("amber", "birch")


def test_requests_that_nobody_waits_for_are_not_begun(tmp_path: Path) -> None:
    program = Counting()
    with coordinator(program, ("amber",)) as fleet, site(program, load, "amber", fleet.port) as running:
        waiting = running.member._waiting
        busy = Request(to="amber", op="wait", round=1, meta={"folder": str(tmp_path)})
        fleet.submit(busy)
        until(lambda: (tmp_path / "begun").exists())
        fleet.cancel(busy.id)
        for attempt in range(3):
            asked = Request(to="amber", op="echo", round=1, attempt=attempt)
            fleet.submit(asked)
            until(lambda: waiting)
            fleet.cancel(asked.id)
            until(lambda: not waiting)
        (tmp_path / "go").touch()
        assert ask(fleet, "amber", "echo", round=2).error is None
        assert ask(fleet, "amber", "echo", attempt=0).error is None  # asked anew
    assert program.handled == ["/1/wait/0/amber", "/2/echo/0/amber", "/1/echo/0/amber"]


def test_a_site_is_asked_when_it_comes() -> None:
    with coordinator(Play(), ("amber",)) as fleet:
        fleet.submit(Request(to="amber", op="echo", round=1))
        assert fleet.next_reply(0.1) is None
        assert not fleet.wait_for(1, 0.1)
        with site(Play(), load, "amber", fleet.port):
            reply = fleet.next_reply(PATIENCE_S)
        assert isinstance(reply, Reply)
        assert reply.error is None


def test_a_bug_at_a_site_is_a_failure_that_does_not_tell_of_its_data(caplog: pytest.LogCaptureFixture) -> None:
    with far(Play(), load, ("amber",)) as fleet:
        for op, meta, said in [
            ("bug", {}, "KeyError"),
            ("leave", {}, "SystemExit"),
            ("stray", {}, "RuntimeError"),
            ("unsendable", {"kind": "sparse"}, "RuntimeError"),
        ]:
            error = ask(fleet, "amber", op, meta=meta).error
            assert error == f"a bug at the site ({said}); its log has the traceback"
        assert ask(fleet, "amber", "overwrite", shared={"vector": torch.zeros(3)}).error is not None
        assert ask(fleet, "amber", "echo", round=2).error is None
    assert "not what was meant" in caplog.text


class Guarding:
    """Lets nothing be asked after round 1, no counts leave, and cannot write down the largest of replies."""

    def __init__(self) -> None:
        self.left: list[str] = []

    def refuse(self, request: Request) -> str | None:
        return "not on my watch" if request.round > 1 else None

    def leaving(self, request: Request, reply: Reply) -> None:
        if request.op == "count":
            raise BadInput("counts stay here")
        if request.shared:
            raise OSError(28, "no space left for patient 7")
        self.left.append(request.id)


def test_a_site_refuses_and_takes_down_what_leaves(tmp_path: Path) -> None:
    guards = Guarding()
    with (
        coordinator(Play(), ("amber",)) as fleet,
        site(Play(), load, "amber", fleet.port, guards=guards, folder=tmp_path),
    ):
        assert ask(fleet, "amber", "echo", body=SMALL).error is None
        assert ask(fleet, "amber", "echo", round=2).error == "not on my watch"
        kept = ask(fleet, "amber", "count")
        full = ask(fleet, "amber", "echo", attempt=1, shared=LARGE)
    assert kept.error == "counts stay here"
    assert not kept.body
    assert full.error == "what would have left could not be taken down or kept"
    assert guards.left == ["/1/echo/0/amber", "/2/echo/0/amber"]
    assert len(list(tmp_path.glob("*/replies/?*"))) == 1  # of round 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"program": replace(Play(), rounds=4)}, "amber has another experiment than"),
        ({"name": "fir"}, "'fir' is not a registered site"),
        ({"name": "birch", "credentials": issued("amber")}, "calls itself 'birch', and its certificate is of 'amber'"),
        ({"name": "cedar"}, "cedar was struck off"),
    ],
)
def test_who_does_not_belong_is_refused_on_both_sides(
    changes: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    def allowed(name: str, _certificate: bytes) -> str | None:
        return "cedar was struck off" if name == "cedar" else None

    given = {"program": Play(), "name": "amber"} | changes
    with (
        coordinator(Play(), ("amber", "birch", "cedar"), allowed=allowed) as fleet,
        site(given.pop("program"), load, given.pop("name"), fleet.port, **given) as running,
    ):
        outcome = running.result()
    assert isinstance(outcome, Refused)
    assert why in str(outcome)
    assert why in caplog.text


def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedelta.fleet.member.versions", lambda: versions() | {"torch": "1.0"})
    with coordinator(Play(), ("amber",)) as fleet, site(Play(), load, "amber", fleet.port) as running:
        assert "amber has torch 1.0 and the coordinator 2" in str(running.result())


def test_a_site_that_is_struck_off_has_to_leave() -> None:
    struck: list[str] = []
    seen: list[bytes] = []

    def allowed(name: str, certificate: bytes) -> str | None:
        seen.append(certificate)
        return "its certificate was revoked" if name in struck else None

    limits = Limits(check_s=0.1)
    with coordinator(Play(), ("amber",), allowed=allowed, limits=limits) as fleet:
        with site(Play(), load, "amber", fleet.port) as running:
            assert fleet.wait_for(1, PATIENCE_S)
            struck.append("amber")
            assert str(running.result()) == "its certificate was revoked"
        until(lambda: not fleet.connected())
    from cryptography import x509

    named = x509.load_der_x509_certificate(seen[0]).subject.rfc4514_string()
    assert named == "CN=amber"
    assert set(seen) == {seen[0]}


def test_a_site_that_is_refused_for_what_passes_comes_back_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    passing: list[Exception] = []

    def allowed(_name: str, _certificate: bytes) -> str | None:
        for error in passing:
            raise error
        return None

    limits = Limits(check_s=0.1)
    with (
        coordinator(Play(), ("amber",), allowed=allowed, limits=limits) as fleet,
        site(Play(), load, "amber", fleet.port) as running,
    ):
        for error in (NotNow("the list has expired"), OSError("the list cannot be read")):
            assert ask(fleet, "amber", "echo").error is None
            passing.append(error)
            until(lambda why=str(error): caplog.text.count(why) >= 4)  # both sides, while connected and when it comes
            until(lambda: not fleet.connected())
            passing.clear()
        assert ask(fleet, "amber", "echo").error is None
        assert running.outcome is None


def test_a_certificate_of_another_authority_is_none(caplog: pytest.LogCaptureFixture) -> None:
    stranger = replace(Authority().issue("amber"), root=authority().root)
    with coordinator(Play(), ("amber",)) as fleet, site(Play(), load, "amber", fleet.port, credentials=stranger):
        until(lambda: "no connection to" in caplog.text)
        assert not fleet.connected()


def test_a_site_whose_certificate_has_expired_says_so_and_ends(tmp_path: Path) -> None:
    """TLS lets it in no more and does not say why, so that it would try for ever."""
    own = CertificateAuthority.create(tmp_path / "ca")
    own.issue("amber", tmp_path / "amber", days=1, start=datetime.now(UTC) - timedelta(days=3))
    own.issue("coordinator", tmp_path / "coordinator", hosts=["127.0.0.1"])

    def credentials(name: str) -> Credentials:
        files = ((tmp_path / name / file).read_bytes() for file in ("ca.pem", "certificate.pem", "private.key"))
        return Credentials(**dict(zip(("root", "chain", "key"), files, strict=True)))

    with (
        coordinator(Play(), ("amber",), credentials=credentials("coordinator")) as fleet,
        site(Play(), load, "amber", fleet.port, credentials=credentials("amber")) as running,
    ):
        assert re.match("the certificate of 'amber' has expired on 20", str(running.result()))


def test_the_second_process_of_a_name_takes_the_place_of_the_first() -> None:
    with coordinator(Play(), ("amber",)) as fleet, site(Play(), load, "amber", fleet.port) as first:
        assert fleet.wait_for(1, PATIENCE_S)
        with site(Play(), load, "amber", fleet.port):
            assert "takes its place" in str(first.result())
            assert ask(fleet, "amber", "echo").error is None


class Rogue:
    """A site that sends what it likes."""

    def __init__(self, port: int, name: str, known: Sequence[bytes] = (), own: Credentials | None = None) -> None:
        own = own or issued(name)
        credentials = grpc.ssl_channel_credentials(own.root, own.key, own.chain)
        options = [("grpc.max_send_message_length", -1)]
        self._channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options)
        self._out: list[bytes] = []
        self._more = threading.Condition()
        self._closed = False
        self._call = self._channel.stream_stream(METHOD)(self._frames())
        self.name = name
        self.known = known

    def hello(self, program: Play) -> "Rogue":

        self.send(
            frame(
                frames.Hello(
                    protocol=PROTOCOL,
                    name=self.name,
                    experiment=digest(program),
                    versions=versions(),
                    known=self.known,
                )
            )
        )
        return self

    def send(self, *raw: bytes) -> None:
        with self._more:
            self._out += raw
            self._more.notify()

    def _frames(self) -> Iterator[bytes]:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._out or self._closed)
                if not self._out:
                    return
                raw = self._out.pop(0)
            yield raw

    def next(self, kind: type) -> Any:
        """The next frame of a kind; others are passed over."""
        for raw in self._call:
            came = parse(raw)
            if isinstance(came, kind):
                return came
        return None

    def close(self) -> None:
        with self._more:
            self._closed = True
            self._more.notify()
        self._call.cancel()
        self._channel.close()


@contextmanager
def rogue(fleet: Remote, program: Play) -> Iterator[Rogue]:
    one = Rogue(fleet.port, "amber")
    try:
        yield one.hello(program)
    finally:
        one.close()


def answer_to(asked: Any, **changes: Any) -> bytes:
    id = f"{asked.job}/{asked.round}/{asked.op}/{asked.attempt}/{asked.to}"
    return frame(frames.Reply(**({"digest": asked.digest, "answers": id, "round": asked.round} | changes)))


def signed_answer(asked: Any, raw: bytes) -> bytes:
    """By "amber"."""
    honest = parse(answer_to(asked, body=len(raw)))
    said = Reply(sender="amber", answers=honest.answers, round=honest.round)  # type: ignore[union-attr]
    statement = signatures.reply(asked.digest, said, blake3(raw).digest())
    return answer_to(asked, body=len(raw), signature=signatures.Signer(issued("amber").key)(statement))


NAN = Outgoing({"w": torch.tensor([float("nan")])})
GARBAGE: dict[str, tuple[Callable[[Any], list[bytes]], str]] = {
    "bytes": (lambda _asked: [b"\xff\xfe\xfd"], "unknown kind"),
    "a frame of the other side": (lambda _asked: [frame(frames.Over(reason="x"))], "in the middle of a stream"),
    "a chunk of nothing": (lambda _asked: [b"\x06abc"], "belongs to no reply"),
    "a reply to another round": (lambda asked: [answer_to(asked, round=9)], "says that it answers"),
    "10 GB": (lambda asked: [answer_to(asked, body=10**10)], "10000000000 bytes is announced"),
    "more than announced": (lambda asked: [answer_to(asked, body=10), b"\x06" + bytes(11)], "announced with 10"),
    "no tensors": (lambda asked: [signed_answer(asked, bytes(10)), b"\x06" + bytes(10)], "not a JSON object"),
    "no signature": (lambda asked: [answer_to(asked)], "a signature is not of what was sent"),
    "a signature of other bytes": (
        lambda asked: [signed_answer(asked, bytes(10)), b"\x06" + bytes(9) + b"x"],
        "a signature is not of what was sent",
    ),
    "a large frame": (lambda _asked: [bytes(3 * CHUNK)], ""),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_site_that_sends_garbage_is_dropped_with_the_reason_and_others_go_on(kind: str) -> None:
    program = Play()
    make, why = GARBAGE[kind]
    limits = Limits(absence_s=0.2)
    with (
        coordinator(program, ("amber", "birch"), limits=limits) as fleet,
        rogue(fleet, program) as bad,
        site(program, load, "birch", fleet.port),
    ):
        assert fleet.wait_for(2, PATIENCE_S)
        fleet.submit(Request(to="amber", op="echo", round=1))
        bad.send(*make(bad.next(frames.Request)))
        reply = fleet.next_reply(PATIENCE_S)
        assert isinstance(reply, Reply)
        assert reply.error is not None
        assert why in reply.error
        if why:
            assert why in bad.next(frames.Refused).reason
        assert ask(fleet, "birch", "echo", body=SMALL).error is None


def test_a_site_that_breaks_the_protocol_again_and_again_is_shut_out() -> None:
    program = Play()
    with coordinator(program, ("amber",), limits=Limits(faults=2)) as fleet:
        for _ in range(2):
            with rogue(fleet, program) as bad:
                assert bad.next(frames.Welcome) is not None
                bad.send(b"\xff")
                assert not bad.next(frames.Refused).final
        with rogue(fleet, program) as bad:
            said = bad.next(frames.Refused)
            assert said.final
            assert "broke the protocol 2 times" in said.reason


def test_a_site_that_opens_too_many_streams_is_told_when_to_come_back() -> None:
    limits = Limits(streams=Rate(per_minute=0.001, burst=2))
    with coordinator(Play(), ("amber", "birch"), limits=limits) as fleet:
        for _ in range(2):
            with rogue(fleet, Play()) as good:
                assert good.next(frames.Welcome) is not None
        with rogue(fleet, Play()) as eager:
            said = eager.next(frames.Refused)
            assert "opens too many streams; come back in" in said.reason
            assert not said.final
        with site(Play(), load, "birch", fleet.port):
            assert ask(fleet, "birch", "echo").error is None


def test_a_revoked_certificate_opens_no_streams_of_the_site_that_has_another() -> None:
    revoked = authority().issue("amber")  # and issued("amber") is not

    def allowed(_name: str, certificate: bytes) -> str | None:
        return "it is revoked" if certificate == PEM_cert_to_DER_cert(revoked.chain.decode()) else None

    limits = Limits(streams=Rate(per_minute=0.001, burst=2))
    with coordinator(Play(), ("amber",), limits=limits, allowed=allowed) as fleet:
        for _ in range(4):
            thief = Rogue(fleet.port, "amber", own=revoked).hello(Play())
            assert thief.next(frames.Refused).reason == "it is revoked"
            thief.close()
        with rogue(fleet, Play()) as good:
            assert good.next(frames.Welcome) is not None


def test_a_site_that_sends_what_nobody_asked_for_is_told_to_stop_and_then_dropped() -> None:
    program, other = Play(), bytes(32)
    limits = Limits(unasked=Rate(per_minute=0.001, burst=3000))
    with coordinator(program, ("amber",), limits=limits) as fleet, rogue(fleet, program) as late:
        assert late.next(frames.Welcome) is not None
        late.send(frame(frames.Reply(digest=other, answers="what", body=CHUNK)))
        assert late.next(frames.Cancel).digest == other
        late.send(b"\x06" + bytes(CHUNK))
        assert "what nobody has asked for" in late.next(frames.Refused).reason


def test_who_does_not_greet_is_refused() -> None:
    for raw, why, limits in [
        (b"", "no greeting", Limits(stall_s=0.3)),
        (b"\xff", "unknown kind", Limits()),
        (frame(frames.Over()), "begins with a Hello", Limits()),
    ]:
        with coordinator(Play(), ("amber",), limits=limits) as fleet:
            silent = Rogue(fleet.port, "amber")
            if raw:
                silent.send(raw)
            assert why in silent.next(frames.Refused).reason
            silent.close()
            if raw:  # where there is time to greet, on any machine
                with rogue(fleet, Play()) as good:
                    assert good.next(frames.Welcome) is not None


def test_duplicated_replies_and_replies_to_nothing_are_dropped() -> None:
    program = Play()
    message = Outgoing(SMALL)
    with coordinator(program, ("amber",)) as fleet, rogue(fleet, program) as twice:
        fleet.submit(Request(to="amber", op="echo", round=1))
        asked = twice.next(frames.Request)
        whole = [signed_answer(asked, message.head()), *message.frames()]
        unknown = [answer_to(asked, digest=bytes(32), answers="what", body=message.size), *message.frames()]
        twice.send(*unknown, *whole, *whole, *whole[:1])
        reply = fleet.next_reply(PATIENCE_S)
        assert isinstance(reply, Reply)
        assert torch.equal(reply.body["w"], SMALL["w"])
        assert fleet.next_reply(0.1) is None
        fleet.submit(Request(to="amber", op="echo", round=2))
        asked = twice.next(frames.Request)
        twice.send(*whole, answer_to(asked))
        second = fleet.next_reply(PATIENCE_S)
        assert isinstance(second, Reply)
        assert (second.round, dict(second.body)) == (2, {})


def test_a_request_that_the_site_knows_is_not_sent_again() -> None:
    program = Play()
    with coordinator(program, ("amber",)) as fleet:
        fleet.submit(Request(to="amber", op="echo", round=1, shared=LARGE))
        with rogue(fleet, program) as first:
            asked = first.next(frames.Request)
        second = Rogue(fleet.port, "amber", known=[asked.digest]).hello(program)
        assert second.next(frames.Again).digest == asked.digest
        second.send(answer_to(asked))
        assert fleet.next_reply(PATIENCE_S) is not None
        second.close()


def test_a_site_is_told_that_nobody_waits_any_more() -> None:
    program = Play()
    with coordinator(program, ("amber",)) as fleet, rogue(fleet, program) as one:
        request = Request(to="amber", op="echo", round=1)
        fleet.submit(request)
        asked = one.next(frames.Request)
        fleet.cancel(request.id)
        assert one.next(frames.Cancel).digest == asked.digest
        assert fleet.next_reply() is None


class Straggling(Play):
    """Says when it has begun with a request, and is not done before it is let go."""

    begun, go = threading.Semaphore(0), threading.Semaphore(0)

    def late(self, request: Request, site: Site) -> Reply:
        self.begun.release()
        assert self.go.acquire(timeout=60)
        return Reply.to_request(request, LARGE)


def test_a_straggler_keeps_to_itself_what_was_withdrawn_in_many_rounds(caplog: pytest.LogCaptureFixture) -> None:
    program = Straggling()
    caplog.set_level(logging.INFO, "fedelta")
    with coordinator(program, ("amber",)) as fleet, site(program, load, "amber", fleet.port) as running:
        for round in range(1, MOST_KNOWN + 3):
            request = Request(to="amber", op="late", round=round)
            fleet.submit(request)
            assert program.begun.acquire(timeout=60)
            fleet.cancel(request.id)
            stream, nothing = running.member._stream, blake3().digest()
            said = digest_of("", request, nothing, nothing)
            until(lambda said=said, stream=stream: stream is not None and said in stream.dropped)
            program.go.release()
        assert ask(fleet, "amber", "echo", round=round).error is None
    assert "nobody waits for" not in caplog.text


def test_a_stream_that_stands_still_is_given_up() -> None:
    program = Play()
    with (
        coordinator(program, ("amber",), limits=Limits(stall_s=2.0, absence_s=0.2)) as fleet,
        rogue(fleet, program) as slow,
    ):
        fleet.submit(Request(to="amber", op="echo", round=1))
        slow.send(answer_to(slow.next(frames.Request), body=2 * CHUNK), b"\x06" + bytes(CHUNK))
        assert "nothing moved for 2 s" in slow.next(frames.Refused).reason
        reply = fleet.next_reply(PATIENCE_S)
        assert isinstance(reply, Reply)
        assert reply.error == "it has not been connected for 0.2 s"


def test_replies_for_which_there_is_no_room_in_memory_lie_in_files(tmp_path: Path) -> None:
    names = ("amber", "birch", "cedar")
    with far(Play(), load, names, limits=Limits(room=1000), spill=tmp_path) as fleet:
        for name in names:
            fleet.submit(Request(to=name, op="echo", round=1, shared=LARGE))
        until(lambda: len(fleet._arrived) == 3)  # type: ignore[attr-defined]
        replies = [fleet.next_reply() for _ in names]
    for reply in replies:
        assert isinstance(reply, Reply)
        assert torch.equal(reply.body["shared/w"], LARGE["w"])


def test_without_tls_there_is_only_this_machine(caplog: pytest.LogCaptureFixture) -> None:
    with (
        coordinator(Play(), ("amber",), credentials=None) as fleet,
        site(Play(), load, "amber", fleet.port, credentials=None),
    ):
        assert ask(fleet, "amber", "echo").error is None
    with pytest.raises(BadInput, match="without TLS"):
        coordinator(Play(), ("amber",), credentials=None, listen="0.0.0.0:0")
    for wrong in ("127.0.0.1", "127.0.0.1:99999", ":7"):
        with pytest.raises(BadInput, match=r"not HOST:PORT|no port 99999"):
            coordinator(Play(), ("amber",), listen=wrong)


def test_limits_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"Limits\.deadline_s must be > 0"):
        Limits(deadline_s=0)
    with pytest.raises(BadInput, match=r"Patience\.connect_s must be > 0"):
        Patience(connect_s=-1)
    with pytest.raises(BadInput, match="must be a folder"):
        coordinator(Play(), ("amber",), spill=tmp_path / "nothing")


def test_a_fleet_that_is_closed_takes_nothing() -> None:
    fleet = coordinator(Play(), ("amber",))
    fleet.close()
    fleet.close()
    with pytest.raises(RuntimeError, match="closed"):
        fleet.submit(Request(to="amber", op="echo", round=1))


def test_joining_and_leaving_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), coordinator(Play(), ("amber",)) as fleet:
        with site(Play(), load, "amber", fleet.port):
            assert fleet.wait_for(1, PATIENCE_S)
        until(lambda: "site amber has gone" in caplog.text or not fleet.connected())
    assert "site amber has joined" in caplog.text


class Based(Play):
    """With weights that do not travel."""

    base: str

    def frozen(self) -> str | None:
        return self.base or None


def based(base: str) -> Based:
    made = Based()
    object.__setattr__(made, "base", base)
    return made


def test_a_site_with_other_frozen_weights_is_refused() -> None:
    with coordinator(based("aaa"), ("amber", "birch")) as fleet:
        with site(based("bbb"), load, "amber", fleet.port) as other:
            assert isinstance(other.result(), Refused)
            assert "the weights that do not travel are bbb… at amber, and at the coordinator aaa…" in str(other.outcome)
        with site(based(""), load, "amber", fleet.port) as without:
            assert "are none… at amber" in str(without.result())
        with site(based("aaa"), load, "birch", fleet.port):
            assert fleet.wait_for(1, PATIENCE_S)


def test_a_site_that_names_no_versions_may_take_part() -> None:
    program = Play()
    with coordinator(program, ("amber",)) as fleet:
        one = Rogue(fleet.port, "amber")
        try:
            one.send(frame(frames.Hello(protocol=PROTOCOL, name="amber", experiment=digest(program))))
            assert one.next(frames.Welcome).run == ""
        finally:
            one.close()


@contextmanager
def false_coordinator(welcome: Any, asked: Any) -> Iterator[tuple[int, list[Any]]]:
    """One with the right certificate, that says what it likes; the port, and what came after that."""
    heard: list[Any] = []

    def join(frames_in: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        heard.append(parse(next(frames_in)))
        yield frame(welcome)
        yield frame(asked)
        for raw in frames_in:
            heard.append(parse(raw))

    own = issued("coordinator")
    server = grpc.server(ThreadPoolExecutor(4))
    service, _, method = METHOD[1:].partition("/")
    handler = grpc.method_handlers_generic_handler(service, {method: grpc.stream_stream_rpc_method_handler(join)})
    server.add_generic_rpc_handlers((handler,))
    credentials = grpc.ssl_server_credentials([(own.key, own.chain)], own.root, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port, heard
    finally:
        server.stop(0).wait()


def request_by(signer: str, run: str, *, body: bytes = b"", **changes: Any) -> Any:
    request = Request(to="amber", op="echo", round=1)
    empty = blake3().digest()
    said = digest_of(run, request, empty, empty)
    signature = signatures.Signer(issued(signer).key)(signatures.broadcast(run, "echo", "", 1, 0, empty))
    begun = announcement(request, said, signature)
    begun.body, begun.body_head = len(body), body
    for name, value in changes.items():
        setattr(begun, name, value)
    return begun


OWN = frames.Welcome(protocol=PROTOCOL, run="r", certificate=issued("coordinator").chain)
FALSE = {
    "no certificate": (frames.Welcome(protocol=PROTOCOL, run="r"), request_by("coordinator", "r"), "shows no cert"),
    "a site's": (
        frames.Welcome(protocol=PROTOCOL, run="r", certificate=Authority().issue("x").chain),
        request_by("coordinator", "r"),
        "shows no certificate for 127.0.0.1",
    ),
    "another's signature": (OWN, request_by("birch", "r"), "a signature is not of what was sent"),
    "no signature": (OWN, request_by("coordinator", "r", signature=b""), "a signature is not of what was sent"),
    "of another run": (OWN, request_by("coordinator", "q"), "the digest of a request is not of what came"),
    "another round": (OWN, request_by("coordinator", "r", round=2), "the digest of a request is not of what came"),
    "another line": (OWN, request_by("coordinator", "r", op="echo\nall is well"), "not plain text of one line"),
    "another body": (OWN, request_by("coordinator", "r", body=NAN.head()), "the digest of a request is not of what"),
}


@pytest.mark.parametrize("kind", FALSE)
def test_a_site_works_on_nothing_that_the_coordinator_has_not_signed(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    program = Counting()
    *said, why = FALSE[kind]
    with false_coordinator(*said) as (port, heard), site(program, load, "amber", port):
        until(lambda: why in caplog.text)
    assert program.handled == []
    assert all(isinstance(one, frames.Hello) for one in heard)


def test_a_site_works_on_what_the_coordinator_has_signed() -> None:
    program = Counting()
    with false_coordinator(OWN, request_by("coordinator", "r")) as (port, heard), site(program, load, "amber", port):
        until(lambda: len(heard) > 1)
    assert program.handled == ["/1/echo/0/amber"]
    assert isinstance(heard[1], frames.Reply)


def test_a_site_comes_back_ever_less_often_to_who_only_greets() -> None:
    patience = Patience(first_pause_s=0.001, longest_pause_s=1000.0)
    ends = frames.Refused(reason="not now")
    with false_coordinator(OWN, ends) as (port, heard), site(Counting(), load, "amber", port, patience=patience):
        until(lambda: len(heard) > 6)
        time.sleep(2)
        assert len(heard) < 30  # with pauses of up to 1.5 * 0.001 * 2**n seconds


def test_a_stored_reply_that_a_power_cut_has_emptied_is_left_out(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.enter("r")
    assert kept.folder is not None
    reply = Reply(sender="amber", answers="/1/echo/0/amber", round=1, body=SMALL)
    kept.store(bytes(32), reply, "")
    empty = kept.folder / "replies" / ("ab" * 32)
    empty.touch()
    assert list(kept.enter("r")) == [bytes(32)]
    assert not empty.exists()
    kept.close()


def test_a_run_in_which_nothing_was_asked_leaves_nothing_at_a_site(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    for place in range(5):
        kept.enter(f"run {place}")
    reply = Reply(sender="amber", answers="/1/echo/0/amber", round=1, body=SMALL)
    kept.store(bytes(32), reply, "")
    kept.enter("another")
    kept.close()
    assert [path.name for path in (tmp_path).rglob("*") if path.is_file()] == [".lock", bytes(32).hex()]
    assert len(list(tmp_path.iterdir())) == 1
