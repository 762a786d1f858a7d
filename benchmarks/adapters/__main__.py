"""Every way to federate LoRA that fedelta has, in one table: quality, bytes, seconds, error of the aggregation.

    python -m benchmarks.adapters --data FOLDER [--docs] [--seeds 3] [--workload NAME] [--method NAME]

FOLDER holds AG News' test.csv in ag-news/, the plays in tinyshakespeare/input.txt and the Llama in
weights-stories260K/hf. A learning rate is the best on rows kept for that, with one seed that is used for nothing else,
of a grid that grows by factors of 2 until its best is not at an end. FedIT, FFA-LoRA, Fed-SB and FedKSeed have one of
their own; all others train both factors, and take FedIT's. Results are kept in a file; a second call continues.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.adapters.methods import METHODS, Method, measured, tuned_as
from benchmarks.adapters.results import show, write_docs
from benchmarks.adapters.workloads import Workload, agnews, shakespeare

ROOT = Path(__file__).resolve().parents[2]
TUNING_SEED = 100
_TUNED_AT = {"agnews-0.1": "agnews-0.5", "agnews-ranks": "agnews-0.5"}  # the same model and rows, and the milder split
_workloads: dict[str, Workload] = {}  # of this process and those it forks
_methods = {method.name: method for method in METHODS}
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    workload: str
    method: str
    lr: float
    seed: int

    @property
    def tuning(self) -> bool:
        return self.seed == TUNING_SEED

    @property
    def key(self) -> str:
        return f"{self.workload} | {self.method} | lr {self.lr:g} | seed {self.seed}"

    def __call__(self) -> tuple[str, dict[str, Any]]:
        return self.key, measured(
            _workloads[self.workload], _methods[self.method], self.lr, self.seed, tuning=self.tuning
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "adapters.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workload", action="append", help="only this one; may be given again")
    parser.add_argument("--method", action="append", help="only this one; may be given again")
    parser.add_argument("--docs", action="store_true", help="write docs/adapters.md and its picture from the results")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    data = options.data
    found = [
        *agnews(data / "ag-news"),
        shakespeare(data / "tinyshakespeare/input.txt", data / "weights-stories260K/hf"),
    ]
    _workloads.update({one.name: one for one in found})
    wanted = [one for one in found if not options.workload or one.name in options.workload]
    chosen = [one for one in METHODS if not options.method or one.name in options.method]
    results: Results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for workload in wanted:
        methods = [one for one in chosen if one.ranks or not workload.ranks]
        leading = list(dict.fromkeys(tuned_as(one) for one in methods))
        own = _tuned(_TUNED_AT.get(workload.name, workload.name), leading, results, options.out)
        rates = {one: own[tuned_as(one)] for one in methods}
        jobs = [Job(workload.name, one.name, rates[one], seed) for seed in range(options.seeds) for one in methods]
        _measure(jobs, results, options.out)
        print(show(workload, methods, rates, results, options.seeds))
    if options.docs:
        write_docs(found, results, options.seeds, ROOT)


def _tuned(workload: str, methods: Sequence[Method], results: Results, out: Path) -> dict[Method, float]:
    """The best learning rate of each method, which is not at an end of the grid that it was tried on."""
    grids = {method: list(method.grid) for method in methods}
    sign = _workloads[workload].sign
    while True:
        _measure([Job(workload, m.name, lr, TUNING_SEED) for m in methods for lr in grids[m]], results, out)
        best = {
            # of rates that do equally well the highest, or where nothing is learned the search would never end
            m: max(grids[m], key=lambda lr: (sign * results[Job(workload, m.name, lr, TUNING_SEED).key]["score"], lr))
            for m in methods
        }
        ends = [m for m in methods if best[m] in (grids[m][0], grids[m][-1])]
        if not ends:
            return best
        for m in ends:
            grids[m] = [grids[m][0] / 2, *grids[m]] if best[m] == grids[m][0] else [*grids[m], grids[m][-1] * 2]


def _measure(jobs: Sequence[Job], results: Results, out: Path) -> None:
    """Run what is not in `results` yet, one single-threaded process per core, and add it there."""
    missing = [job for job in jobs if job.key not in results]
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("fork")) as pool:
        for done in as_completed([pool.submit(job) for job in missing]):
            key, result = done.result()
            results[key] = result
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(f"{key}: {result['score']:.4f}", flush=True)


if __name__ == "__main__":
    main()
