"""The exact mean beside torch's `add_`: 10 updates of 100 MB, interleaved, medians.

    python benchmarks/mean.py [--updates 10] [--megabytes 100]

`add_` accumulates in float32, in place: the least that any mean has to do. The exact mean may take up to 7 times as
long, its last division and its own check of the bounds included. A federation checks every update before it hands it
over, so that check counts twice there; the last line includes it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from fedelta.aggregation.mean import Accumulator, Mean
from fedelta.core.messages import Update
from fedelta.core.parameters import Layout, Parameters

GOAL = 7.0


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="The exact mean beside add_.")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=100)
    options = parser.parse_args()

    size = options.megabytes * 10**6 // 4
    layout = Layout.of({"w": torch.empty(size, device="meta")})
    chance = torch.Generator().manual_seed(0)
    vector = torch.randn(size, generator=chance)
    mean, plain = Mean(), torch.zeros(size)
    accumulator = Accumulator(mean, options.updates + 1)
    accumulator.add(Update(values=Parameters(layout, vector)))  # the first one also allocates
    plain.add_(vector)

    times: dict[str, list[float]] = {"add_": [], "refuse": [], "exact add": []}
    for _ in range(options.updates):
        update = Update(values=Parameters(layout, torch.randn(size, generator=chance)), weight=600.0)
        times["add_"].append(seconds(partial(plain.add_, update.values.vector)))
        times["refuse"].append(seconds(partial(mean.refuse, update)))
        times["exact add"].append(seconds(partial(accumulator.add, update)))
    total = seconds(accumulator.total)

    medians = {name: statistics.median(measured) for name, measured in times.items()}
    base = medians["add_"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{options.updates} updates of {options.megabytes} MB")
    for name, median in medians.items():
        print(f"{name:10s} {1e3 * median:7.1f} ms an update {median / base:6.2f} x add_")
    print(f"{'total':10s} {1e3 * total:7.1f} ms once")
    whole = options.updates * medians["exact add"] + total
    checked = whole + options.updates * medians["refuse"]
    print(f"whole mean: {whole / options.updates / base:.2f} x add_ (goal: at most {GOAL:g})")
    print(f"with every update also checked beforehand: {checked / options.updates / base:.2f} x add_")


if __name__ == "__main__":
    main()
