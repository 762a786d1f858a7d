"""Ten thousand sites that each remember something between rounds: memory of the processes, and what a round costs.

    python benchmarks/site_memory.py [--sites 10000] [--kilobytes 400] [--rounds 3]

Every site replaces its memory in every round, as the control variates of SCAFFOLD would be. What sites remember lies in
files, so the processes stay small while the sites together remember gigabytes. Needs that much room in the temporary
folder (TMPDIR), which must not be a RAM disk; two versions of every memory are kept.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

import torch
from torch import Tensor

from fedelta import Workers
from fedelta.core.examples import Examples
from fedelta.core.messages import Reply, Request, Requests
from fedelta.core.program import Fleet, Report, Site, run


@dataclass(frozen=True)
class Remembering:
    """A program whose sites add one to what they remember; a round counts the sites whose sum is right."""

    rounds: int
    elements: int

    def init(self) -> int:
        return 0

    def finished(self, state: int) -> str | None:
        return "all rounds are done" if state == self.rounds else None

    def step(self, state: int, fleet: Fleet) -> tuple[int, Report]:
        parties, round = fleet.parties(), state + 1
        bases = dict.fromkeys(parties, state) if state else {}
        fleet.submit_many(Requests(to=parties, op="remember", round=round, bases=bases), 1)
        right = 0
        while (reply := fleet.next_reply()) is not None:
            assert isinstance(reply, Reply)
            right += int(reply.body["first"]) == round
        return round, Report(round=round, metrics={"right": float(right)}, cohort=parties)

    def handle(self, request: Request, site: Site) -> Reply:
        before = site.memory.at(request.base)
        kept = before["c"] + 1 if before else torch.ones(self.elements)
        site.memory.commit(request.base, request.round, {"c": kept})
        return Reply.to_request(request, {"first": kept[0]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=10_000)
    parser.add_argument("--kilobytes", type=int, default=400, help="that a site remembers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    program = Remembering(rounds=options.rounds, elements=options.kilobytes * 250)
    names = [f"site-{i:05d}" for i in range(options.sites)]
    none = Examples({"x": torch.zeros(1, 1)}, Tensor([0.0]))
    print(f"{options.sites} sites of {options.kilobytes} kB: {options.sites * options.kilobytes / 1e6:.1f} GB in all")
    print(f"files in {tempfile.gettempdir()}")
    with Workers(program, lambda _: none, names, workers=options.workers) as fleet:
        began = time.perf_counter()
        for _, report in run(program, fleet):
            assert report.metrics["right"] == options.sites
            taken, began = time.perf_counter() - began, time.perf_counter()
            print(f"round {report.round}: {taken:.1f} s, {_own_gigabytes():.2f} GB in all processes", flush=True)


def _own_gigabytes() -> float:
    """Of this process and its workers, shared pages once; without pages of files, which the kernel can drop."""
    return sum(map(_kilobytes, (os.getpid(), *(child.pid for child in active_children())))) / 1e6


def _kilobytes(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return fields["Pss_Anon"] + fields["Pss_Shmem"]


if __name__ == "__main__":
    main()
