"""Replies in memory while there is room, and in files otherwise."""

from pathlib import Path

import torch

from fedelta.fleet.room import Room
from fedelta.fleet.wire import Incoming, Outgoing


def filled(message: Incoming, raw: Outgoing) -> Incoming:
    message.add(memoryview(raw.head()))
    return message


def in_memory(room: Room, size: int) -> bool:
    message = room.incoming(size)
    message.close()
    return message.memory is not None


def test_what_is_in_memory_counts_until_its_tensors_are_let_go(tmp_path: Path) -> None:
    raw = Outgoing({"w": torch.arange(100.0)})
    room = Room(2 * raw.size, tmp_path)
    first, second, third = (filled(room.incoming(raw.size), raw) for _ in range(3))
    assert [message.memory is None for message in (first, second, third)] == [False, False, True]
    bodies = [message.read()[0] for message in (first, second, third)]
    assert all(torch.equal(body["w"], torch.arange(100.0)) for body in bodies)
    del first
    assert not in_memory(room, raw.size)  # the tensors are still somebody's
    bodies[0].clear()
    kept = room.incoming(raw.size)
    assert kept.memory is not None
    assert not in_memory(room, raw.size)


def test_what_is_larger_than_the_room_lies_in_a_file_also_when_nothing_else_is_there() -> None:
    assert not in_memory(Room(10, None), 11)
    assert in_memory(Room(10, None), 10)
