"""Frames, and messages in chunks: what goes in comes out, and whatever else comes in is refused in one sentence."""

import contextlib
import tempfile
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core import codec
from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.messages import Reply, Request
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet.wire import (
    CHUNK,
    DIGEST,
    MOST_CONTROL,
    MOST_HEAD,
    MOST_KNOWN,
    Credentials,
    Incoming,
    Outgoing,
    announcement,
    asking,
    checked_size,
    clean,
    digest_of,
    frame,
    parse,
    replying,
    request_of,
    sendable,
)

SAID = bytes(range(DIGEST))
SMALL = {"w": torch.arange(5.0)}
REPLY = Reply(sender="a", answers="an id", round=1)


def received(raw: list[bytes], size: int, **where: Any) -> Incoming:
    message = Incoming(size, **where)
    for one in raw:
        payload = parse(one)
        assert isinstance(payload, memoryview)
        message.add(payload)
    return message


def refused(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives, and why it gives nothing."""
    try:
        return call(), ""
    except BadTensors as error:
        return None, str(error)


@pytest.mark.parametrize("elements", [1, 3000, CHUNK // 4 - 40, CHUNK // 4, CHUNK])
@pytest.mark.parametrize("filed", [False, True])
def test_a_message_comes_out_as_it_went_in(elements: int, filed: bool) -> None:
    tensors = {
        "w": torch.randn(elements),
        "strided": torch.arange(24).reshape(4, 6).t()[::2],
        "none": torch.empty(0, 3),
        "bits": torch.tensor([True, False]),
    }
    meta = {"n": 3, "list": ["è", None]}
    outgoing = Outgoing(tensors, meta)
    raw = list(outgoing.frames())
    assert b"".join(one[1:] for one in raw) == codec.encode(tensors, meta)
    assert all(len(one) == CHUNK + 1 for one in raw[:-1])
    with tempfile.TemporaryFile() as file:
        message = received(raw, outgoing.size, **({"file": file} if filed else {}))
        assert message.complete
        body, told = message.read()
    assert told == meta
    assert body.keys() == tensors.keys()
    assert all(torch.equal(body[name], tensors[name]) for name in tensors)
    body["w"].add_(1)  # what came in may be written to


def test_a_broadcast_is_cut_once_for_sites_that_get_it_at_the_same_time() -> None:
    outgoing = Outgoing({"w": torch.randn(3 * CHUNK // 4)})
    assert [id(one) for one in list(outgoing.frames())] == [id(one) for one in list(outgoing.frames())]


def test_nothing_is_sent_of_nothing() -> None:
    assert Outgoing({}).size == 0
    assert list(Outgoing({}).frames()) == []
    assert Incoming(0).complete
    assert Incoming(0).read() == ({}, {})


def asked_for(request: Request, shared: Any = None, body: Any = None) -> list[bytes]:
    return list(asking(announcement(request, SAID), Outgoing(shared or {}), Outgoing(body or {})))


@given(st.integers(0, 40_000), st.integers(0, 40_000))
@settings(max_examples=40)
def test_a_request_comes_out_as_it_went_in_with_or_without_heads(shared: int, body: int) -> None:
    both = [{"x": torch.arange(size, dtype=torch.uint8)} if size else {} for size in (shared, body)]
    asked = Request(to="è", op="train/keys", round=3, job="j/k", attempt=2, base=-1, shared=both[0], body=both[1])
    first, *chunks = asked_for(asked, *both)
    begun = parse(first)
    assert isinstance(begun, frames.Request)
    sizes = [Outgoing(tensors).size for tensors in both]
    assert (begun.digest, [begun.shared, begun.body]) == (SAID, sizes)
    assert len(chunks) == (0 if sum(sizes) <= MOST_HEAD else sum(map(bool, sizes)))
    heads = begun.shared_head, begun.body_head
    parts = [Incoming(size, head) for size, head in zip(sizes, heads, strict=True)]
    for chunk in chunks:
        payload = parse(chunk)
        assert isinstance(payload, memoryview)
        next(part for part in parts if not part.complete).add(payload)
    found = request_of(begun, parts[0].read()[0], parts[1].read()[0], {})
    assert (found.id, found.base) == (asked.id, asked.base)
    for mine, theirs in zip((found.shared, found.body), both, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        for tensor in mine.values():
            tensor.add_(1)  # what came in may be written to


@pytest.mark.parametrize("elements", [1, 100, 127, 128, MOST_HEAD - 64, MOST_HEAD])
def test_a_reply_comes_out_as_it_went_in(elements: int) -> None:
    tensors = {"w": torch.arange(elements, dtype=torch.uint8)}
    body, reply = Outgoing(tensors), Reply(sender="a", answers="an id", round=-2)
    first, *chunks = replying(reply, SAID, body)
    begun = parse(first)
    assert isinstance(begun, frames.Reply)
    assert begun == frames.Reply(digest=SAID, answers="an id", round=-2, body=body.size, body_head=begun.body_head)
    message = Incoming(begun.body, begun.body_head)
    for chunk in chunks:
        message.add(memoryview(chunk)[1:])
    assert torch.equal(message.read()[0]["w"], tensors["w"])
    assert bool(chunks) == (body.size > MOST_HEAD)


def test_a_failure_is_told_in_one_line() -> None:
    (only,) = replying(Reply.failure(Request(to="a", op="o", round=1), "no\nway \x1b[31m \ud800"), SAID, Outgoing({}))
    failed = parse(only)
    assert isinstance(failed, frames.Reply)
    assert failed.failed
    assert failed.error == "no way ?[31m ?"


def test_what_no_frame_can_carry_is_refused() -> None:
    for changes in ({"to": "\ud800"}, {"round": 2**63}, {"job": "x" * MOST_CONTROL}):
        with pytest.raises(BadInput, match="request"):
            announcement(Request(**{"to": "a", "op": "o", "round": 1, **changes}), SAID)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="not PEM"):
        Credentials(root=b"", chain=b"", key=b"")


def test_the_digest_of_a_request_tells_all_that_it_says_apart() -> None:
    asked = {"to": "a", "op": "o", "round": 1, "job": "j", "attempt": 0, "base": -1}
    others = [asked | {name: "z" if isinstance(value, str) else 9} for name, value in asked.items()]
    found = {digest_of("run", Request(**one), SAID, SAID) for one in [asked, *others]}  # type: ignore[arg-type]
    base = Request(**asked)  # type: ignore[arg-type]
    found |= {digest_of("", base, SAID, SAID), digest_of("run", base, SAID[::-1], SAID)}
    assert len(found) == len(others) + 3


@given(st.binary(max_size=300) | st.integers(1, 9).flatmap(lambda kind: st.binary().map(bytes([kind]).__add__)))
@settings(max_examples=500)
def test_any_bytes_are_a_frame_or_refused_in_one_sentence(raw: bytes) -> None:
    came, why = refused(lambda: parse(raw))
    if why:
        assert "\n" not in why
        assert len(why) < 300
    else:
        assert isinstance(came, memoryview) or frame(came)[:1] == raw[:1]


@given(st.data())
@settings(max_examples=200)
def test_a_frame_that_was_damaged_is_a_frame_or_refused(data: st.DataObject) -> None:
    hello = frames.Hello(protocol=1, name="a", experiment="e", versions={"torch": "2"}, known=[SAID])
    asked = asked_for(Request(to="a", op="o", round=1), SMALL, SMALL)
    good = data.draw(st.sampled_from([frame(hello), *asked, *replying(REPLY, SAID, Outgoing(SMALL))]))
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadTensors):
        came = parse(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
        if isinstance(came, frames.Reply):
            message = Incoming(checked_size("a reply", came.body, 10_000), came.body_head)
            if message.complete:
                message.read()


def test_frames_of_the_wrong_form_are_refused() -> None:
    short, many = frames.Again(digest=b"x"), frames.Hello(known=[SAID] * (MOST_KNOWN + 1))
    for raw, why in {
        b"": "no bytes",
        b"\x00": "unknown kind 0",
        b"\xff" * 9: "unknown kind 255",
        b"\x06": "1 to",
        b"\x06" + bytes(CHUNK + 1): "1 to",
        b"\x01" + bytes(MOST_CONTROL): "at most",
        b"\x05" + bytes(MOST_CONTROL + MOST_HEAD): "at most 131072",
        b"\x01\xff": "does not hold a Hello",
        frame(short): "digests of 32 bytes",
        frame(many): "at most 64 digests",
    }.items():
        with pytest.raises(BadTensors, match=why):
            parse(raw)


def test_only_the_last_chunk_of_a_message_is_short() -> None:
    message = Incoming(2 * CHUNK + 1)
    message.add(memoryview(bytes(CHUNK)))
    with pytest.raises(BadTensors, match="not the last of its message has 1048576 bytes, got 5"):
        message.add(memoryview(bytes(5)))
    message.add(memoryview(bytes(CHUNK)))
    message.add(memoryview(bytes(1)))
    assert message.complete
    with pytest.raises(BadTensors, match="an announcement of 9 bytes has 5"):
        Incoming(9, bytes(5))


def test_memory_of_large_messages_is_used_again_and_never_by_two() -> None:
    def made(byte: int) -> Incoming:
        message = Incoming(CHUNK + 8)
        message.add(memoryview(bytes([byte]) * CHUNK))
        message.add(memoryview(bytes([byte]) * 8))
        return message

    first, second = made(1), made(2)
    assert first.memory is not None
    assert second.memory is not None
    tensor = torch.from_numpy(first.memory)
    where = tensor.data_ptr()
    del first
    third = made(3)  # the first's is still the tensor's
    assert third.memory is not None
    assert [int(memory[0]) for memory in (tensor, second.memory, third.memory)] == [1, 2, 3]
    del tensor
    assert torch.from_numpy(made(4).memory).data_ptr() == where


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.integers(0, 120))
def test_any_chunks_are_a_message_or_refused(chunks: list[bytes], size: int) -> None:
    message = Incoming(size)

    def take() -> object:
        for chunk in chunks:
            message.add(memoryview(chunk))
        return message.read() if message.complete else None

    assert "\n" not in refused(take)[1]


def test_an_announcement_takes_no_memory() -> None:
    with pytest.raises(BadTensors, match="10000000000 bytes is announced"):
        checked_size("a reply", 10**10, 2**30)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1])
    message = Incoming(2**32)
    message.add(memoryview(bytes(CHUNK)))
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1]) - before
    assert pages * 4096 < 2**24
    chunk = bytes(CHUNK)
    tracemalloc.start()
    Incoming(2**50, drop=True).add(memoryview(chunk))
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()


def test_text_of_others_is_cut_and_cleaned() -> None:
    assert clean("a\x1b]0;b\x07\n\tc \u202e") == "a?]0;b? c ?"
    assert len(clean("x" * 10_000)) < 700
    assert sendable("\ud800é") == "?é"
