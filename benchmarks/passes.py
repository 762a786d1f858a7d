"""What of a round of "mnist-cnn" is PyTorch's: forward and backward passes, in a process for each core.

    python -m benchmarks.passes

They take turns with the bare loop of `benchmarks/simulation`, in whose units they are told: what trains site by site
with PyTorch's operations on this many cores hardly takes less. The passes are as many as a round has, of batches that
are there already; no optimiser, no copy of the model, no mean. Images are channels last. Nothing else should run on the
machine meanwhile.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from statistics import median

import torch
from torch.nn import functional

from benchmarks.simulation import with_bare
from benchmarks.simulation.outcome import Settings
from benchmarks.simulation.workloads import data, find, predict, trained

WORKLOAD = "mnist-cnn"
ROUNDS = 3  # of the bare loop in a turn; the first one warms up


def bare(cores: int) -> Callable[[], float]:
    """Seconds of a round."""

    def turn() -> float:
        ends = with_bare.run(find(WORKLOAD), ROUNDS, Settings(device="cpu", cores=cores)).ends
        return (ends[-1] - ends[0]) / (ROUNDS - 1)

    return turn


def passes(share: int, bf16: bool) -> Callable[[], float]:
    """Seconds of the passes of `share` sites."""
    torch.set_num_threads(1)
    workload = find(WORKLOAD)
    examples = data(workload, "cpu")
    module = workload.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = trained(module)

    batches = []
    for site in range(share):
        inputs, targets = examples.site(site)
        for rows in torch.split(torch.arange(len(targets)), workload.batch):
            images = {name: tensor[rows].to(memory_format=torch.channels_last) for name, tensor in inputs.items()}
            batches.append((images, targets[rows]))

    def turn() -> float:
        began = time.perf_counter()
        for inputs, targets in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = functional.cross_entropy(predict(module, inputs), targets)
            torch.autograd.grad(loss, parameters)
        return time.perf_counter() - began

    return turn


def _serve(pipe: Connection, make: Callable[..., Callable[[], float]], arguments: tuple[object, ...]) -> None:
    turn = make(*arguments)
    while pipe.recv():
        pipe.send(turn())


class Contestant:
    """Processes that each do their part of a turn at the same time."""

    def __init__(self, stack: ExitStack, processes: int, make: Callable[..., Callable[[], float]], *given: object):
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, given), daemon=True)
            process.start()
            stack.callback(_end, process)
            self._pipes.append(ours)
        self.turn()  # warms up

    def turn(self) -> float:
        for pipe in self._pipes:
            pipe.send(True)
        return float(max(pipe.recv() for pipe in self._pipes))


def _end(process: BaseProcess) -> None:
    process.terminate()
    process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    share = -(-find(WORKLOAD).per_round // cores)
    with ExitStack() as stack:
        base = Contestant(stack, 1, bare, cores)
        others = {
            "float32": Contestant(stack, cores, passes, share, False),
            "bf16": Contestant(stack, cores, passes, share, True),
        }
        shares: dict[str, list[float]] = {name: [] for name in others}
        for _ in range(options.turns):
            unit = base.turn()
            for name, contestant in others.items():
                shares[name].append(contestant.turn() / unit)
    for name, found in shares.items():
        low, high = min(found), max(found)
        print(
            f"{WORKLOAD}, passes alone in {cores} processes, {name}: {median(found):.2f} of the bare loop",
            end=" ",
        )
        print(f"({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
