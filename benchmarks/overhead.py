"""What a simulated site costs besides its training, when thousands of tiny ones are trained at once.

    python -m benchmarks.overhead [--sites 1000] [--cohort 250]

"tiny-many" of `benchmarks/simulation` in this process, with a report each round: the time of a round less the time
within `train_many`, for each site. What is left is sampling, requests, seeds, finding the sites' examples, the check of
the bounds, the mean, the report and the run folder. Processor time of the one thread, so that what else runs on the
machine counts little; medians over rounds.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.simulation.with_fedelta import _federation
from benchmarks.simulation.workloads import data, find
from fedelta import Examples, Local, Plan, run
from fedelta.algorithms import algorithm
from fedelta.observe.folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    torch.set_num_threads(1)
    workload = find(f"tiny-many@{options.sites}")
    examples = data(workload, "cpu")
    names = [f"site-{index:05d}" for index in range(options.sites)]
    federation = _federation(Plan(cohort=options.cohort, channels_last=False), workload, options.rounds)
    training = 0.0
    original = vars(algorithm)["train_many"]

    def timed(*arguments: Any, **named: Any) -> Any:
        nonlocal training
        began = time.thread_time()
        try:
            return original(*arguments, **named)
        finally:
            training += time.thread_time() - began

    vars(algorithm)["train_many"] = timed
    fleet = Local(federation, lambda name: Examples(*examples.site(int(name.removeprefix("site-")))), names)
    rounds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, RunFolder.create(Path(folder) / "run", {}) as reports:
        began = time.thread_time()
        for state, report in run(federation, fleet):
            reports.add(state, report)
            now = time.thread_time()
            rounds.append((now - began, training))
            began, training = now, 0.0
    rounds = rounds[2:]  # the first ones load data and fill caches
    whole = statistics.median(taken for taken, _ in rounds)
    rest = statistics.median(taken - trained for taken, trained in rounds)
    print(f"{options.sites} sites, {options.cohort} at once, one thread: {1e3 * whole:.1f} ms a round")
    print(f"besides training: {1e3 * rest:.1f} ms, {1e6 * rest / options.sites:.1f} microseconds a site")


if __name__ == "__main__":
    main()
