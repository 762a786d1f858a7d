"""The process of one contestant: it stays warm and does what it is told, a JSON line for a JSON line.

    python -m benchmarks.simulation.worker CONTESTANT DEVICE CORES

{"do": "load"} imports the contestant and says its versions, {"do": "run", "workload": W, "rounds": R} runs it, and with
"model": FILE also writes the final values there. An answer has "error" if it failed.
"""

import json
import os
import sys
import traceback
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.simulation.outcome import Contestant, Settings
from benchmarks.simulation.plans import fedelta_plans
from benchmarks.simulation.workloads import find

PEERS = {"bare": "with_bare", "flower": "with_flower", "pfl-research": "with_pfl"}


def load(name: str, settings: Settings) -> Contestant:
    """Import a contestant. Raises ImportError if what it needs is not installed."""
    kind, _, plan = name.partition(":")
    if kind == "fedelta":
        module = import_module("benchmarks.simulation.with_fedelta")
        found: Contestant = module.contestant(fedelta_plans(settings.cores, settings.device)[plan])
        return found
    loaded: Contestant = import_module(f"benchmarks.simulation.{PEERS[name]}").CONTESTANT
    return loaded


def main() -> None:
    name, device, cores = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a framework prints is not an answer
    settings = Settings(device=device, cores=int(cores))
    if device == "cpu":
        os.environ["PFL_PYTORCH_DEVICE"] = "cpu"
    contestant: Contestant | None = None
    for line in sys.stdin:
        try:
            order = json.loads(line)
            contestant = contestant or load(name, settings)
            answer = _run(contestant, order, settings) if order["do"] == "run" else _loaded(contestant, settings)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}", "missing": isinstance(error, ImportError)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _loaded(contestant: Contestant, settings: Settings) -> dict[str, Any]:
    versions = {"python": sys.version.split()[0]}
    for package in contestant.packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "from source"
    gpu = torch.cuda.get_device_name() if settings.device != "cpu" else None
    return {"versions": versions, "gpu": gpu}


def _run(contestant: Contestant, order: dict[str, Any], settings: Settings) -> dict[str, Any]:
    workload = find(order["workload"])
    outcome = contestant.run(workload, order["rounds"], settings)
    if order.get("model"):
        np.save(Path(order["model"]), outcome.model.numpy())
    return {"ends": outcome.ends, "phases": dict(outcome.phases)}


if __name__ == "__main__":
    main()
