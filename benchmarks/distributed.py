"""Accuracy with noise in shares beside that of a trusted coordinator: the same sites, rounds and epsilon.

    python -m benchmarks.distributed --data FOLDER [--docs] [--seeds 3] [--trained 1]

AG News and MiniLM as in benchmarks/privacy, 1,000 sites of 6 rows, all asked in every round: the closed-form head
alone, and FFA-LoRA for two rounds after it. In half of the runs a fifth of the sites is lost in every round: others
each time, after they have shared the secrets of a secure sum, which is when it costs most. Learning rate, clip and the
share of epsilon for the start are those that benchmarks/privacy has chosen for a coordinator that samples; none is
chosen anew. Results are kept in a file; a second call continues. Noise comes from the seed: this is a simulation, which
protects nobody.
"""

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch

from benchmarks.privacy.workload import News, Setting, loaded, on_features
from fedelta import (
    SGD,
    DistributedDP,
    FedAvg,
    Federation,
    FFALoRA,
    Local,
    Ridge,
    SecureAggregation,
    SiteData,
    SiteLevel,
    Training,
    run,
)
from fedelta.algorithms.parts import Clear
from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests
from fedelta.core.program import Fleet
from fedelta.core.seeds import derive
from fedelta.observe.intervals import interval

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- distributed -->", "<!-- /distributed -->"
SETTING = Setting(name="distributed", text="", unit="site", sites=1000, rounds=2, batch=6)
CLOSED_FORM, TRAINED = "closed form", "FFA-LoRA"
EPSILONS, LOST = (8.0, 4.0), (0.0, 0.2)
NOISE = ("trusted coordinator", "shares of the sites")
CLIP, RATE, SHARE = 0.3, 1.0, 0.5  # as benchmarks/privacy has chosen them
_news: list[News] = []  # of this process and those it forks


@dataclass
class Losing:
    """A fleet of which some sites fall silent when they are asked for what they have to give: others in each round."""

    fleet: Fleet
    share: float
    seed: int
    lost: deque[Reply] = field(default_factory=deque)

    def parties(self) -> Sequence[PartyId]:
        return self.fleet.parties()

    def submit(self, request: Request) -> None:
        self.fleet.submit(request)

    def submit_many(self, requests: Requests, together: int) -> None:
        if requests.op in ("train", "statistics"):
            random = np.random.default_rng(derive(self.seed, requests.round, "lost"))
            names = self.parties()
            gone = {names[place] for place in random.permutation(len(names))[: int(self.share * len(names))]}
            gone &= set(requests.to)
            self.lost.extend(
                Reply(sender=name, answers=requests.id_to(name), round=requests.round, error="it was lost")
                for name in gone
            )
            requests = replace(requests, to=[name for name in requests.to if name not in gone])
        self.fleet.submit_many(requests, together)

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        return self.lost.popleft() if self.lost else self.fleet.next_reply(timeout_s)

    def cancel(self, request_id: str) -> None:
        self.fleet.cancel(request_id)


@dataclass(frozen=True, kw_only=True)
class Job:
    method: str
    noise: str
    epsilon: float
    lost: float
    seed: int

    @property
    def key(self) -> str:
        how = f"{self.method}, {self.noise}, epsilon {self.epsilon:g}, {self.lost:g} lost, seed {self.seed}"
        return f"{how}; {SETTING.sites} sites, {SETTING.rounds} rounds, clip {CLIP}, rate {RATE}, share {SHARE}"

    def measured(self, news: News) -> dict[str, float]:
        torch.set_num_threads(1)
        began = time.perf_counter()
        trains = self.method == TRAINED
        data = news.draw(SETTING, self.seed, "tokens" if trains else "features")
        training = Training(optimizer=SGD(lr=RATE), batch=SETTING.batch)
        shares = self.noise == NOISE[1]
        amount: dict[str, Any] = {"clip": CLIP, "epsilon": self.epsilon, "delta": SETTING.delta, "start_share": SHARE}
        program: Federation[Any] = Federation(
            algorithm=FFALoRA(task=news.task, training=training)
            if trains
            else FedAvg(task=on_features(news), training=training),
            rounds=SETTING.rounds if trains else 0,
            start=Ridge(),
            privacy=DistributedDP(**amount) if shares else SiteLevel(**amount),
            collect=SecureAggregation() if shares else Clear(),
            seed=self.seed,
            evaluate_every=SETTING.rounds,
            test=data.test,
        )
        fleet = Local(program, lambda name: SiteData(train=data.sites[name]), list(data.sites))
        reports = [report for _, report in run(program, Losing(fleet, self.lost, self.seed))]
        accuracy, spent = (reports[-1].metrics[name] for name in ("test_accuracy", "epsilon"))
        return {"accuracy": accuracy, "epsilon": spent, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with AG News' test.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "distributed.json")
    parser.add_argument("--cache", type=Path, default=Path(gettempdir()) / "fedelta-features", help="for features")
    parser.add_argument("--seeds", type=int, default=3, help="of the closed form")
    parser.add_argument("--trained", type=int, default=1, help="seeds of what trains")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/privacy.md")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = json.loads(options.out.read_text()) if options.out.exists() else {}
    jobs = [*_jobs(CLOSED_FORM, options.seeds), *_jobs(TRAINED, options.trained)]
    missing = [job for job in jobs if job.key not in results]
    if missing:
        _news.append(loaded(options.data, options.cache, SETTING))
    with ProcessPoolExecutor(max_workers=options.processes, mp_context=get_context("fork")) as pool:
        running = {pool.submit(_measured, job): job for job in missing}
        for done, future in enumerate(as_completed(running), start=1):
            job, results[running[future].key] = running[future], future.result()
            options.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(f"{done}/{len(missing)} {job.key}: {results[job.key]}", flush=True)
    table = _table(results, {CLOSED_FORM: options.seeds, TRAINED: options.trained})
    print(table)
    if options.docs:
        _write(ROOT / "docs" / "privacy.md", table)


def _jobs(method: str, seeds: int) -> list[Job]:
    return [
        Job(method=method, noise=noise, epsilon=epsilon, lost=lost, seed=seed)
        for seed in range(seeds)
        for epsilon in EPSILONS
        for lost in LOST
        for noise in NOISE
    ]


def _measured(job: Job) -> dict[str, float]:
    return job.measured(_news[0])


def _table(results: dict[str, dict[str, float]], seeds: dict[str, int]) -> str:
    """A row for each method, noise and share of lost sites; of each cell the mean, its 95% interval, and the seeds."""
    lines = ["| method | noise | sites lost | " + " | ".join(f"ε = {epsilon:g}" for epsilon in EPSILONS) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(EPSILONS))
    for method in (CLOSED_FORM, TRAINED):
        for noise in NOISE:
            for lost in LOST:
                cells = []
                for epsilon in EPSILONS:
                    jobs = [
                        Job(method=method, noise=noise, epsilon=epsilon, lost=lost, seed=seed)
                        for seed in range(seeds[method])
                    ]
                    cells.append(_cell([results[job.key]["accuracy"] for job in jobs if job.key in results]))
                lines.append(" | ".join([f"| {method}", noise, f"{lost:.0%}", *cells]) + " |")
    return "\n".join(lines)


def _cell(found: Sequence[float]) -> str:
    if not found:
        return "missing"
    over = interval(found)
    half = "" if over.half is None else f" ± {100 * over.half:.1f}"
    return f"{100 * over.mean:.1f}%{half} ({over.count})"


def _write(page: Path, table: str) -> None:
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} needs a line {BEGIN} and, after it, a line {END}")
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    main()
