"""fedelta's simulation beside a bare PyTorch loop, Flower and pfl-research, in turns.

    python -m benchmarks.simulation                              # the three workloads, then growth
    python -m benchmarks.simulation --only mnist-cnn/bare,fedelta:workers --repeats 3
    python -m benchmarks.simulation --python flower=/path/to/flower/bin/python
    python -m benchmarks.simulation --show --docs                # nothing is run: tables, pictures and page anew

Every contestant has a process of its own, which is new at the start of a workload and then warm; only one works at a
time. A repeat is a whole run from a fresh model: its rounds from the second on give the time of a round, and its first
round, from the start of the run, the time to the first round. A ratio is taken within a repeat, and its median over
repeats is what is told. Nothing else should run on the machine meanwhile.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.simulation import results, workloads
from benchmarks.simulation.measure import BASE, Measurement, machine
from benchmarks.simulation.plans import fedelta_plans
from benchmarks.simulation.processes import ROOT, Failed
from benchmarks.simulation.worker import PEERS

GROWTH_REPEATS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.show:
        found = results.read(options.out)
        for block in found.values():
            print(results.table(block), end="\n\n")
    else:
        _measure(options)
        found = results.read(options.out)
    print("Pictures:", ", ".join(results.pictures(found, options.pictures)) or "none, there are no results")
    if options.docs:
        results.write_docs(found)
        print(f"Rewrote {results.PAGE.relative_to(ROOT)}")


def _measure(options: argparse.Namespace) -> None:
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU that PyTorch can use, and there is none; leave the option out")
    cores = options.cores or machine(options.device)["cores"]
    pythons = dict.fromkeys(("bare", "fedelta", *PEERS), sys.executable) | dict(map(_python, options.python))
    with tempfile.TemporaryDirectory(prefix="fedelta-bench-") as temporary:
        folder = options.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        everyone = [BASE, *(f"fedelta:{plan}" for plan in fedelta_plans(cores, options.device)), *list(PEERS)[1:]]
        measurement = Measurement(
            contestants=everyone,
            device=options.device,
            cores=cores,
            repeats=options.repeats,
            seconds=options.seconds,
            rounds=options.rounds,
            folder=folder,
            pythons=pythons,
            say=lambda line: print(line, flush=True),
        )
        for name, chosen in _chosen(options, everyone).items():
            growing = "@" in name
            taking_part = [c for c in chosen if not growing or options.growth_peers or c not in PEERS or c == BASE]
            repeats = min(options.repeats, GROWTH_REPEATS) if growing else options.repeats
            own = replace(measurement, contestants=taking_part, repeats=repeats)
            try:
                block = own.workload(name, agreement=not growing)
            except Failed as error:
                sys.exit(str(error))
            results.add(options.out, block)
            print(f"\n{results.table(block)}\n", flush=True)


def _chosen(options: argparse.Namespace, everyone: Sequence[str]) -> dict[str, list[str]]:
    """Workload -> contestants in their order; the bare loop is always one of them."""
    growth = [f"tiny-many@{n}" for n in workloads.TINY_SITES] + [f"stack@{n}" for n in workloads.STACK_PARAMETERS]
    wanted = options.only or [*([] if options.growth == "only" else workloads.MAIN), *growth]
    if options.growth == "no" and not options.only:
        wanted = list(workloads.MAIN)
    chosen = {}
    for pattern in wanted:
        name, _, listed = pattern.partition("/")
        try:
            workloads.find(name)
        except ValueError as error:
            sys.exit(str(error))
        names = listed.split(",") if listed else list(everyone)
        for unknown in set(names) - {*everyone, "fedelta"}:
            sys.exit(f"there is no contestant {unknown!r}; there are {', '.join(everyone)}, and fedelta for all plans")
        chosen[name] = [c for c in everyone if c == BASE or c in names or c.partition(":")[0] in names]
    return chosen


def _python(setting: str) -> tuple[str, str]:
    name, equals, path = setting.partition("=")
    if not equals or name not in ("bare", "fedelta", *PEERS) or not Path(path).exists():
        sys.exit(f"--python takes CONTESTANT=INTERPRETER with an interpreter that exists, got {setting!r}")
    return name, path


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.simulation", description=__doc__, formatter_class=form)
    parser.add_argument("--only", action="append", metavar="WORKLOAD[/CONTESTANT,...]", help="may be given repeatedly")
    parser.add_argument("--repeats", type=_positive, default=5, help="at most 3 for growth")
    parser.add_argument("--rounds", type=_rounds, help="rounds of a repeat; otherwise as many as --seconds need")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a repeat takes at least")
    parser.add_argument("--cores", type=_positive, help="that a contestant may keep busy; all by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--growth", choices=["yes", "no", "only"], default="yes")
    parser.add_argument("--growth-peers", action="store_true", help="let the other frameworks take part in it too")
    parser.add_argument("--python", action="append", default=[], metavar="CONTESTANT=INTERPRETER")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "simulation.json")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    parser.add_argument("--logs", type=Path, help="folder to keep what contestants print")
    parser.add_argument("--show", action="store_true", help="run nothing, show what --out holds")
    parser.add_argument("--docs", action="store_true", help="rewrite the section of docs/benchmarks.md")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more, not {text!r}")
    return int(text)


def _rounds(text: str) -> int:
    if _positive(text) < 2:
        raise argparse.ArgumentTypeError("2 or more: the time of a round is taken from the second on")
    return int(text)


if __name__ == "__main__":
    main()
