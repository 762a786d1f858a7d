"""Randomness derived from a path, never from the history of a global generator.

Every random choice of a simulation is a function of (seed, path), for instance
`generator(seed, round, site, "batches")`, so that a run is the same whatever the order in which sites work, and after a
resume.
"""

import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Part = int | str


def derive(seed: int, *path: Part) -> int:
    """A 63-bit seed for `path` under `seed`: BLAKE2b of the typed, length-prefixed parts.

    `derive(1, "a", 2)` and `derive(1, "a2")` differ, as do `2` and `"2"`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *path):
        kind, text = (b"s", part.encode()) if isinstance(part, str) else (b"i", b"%d" % operator.index(part))
        digest.update(kind + len(text).to_bytes(8, "big") + text)
    return int.from_bytes(digest.digest(), "big") >> 1


def generator(seed: int, *path: Part) -> torch.Generator:
    """A CPU generator for `path` under `seed`."""
    return torch.Generator().manual_seed(derive(seed, *path))


@contextmanager
def seeded(seed: int, *path: Part) -> Iterator[None]:
    """Run a block with PyTorch's global generators (dropout, initialisation) seeded for `path`, then restore them."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, *path))
        yield
