"""Replies in memory while there is room, and in files otherwise."""

import asyncio
from pathlib import Path

import torch

from fedelta.fleet.room import Room
from fedelta.fleet.wire import Incoming, Outgoing


def filled(message: Incoming, raw: Outgoing) -> Incoming:
    message.add(memoryview(raw.head()))
    return message


def in_memory(room: Room, size: int) -> bool:
    message = asyncio.run(room.incoming(size))
    message.close()
    return message.memory is not None


def test_what_is_in_memory_counts_until_its_tensors_are_let_go(tmp_path: Path) -> None:
    raw = Outgoing({"w": torch.arange(100.0)})
    room = Room(2 * raw.size, tmp_path)
    first, second, third = (filled(asyncio.run(room.incoming(raw.size)), raw) for _ in range(3))
    assert [message.memory is None for message in (first, second, third)] == [False, False, True]
    bodies = [message.read()[0] for message in (first, second, third)]
    assert all(torch.equal(body["w"], torch.arange(100.0)) for body in bodies)
    del first
    assert not in_memory(room, raw.size)  # the tensors are still somebody's
    bodies[0].clear()
    kept = asyncio.run(room.incoming(raw.size))
    assert kept.memory is not None
    assert not in_memory(room, raw.size)


def test_what_is_larger_than_the_room_is_in_memory_where_nothing_else_is_there() -> None:
    room = Room(10, None)
    first = asyncio.run(room.incoming(11))
    assert first.memory is not None
    assert not in_memory(room, 1)
    del first
    assert in_memory(room, 1)
    assert not in_memory(room, 2**30 + 1)


def test_who_finds_no_room_waits_until_another_has_gone() -> None:
    room = Room(10, None)

    async def both() -> Incoming:
        first = await room.incoming(8)
        second = asyncio.create_task(room.incoming(8))
        await asyncio.sleep(0.05)
        assert not second.done()
        assert first.memory is not None
        del first
        return await second

    assert asyncio.run(both()).memory is not None


def test_a_message_that_is_whole_takes_no_room() -> None:
    room = Room(1, None)
    messages = [asyncio.run(room.incoming(9, bytes(9))) for _ in range(3)]
    assert all(message.complete and message.whole for message in messages)
    assert in_memory(room, 1)
