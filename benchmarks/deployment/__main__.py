"""The deployment's wire beside bare gRPC streaming, on loopback with mutual TLS.

    python -m benchmarks.deployment              # about two minutes
    python -m benchmarks.deployment --docs       # also rewrites the table of docs/deployment.md

Sites return the model that they get, and nobody trains. The bare contestant sends the same bytes in frames of the same
size over gRPC's asyncio, with the same TLS and settings, and looks at nothing. Both take turns; a share is taken within
a turn, and its median is told. Memory is that of the coordinator's process at its peak, in rounds in which it reads
every reply, less what the process has with all sites connected and before there is a model. Nothing else should run on
the machine meanwhile.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.deployment.party import certify

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "deployment.md"
BEGIN, END = "<!-- wire -->", "<!-- /wire -->"
_CHUNK = 2**20
_SETTLED_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Work:
    name: str
    sites: int
    processes: int  # of the sites
    size: int  # bytes of the model
    rounds: int  # of a turn


LARGE = Work(name="100 MiB, 4 sites", sites=4, processes=4, size=100 * 2**20, rounds=1)
SMALL = Work(name="10,000 parameters, 100 sites in one process", sites=100, processes=1, size=40_000, rounds=10)
IDLE = Work(name="1,000 idle sites", sites=1000, processes=4, size=4, rounds=0)


class Contestant:
    """A coordinator in a process of its own, and its sites in others."""

    def __init__(self, kind: str, work: Work, folder: Path) -> None:
        self._work = work
        self._coordinator = _process("coordinator", kind, folder, work.sites, work.size)
        port = json.loads(self._coordinator.stdout.readline())["port"]
        self.alone = self._ask(memory=None)["now"]
        share, chunks = work.sites // work.processes, -(-work.size // _CHUNK)
        self._sites = [
            _process("sites", kind, folder, first, first + share, port, chunks) for first in range(0, work.sites, share)
        ]
        self._ask(wait=None)
        self.connected = self._ask(memory=None)["now"]

    def turn(self) -> float:
        """Seconds of a round."""
        return float(self._ask(rounds=self._work.rounds, read=False)["seconds"]) / self._work.rounds

    def memory(self) -> float:
        """Bytes at the peak of two rounds in which everything is read, beyond what there was without a model."""
        self._ask(memory=None)
        self._ask(rounds=2, read=True)
        return float(self._ask(memory=None)["peak"] - self.connected)

    def now(self) -> float:
        return float(self._ask(memory=None)["now"])

    def end(self) -> None:
        self._coordinator.stdin.close()
        for process in (self._coordinator, *self._sites):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ask(self, **order: Any) -> dict[str, Any]:
        self._coordinator.stdin.write(json.dumps(order) + "\n")
        self._coordinator.stdin.flush()
        found: dict[str, Any] = json.loads(self._coordinator.stdout.readline())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", choices=["large", "small", "idle"], action="append")
    parser.add_argument("--docs", action="store_true", help="rewrite the table of docs/deployment.md")
    options = parser.parse_args()
    wanted = options.only or ["large", "small", "idle"]
    lines = ["| | fedelta | bare gRPC | share | the aim |", "|---|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory(prefix="fedelta-bench-") as folder:
        certify(Path(folder), max(work.sites for work in (LARGE, SMALL, IDLE)))
        if "large" in wanted:
            lines += large(Path(folder), options.turns)
        if "small" in wanted:
            lines += small(Path(folder), options.turns)
        if "idle" in wanted:
            lines += idle(Path(folder))
    print("\n".join(lines))
    if options.docs:
        write_docs("\n".join(lines))


def large(folder: Path, turns: int) -> list[str]:
    with both(LARGE, folder) as (own, bare):
        ours, theirs = in_turns(own, bare, turns)
        memory = own.memory() / LARGE.size
    moved = 2 * LARGE.sites * LARGE.size / 1e6
    return [
        f"| {LARGE.name}: both ways together | {moved / median(ours):,.0f} MB/s | {moved / median(theirs):,.0f} MB/s | "
        f"{share(ours, theirs)} | 70% |",
        f"| {LARGE.name}: memory of the coordinator | {memory:.1f} models | | | 3 |",
    ]


def small(folder: Path, turns: int) -> list[str]:
    with both(SMALL, folder) as (own, bare):
        ours, theirs = in_turns(own, bare, turns)
    rates = [f"{1 / median(seconds):.1f} rounds/s" for seconds in (ours, theirs)]
    return [f"| {SMALL.name} | {rates[0]} | {rates[1]} | {share(ours, theirs)} | 60% |"]


def idle(folder: Path) -> list[str]:
    own = Contestant("fedelta", IDLE, folder)
    try:
        time.sleep(_SETTLED_S)
        found = (own.now() - own.alone) / 1e6
    finally:
        own.end()
    return [f"| {IDLE.name}: memory of the coordinator | {found:.0f} MB | | | 300 MB |"]


def in_turns(own: Contestant, bare: Contestant, turns: int) -> tuple[list[float], list[float]]:
    """Seconds of a round; the first turn of each is not told."""
    found = [(own.turn(), bare.turn()) for _ in range(turns + 1)][1:]
    return [ours for ours, _ in found], [theirs for _, theirs in found]


def share(ours: list[float], theirs: list[float]) -> str:
    return f"{median(there / here for here, there in zip(ours, theirs, strict=True)):.0%}"


@contextmanager
def both(work: Work, folder: Path) -> Iterator[tuple[Contestant, Contestant]]:
    started: list[Contestant] = []
    try:
        for kind in ("fedelta", "bare"):
            started.append(Contestant(kind, work, folder))
        yield started[0], started[1]
    finally:
        for one in started:
            one.end()


def write_docs(table: str, page: Path = PAGE) -> None:
    """Rewrite what stands between the markers of the page. Raises ValueError if they are not there once each."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} needs one line {BEGIN} and, after it, one line {END}")
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


def _process(role: str, kind: str, folder: Path, *numbers: int) -> Any:
    arguments = [sys.executable, "-m", "benchmarks.deployment.party", role, kind, str(folder), *map(str, numbers)]
    return subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
