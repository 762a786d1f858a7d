"""Whether the fast ways to train learn as the plain one does: test accuracy on MNIST by round, for each execution plan.

    FEDELTA_DATA=FOLDER python benchmarks/mnist_plans.py [--seeds 3] [--rounds 10] [--bf16]

The experiment of `examples/mnist.py`, 100 sites of 600 images, two-class shards, 10 sites a round, but one local epoch
in batches of 20. Plans change floating-point bits, and those the path of training: what may differ between them is what
differs between seeds. Prints a table in markdown, mean and standard deviation over the seeds.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from fedelta import Plan, Workers, run
from fedelta.algorithms.federation import Federation
from fedelta.cli.experiment import Experiment, Sites

EXPERIMENT = Path(__file__).parent.parent / "examples" / "mnist.py"
SHOWN = (1, 2, 5, 10, 20, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="also in bfloat16: slow where the processor has none")
    options = parser.parse_args()

    plans = {
        "one by one": Plan(cohort=1, channels_last=False),
        "one by one, channels last": Plan(cohort=1, channels_last=True),
        "5 sites at once": Plan(cohort=5, channels_last=False),
    }
    if options.bf16:
        plans["one by one, channels last, bf16"] = Plan(cohort=1, channels_last=True, bf16=True)
    experiment = Experiment.load(EXPERIMENT, {"EPOCHS": "1", "BATCH": "20", "ROUNDS": str(options.rounds)})
    federation = experiment.build()
    assert isinstance(federation, Federation)
    federation = replace(federation, test=experiment.held_out())
    sites = Sites(load=experiment.site, names=experiment.names())
    for name in sites.names:  # before workers are forked, so that they share it
        sites(name)

    rounds = [round for round in SHOWN if round <= options.rounds]
    print(f"| test accuracy after round | {' | '.join(map(str, rounds))} |\n|---|{'---|' * len(rounds)}", flush=True)
    for label, plan in plans.items():
        curves = [
            _curve(replace(federation, plan=plan, seed=seed), sites, options.workers) for seed in range(options.seeds)
        ]
        cells = [_spread([curve[round - 1] for curve in curves]) for round in rounds]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def _curve(federation: Federation[object], sites: Sites, workers: int) -> list[float]:
    with Workers(federation, sites, sites.names, workers=workers) as fleet:
        return [report.metrics["test_accuracy"] for _, report in run(federation, fleet)]


def _spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}%{deviation}"


if __name__ == "__main__":
    main()
