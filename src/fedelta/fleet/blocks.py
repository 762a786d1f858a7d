"""Shared memory without a name, for messages between a process and the workers that it started.

A block is an anonymous file (`memfd_create(2)`) that is handed over as an open descriptor. It has no entry in /dev/shm,
so nothing is left behind whoever is killed, and a container's limit on /dev/shm does not apply. Blocks are used again
and again, because a copy into warm pages is several times as fast as one into fresh pages.

Inside: 8 bytes with the length of the head, the head (a pickle: the blocks never leave the machine or the program that
wrote them), then each tensor's elements at a multiple of 64 bytes. Limits: Linux; dense tensors, which arrive
on the CPU.
"""

import mmap
import os
import pickle
import weakref
from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor

from fedelta.core.errors import BadTensors
from fedelta.core.messages import Tensors

_ALIGNMENT = 64
Purpose = Literal["broadcast", "request", "reply"]


class Block:
    """One anonymous file, mapped here; every process has its own object for it."""

    def __init__(self, descriptor: int) -> None:
        """Takes over `descriptor` and closes it when this object is gone."""
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls) -> "Block":
        return cls(os.memfd_create("fedelta", os.MFD_CLOEXEC))

    def write(self, head: object, tensors: Tensors) -> int:
        """Write a message over what was there; returns its size in bytes. Raises BadTensors for what is not dense."""
        entries = []
        offset = 0
        for name, tensor in tensors.items():
            check_dense(name, tensor)
            entries.append((name, tensor.dtype, tuple(tensor.shape), offset))
            offset = _aligned(offset + tensor.nbytes)
        packed = pickle.dumps((head, entries))
        start = _aligned(8 + len(packed))
        view = self._view(start + offset)
        view[:8] = len(packed).to_bytes(8, "little")
        view[8 : 8 + len(packed)] = packed
        for (_, dtype, shape, at), tensor in zip(entries, tensors.values(), strict=True):
            _copy(tensor.detach(), view[start + at : start + at + tensor.nbytes], dtype, shape)
        return start + offset

    def read(self, size: int) -> tuple[Any, dict[str, Tensor], memoryview]:
        """Head and tensors of the message of `size` bytes, and the memoryview that the tensors look through.

        The tensors are valid until the block is written again. The memoryview lives as long as any of them.
        """
        view = self._view(size)
        length = int.from_bytes(view[:8], "little")
        head, entries = pickle.loads(view[8 : 8 + length])
        start = _aligned(8 + length)
        return (
            head,
            {name: _tensor(view, dtype, shape, start + at) for name, dtype, shape, at in entries},
            view,
        )

    def _view(self, size: int) -> memoryview:
        if self._map is None or len(self._map) < size:
            # The old mapping is dropped, not closed: tensors may still look into it.
            if os.fstat(self.descriptor).st_size < size:
                os.ftruncate(self.descriptor, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._map = mmap.mmap(self.descriptor, 0)
        return memoryview(self._map)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises BadTensors unless the tensor has plain elements in memory."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantised" if tensor.is_quantized else "without elements" if tensor.is_meta else f"{tensor.layout}"
        raise BadTensors(f"tensor {name!r} is {kind}; a message carries dense tensors, send its dense parts")


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _copy(tensor: Tensor, to: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not tensor.numel():  # one that NumPy made has no strides
        return
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if plain and tensor.device.type == "cpu":
        # In one thread: PyTorch's own copy would start several, which wait for the cores that workers are busy on.
        to[:] = tensor.reshape(-1).view(torch.uint8).numpy().data
    else:
        _tensor(to, dtype, shape, 0).copy_(tensor)


def _tensor(view: memoryview, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    count = 1
    for length in shape:
        count *= length
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(view, dtype=dtype, count=count, offset=offset).view(shape)


class Pool:
    """The blocks of a coordinator, by number; a block is free when nobody holds it.

    Blocks for broadcasts, requests and replies are apart, as each kind has its own usual size.
    """

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._purposes: list[Purpose] = []
        self._holds: list[int] = []
        self._free: dict[Purpose, list[int]] = {
            "broadcast": [],
            "request": [],
            "reply": [],
        }
        self._unread: deque[int] = deque()  # filled by the garbage collector, in whatever thread it runs
        self._lent = 0

    def __getitem__(self, number: int) -> Block:
        return self._blocks[number]

    def take(self, purpose: Purpose) -> int:
        """A block that nobody holds, now held once; the one used last comes first, for its pages are warm."""
        self._collect()
        if self._free[purpose]:
            number = self._free[purpose].pop()
            self._holds[number] = 1
            return number
        self._blocks.append(Block.create())
        self._purposes.append(purpose)
        self._holds.append(1)
        return len(self._blocks) - 1

    @property
    def lent(self) -> int:
        """Number of blocks that somebody still reads in place."""
        self._collect()
        return self._lent

    def hold(self, number: int) -> None:
        self._holds[number] += 1

    def release(self, number: int) -> None:
        self._holds[number] -= 1
        if self._holds[number] == 0:
            self._free[self._purposes[number]].append(number)

    def lend(self, number: int, view: memoryview) -> None:
        """Pass one hold on to the readers of `view`: it is released when the last tensor that looks into it is gone."""
        self._lent += 1
        weakref.finalize(view, self._unread.append, number).atexit = False

    def _collect(self) -> None:
        while self._unread:
            self._lent -= 1
            self.release(self._unread.popleft())
