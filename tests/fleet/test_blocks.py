"""Shared blocks: what is written is read, what is read is not overwritten, and nothing has a name."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.fleet.blocks import Block, Pool

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
SHAPES = st.lists(st.integers(0, 4), max_size=3)
MESSAGES = st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=5)


@given(messages=st.lists(MESSAGES, min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_another_mapping_reads_what_was_written(messages: list[list[tuple[list[int], torch.dtype]]], seed: int) -> None:
    block = Block.create()
    other = Block(os.dup(block.descriptor))
    generator = torch.Generator().manual_seed(seed)
    for message in messages:  # each over the one before
        tensors = {
            f"t{index}": (torch.rand(shape, generator=generator) * 200).to(dtype)
            for index, (shape, dtype) in enumerate(message)
        }
        size = block.write({"n": len(tensors)}, tensors)
        head, read, _ = other.read(size)
        assert head == {"n": len(tensors)}
        assert list(read) == list(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert read[name].shape == tensor.shape
            assert torch.equal(read[name], tensor)


def test_reading_is_no_copy_and_survives_growth() -> None:
    block = Block.create()
    size = block.write(None, {"x": torch.zeros(10)})
    other = Block(os.dup(block.descriptor))
    early = other.read(size)[1]["x"]
    block.write(None, {"x": torch.ones(10)})
    assert early.eq(1).all()
    size = block.write(None, {"x": torch.full((100_000,), 2.0)})
    assert other.read(size)[1]["x"].eq(2).all()
    assert early.eq(2).all()  # still mapped, though `other` has moved on to a longer mapping
    del block, other
    assert early.eq(2).all()


def test_a_lent_block_is_free_when_its_last_reader_is_gone() -> None:
    pool = Pool()
    number = pool.take("reply")
    size = pool[number].write(None, {"x": torch.zeros(10), "y": torch.zeros(3)})
    _, tensors, view = pool[number].read(size)
    pool.lend(number, view)
    del view
    part = tensors.pop("y")[1:]
    del tensors
    assert pool.take("reply") != number
    assert pool.lent == 1
    del part
    assert pool.take("reply") == number
    assert pool.lent == 0


def test_a_block_is_used_again_only_when_nobody_holds_it() -> None:
    pool = Pool()
    number = pool.take("broadcast")
    pool.hold(number)
    pool.release(number)
    assert pool.take("broadcast") != number
    pool.release(number)
    assert pool.take("request") != number
    assert pool.take("broadcast") == number


def test_blocks_have_no_name_and_close_their_descriptor() -> None:
    block = Block.create()
    block.write(None, {"x": torch.zeros(100_000)})
    descriptor = block.descriptor
    assert os.fstat(descriptor).st_nlink == 0
    del block
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
