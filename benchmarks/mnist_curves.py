"""Test accuracy by round on MNIST, two-class shards and IID, as a table and a plot.

fedelta run examples/mnist.py --rounds 50 --out runs/mnist-shards
fedelta run examples/mnist.py --rounds 50 --out runs/mnist-iid --set SPLIT=iid
python benchmarks/mnist_curves.py runs/mnist-shards runs/mnist-iid --plot docs/images/mnist.png
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from fedelta.observe.folder import read_run
from fedelta.observe.series import rounds_to, series

METRIC = "test_accuracy"
SHOWN = (1, 5, 10, 20, 30, 40, 50)
TARGETS = (0.95, 0.97, 0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path, help="run folder of the two-class shards")
    parser.add_argument("iid", type=Path, help="run folder of the IID split")
    parser.add_argument("--plot", type=Path, help="where the plot goes")
    options = parser.parse_args()
    runs = {"two-class shards": read_run(options.shards)[1], "IID": read_run(options.iid)[1]}
    print(f"| test accuracy after round | {' | '.join(map(str, SHOWN))} | best |")
    print(f"|---|{'---|' * (len(SHOWN) + 1)}")
    for name, run in runs.items():
        values = series(run, METRIC)
        cells = [f"{100 * values[round]:.2f}%" if round in values else "–" for round in SHOWN]
        print(f"| {name} | {' | '.join(cells)} | {100 * max(values.values()):.2f}% |")
    for name, run in runs.items():
        reached = [f"{target:.0%}: {rounds_to(run, METRIC, target) or 'not reached'}" for target in TARGETS]
        print(f"rounds to, {name}: {', '.join(reached)}")
    if options.plot:
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        for (name, run), colour in zip(runs.items(), ("#d55e00", "#0072b2"), strict=True):
            values = series(run, METRIC)
            axes.plot(list(values), [100 * value for value in values.values()], label=name, color=colour)
        axes.axhline(99, color="#8a95a3", linewidth=1, linestyle=":", label="99%")
        axes.set(xlabel="round", ylabel="test accuracy (%)", ylim=(None, 100.5))
        axes.grid(color="#e8ecf0")
        axes.legend(frameon=False)
        figure.savefig(options.plot, dpi=130)


if __name__ == "__main__":
    main()
