"""Randomness derived from a path, never from the history of a global generator.

Every random choice of a simulation is a function of (seed, path), for instance
`generator(seed, round, site, "batches")`, so that a run is the same whatever the order in which sites work, and after a
resume.

PyTorch's CPU generator keeps 32 bits of a seed, so that two of a few ten thousand streams would be the same. Hence the
whole state of its Mersenne twister (MT19937, 624 words of 32 bits) is written, in PyTorch's layout of `get_state()`.
Limits: a CUDA generator takes the 63 bits of `derive`.
"""

import hashlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Part = int | str
_FIRST_WORD = 24  # bytes before the words: the seed, two ints, the index of the next word
_WORDS = 624
_GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)  # of SplitMix64: the odd number next to 2**64 / golden ratio


def derive(seed: int, *path: Part) -> int:
    """A 63-bit seed for `path` under `seed`: BLAKE2b of the typed, length-prefixed parts.

    `derive(1, "a", 2)` and `derive(1, "a2")` differ, as do `2` and `"2"`.
    """
    return int.from_bytes(hashlib.blake2b(_framed(seed, *path), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: Part) -> torch.Generator:
    """A CPU generator for `path` under `seed`; its whole state comes from SHAKE-256 of the path."""
    return torch.Generator().set_state(_state(seed, *path))


@contextmanager
def seeded(seed: int, *path: Part) -> Iterator[None]:
    """Run a block with PyTorch's global generators (dropout, initialisation) seeded for `path`, then restore them.

    The CPU's draws what `generator(seed, *path)` draws. CUDA is not initialised by this; a block that initialises it
    finds it seeded, and leaves it so.
    """
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        # `manual_seed` would do no more, but write down its call stack for CUDA, which takes longer than a small site
        before = torch.get_rng_state()
        torch.set_rng_state(_state(seed, *path))
        try:
            yield
        finally:
            torch.set_rng_state(before)
        return
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if initialised else []):
        torch.manual_seed(derive(seed, *path))
        torch.set_rng_state(_state(seed, *path))
        yield


def permutations(seeds: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A random permutation of range(sizes[i]) for each seeds[i], as the rows of [len(seeds), max(sizes)].

    Behind its own permutation a shorter row holds the numbers from its size on. A row depends on its own seed and size
    alone. It is the order of 64-bit keys from SplitMix64 (Steele, Lea & Flood, OOPSLA 2014, figure 17), all rows in a
    few array operations: a generator for each of thousands of sites costs more than what they learn.
    """
    places = np.arange(1, int(sizes.max(initial=0)) + 1, dtype=np.uint64)
    keys = seeds[:, None] + places * _GAMMA  # modulo 2**64
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    keys ^= keys >> np.uint64(31)
    keys[places > sizes[:, None].astype(np.uint64)] = np.iinfo(np.uint64).max
    return np.argsort(keys, axis=1, kind="stable")


def derive_each(before: Sequence[Part], each: Iterable[Part], after: Sequence[Part]) -> list[int]:
    """`derive(*before, part, *after)` for each part, at a third of the cost."""
    first, last = _framed(*before), _framed(*after)
    hashes = [hashlib.blake2b(first + _frame(part) + last, digest_size=8).digest() for part in each]
    seeds: list[int] = (np.frombuffer(b"".join(hashes), ">u8") >> np.uint64(1)).tolist()
    return seeds


def _framed(*path: Part) -> bytes:
    return b"".join(map(_frame, path))


def _frame(part: Part) -> bytes:
    return _text(part) if isinstance(part, str) else _number(operator.index(part))


@lru_cache(maxsize=2**14)  # the same few words and names, again and again
def _text(part: str) -> bytes:
    encoded = part.encode()
    return b"s" + len(encoded).to_bytes(8, "big") + encoded


def _number(part: int) -> bytes:
    encoded = b"%d" % part
    return b"i" + len(encoded).to_bytes(8, "big") + encoded


def _state(seed: int, *path: Part) -> Tensor:
    """The state of a CPU generator that has drawn nothing yet."""
    state = torch.Generator().manual_seed(derive(seed, *path)).get_state()
    words = np.frombuffer(hashlib.shake_256(_framed(seed, *path)).digest(4 * _WORDS), "<u4")
    state.numpy()[_FIRST_WORD : _FIRST_WORD + 8 * _WORDS] = words.astype(np.uint64).view(np.uint8)
    return state
