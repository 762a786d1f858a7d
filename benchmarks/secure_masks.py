"""Masks of secure aggregation on one core: beside the bare keystream and addition, and a Mersenne twister. Interleaved.

    python -m benchmarks.secure_masks [--parameters 1000000] [--repeats 31]

One mask over a vector of 32-bit integers, by
- the parts alone: the keystream of AES-256-CTR, and one addition modulo 2^32, each over pieces that stay in the cache;
- both, bare: the keystream of the whole vector into one buffer, then numpy's addition of it;
- `add_mask`;
- a Mersenne twister seeded with 32 bits, and drawn from and added in 64-bit integers, as Flower's SecAgg+ has it
  (flwr.common.secure_aggregation.secaggplus_utils.pseudo_rand_gen and parameters_addition, modulus 2^32).
Medians, GB/s of the 32-bit vector, and ratios to the goal's base: the keystream alone + the addition alone.
"""

import argparse
import os
import platform
import secrets
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import cryptography
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from fedelta.secure.masks import add_mask

GOAL = 2.0  # times the keystream and the addition
PIECE = 2**16  # bytes; the vector's piece, the keystream and the zeros stay in the L2 cache
Vector = NDArray[Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Masks beside the bare keystream and addition, and a Mersenne twister."
    )
    parser.add_argument("--parameters", type=int, default=10**6)
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    vector = np.zeros(options.parameters, np.int32)
    wide = np.zeros(options.parameters, np.int64)
    keystream = "keystream alone"
    addition = "addition alone"
    works: dict[str, Callable[[], object]] = {
        keystream: partial(_keystream, vector.nbytes),
        addition: partial(_addition, vector),
        "bare: keystream, then addition": partial(_bare, vector, bytes(vector.nbytes), bytearray(vector.nbytes)),
        "`add_mask`": lambda: add_mask([vector], secrets.token_bytes(32), 1),
        "Mersenne twister, 32-bit seed": partial(_twister, wide),
    }
    medians = _medians(works, options.repeats)
    base = medians[keystream] + medians[addition]
    print(
        f"{options.parameters:,} parameters of 32 bits, medians of {options.repeats}, one core ({platform.machine()}),"
    )
    print(f"numpy {np.__version__}, cryptography {cryptography.__version__}\n")
    print("| mask | ms | GB/s | × (keystream alone + addition alone) |")
    print("|---|---:|---:|---:|")
    for name, taken in medians.items():
        print(f"| {name} | {1e3 * taken:.2f} | {vector.nbytes / taken / 1e9:.2f} | {taken / base:.2f} |")
    print(f"\nGoal: at most {GOAL:g} ×.")


def _medians(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if repeat:  # the first one touches memory that nobody has touched
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _cipher() -> CipherContext:
    return Cipher(algorithms.AES256(secrets.token_bytes(32)), modes.CTR(bytes(16))).encryptor()


def _keystream(count: int) -> None:
    cipher, zeros, into = _cipher(), memoryview(bytes(PIECE)), bytearray(PIECE)
    for start in range(0, count, PIECE):
        cipher.update_into(zeros[: count - start], into)


def _addition(vector: Vector) -> None:
    other = np.ones(PIECE // vector.itemsize, vector.dtype)
    for start in range(0, vector.size, other.size):
        part = vector[start : start + other.size]
        np.add(part, other[: part.size], out=part)


def _bare(vector: Vector, zeros: bytes, into: bytearray) -> None:
    _cipher().update_into(zeros, into)
    np.add(vector, np.frombuffer(into, vector.dtype), out=vector)


def _twister(vector: Vector) -> Vector:
    generator = np.random.RandomState(secrets.randbits(32))
    sums: Vector = vector + generator.randint(0, 2**32 - 1, vector.shape, dtype=np.int64)
    return sums


if __name__ == "__main__":
    main()
