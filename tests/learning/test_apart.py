"""Work in a process of its own, and its memory."""

import os
from functools import partial

import pytest
import torch

from fedelta.core.errors import BadInput, FedeltaError
from fedelta.learning.apart import Memory, apart

MB = 2**20


def allocated(sizes: list[int], memory: Memory) -> tuple[int, int | None]:
    """Allocate and free tensors of so many MB, then keep the last."""
    kept = torch.empty(0)
    for size in sizes:
        kept = torch.ones(size * MB // 4)
        kept = kept + 0 if size % 2 else kept
    return kept.nbytes, memory.peak()


@pytest.mark.parametrize(("sizes", "expected"), [([64], 64), ([64, 16], 80), ([33], 66)])
def test_the_peak_is_that_of_the_work(sizes: list[int], expected: int) -> None:
    freed = [torch.ones(32 * MB // 4) for _ in range(4)]  # by this process: it must not serve the work
    del freed
    nbytes, peak = apart(partial(allocated, sizes))
    assert nbytes == sizes[-1] * MB
    if peak is None:
        pytest.skip("memory is not known on this system")
    assert (expected - 1) * MB <= peak < (expected + 8) * MB  # the kernel counts pages in batches


def process(memory: Memory) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def test_it_is_another_process_with_one_thread() -> None:
    number, threads = apart(process)
    assert number != os.getpid()
    assert threads == 1


def refuse(memory: Memory) -> None:
    raise BadInput("this data is no good; bring other data")


def fail(memory: Memory) -> None:
    torch.ones(2, 3) @ torch.ones(2, 3)


def end(memory: Memory) -> None:
    os._exit(3)


def test_what_goes_wrong_there_is_told_here() -> None:
    with pytest.raises(BadInput, match="bring other data"):
        apart(refuse)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        apart(fail)
    assert "in fail" in "".join(caught.value.__notes__)
    with pytest.raises(FedeltaError, match="exit code 3"):
        apart(end)
