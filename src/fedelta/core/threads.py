"""How many threads PyTorch uses inside one operation, for a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Run a block with `count` intra-op threads, then restore the number that there was.

    More threads than free cores are not merely useless: threads that spin for each other made a copy of 2 MB take
    milliseconds while worker processes kept the cores busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
