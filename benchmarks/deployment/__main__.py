"""The deployment's wire beside bare gRPC streaming and Flower's deployment, on loopback with TLS.

    python -m benchmarks.deployment              # about two minutes
    python -m benchmarks.deployment --docs       # also rewrites the table of docs/deployment.md
    python -m benchmarks.deployment --python flower=/path/to/flower/bin/python

Sites return the model that they get, and nobody trains. The bare contestant sends the same bytes in frames of the same
size over gRPC's asyncio, with the same TLS and settings, and looks at nothing. Both take turns; a share is taken within
a turn, and its median is told. Memory is that of the coordinator's process at its peak, in rounds in which it reads
every reply, less what the process has with all sites connected and before there is a model. Nothing else should run on
the machine meanwhile.

Flower takes part where an interpreter that has it is given, with as many sites as --flower-sites says where the others
have a hundred or more: its sites are too large for that (see with_flower.py). Its rounds are a block of their own and
not in turns, since its processes ask for work again and again and would disturb the others; so there is no share of it.
Seconds are taken in its ServerApp, from a model to the last reply. Memory is that of SuperLink and ServerApp, the peaks
of both added. With it, the whole takes about ten minutes more.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.deployment.party import certify
from benchmarks.deployment.with_flower import LIMIT_S, Flower, Found, NoAnswer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "deployment.md"
BEGIN, END = "<!-- wire -->", "<!-- /wire -->"
_CHUNK = 2**20
_SETTLED_S = 3.0
_CAPTION = f"""Flower's deployment, with TLS and its documented settings, and as many sites as are said where they are
fewer. Its rounds are a block of their own and not in turns with the others; each may take {LIMIT_S:.0f} s."""

Row = tuple[str, ...]  # what, fedelta, bare gRPC, share, aim, Flower


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


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    wanted = options.only or ["large", "small", "idle"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedelta-bench-") as temporary:
        folder = Path(temporary)
        flower = _flower(options, folder)
        certify(folder, max(work.sites for work in (LARGE, SMALL, IDLE)))
        if "large" in wanted:
            rows += large(folder, options.turns, flower)
        if "small" in wanted:
            rows += small(folder, options.turns, flower)
        if "idle" in wanted:
            rows += idle(folder, flower)
    found = table(rows, flower.version if flower else None)
    print(found)
    if options.docs:
        write_docs(found)


def large(folder: Path, turns: int, flower: Flower | None) -> list[Row]:
    with both(LARGE, folder) as (own, bare):
        ours, theirs = in_turns(own, bare, turns)
        memory = own.memory() / LARGE.size
    moved = 2 * LARGE.sites * LARGE.size / 1e6
    speed, models = told(
        flower,
        LARGE,
        turns,
        lambda found: f"{moved / median(found.seconds):,.0f} MB/s",
        lambda found: f"{found.peak / LARGE.size:.1f} models",
    )
    speeds = [f"{moved / median(seconds):,.0f} MB/s" for seconds in (ours, theirs)]
    return [
        (f"{LARGE.name}: both ways together", *speeds, share(ours, theirs), "70%", speed),
        (f"{LARGE.name}: memory of the coordinator", f"{memory:.1f} models", "", "", "3", models),
    ]


def small(folder: Path, turns: int, flower: Flower | None) -> list[Row]:
    with both(SMALL, folder) as (own, bare):
        ours, theirs = in_turns(own, bare, turns)
    [rate] = told(flower, SMALL, turns, lambda found: f"{1 / median(found.seconds):.2g} rounds/s")
    rates = [f"{1 / median(seconds):.1f} rounds/s" for seconds in (ours, theirs)]
    return [(SMALL.name, *rates, share(ours, theirs), "60%", rate)]


def idle(folder: Path, flower: Flower | None) -> list[Row]:
    own = Contestant("fedelta", IDLE, folder)
    try:
        time.sleep(_SETTLED_S)
        found = (own.now() - own.alone) / 1e6
    finally:
        own.end()
    [memory] = told(flower, IDLE, 0, lambda found: f"{found.connected / 1e6:.0f} MB")
    return [(f"{IDLE.name}: memory of the coordinator", f"{found:.0f} MB", "", "", "300 MB", memory)]


def told(flower: Flower | None, work: Work, rounds: int, *cells: Callable[[Found], str]) -> list[str]:
    """Flower's cells of the table, with the number of its sites if it is not that of the work."""
    if flower is None:
        return [""] * len(cells)
    sites = min(work.sites, flower.sites)
    try:
        found = flower.measure(sites, work.size, rounds)
    except NoAnswer as error:
        texts = [str(error)] * len(cells)
    else:
        texts = [cell(found) for cell in cells]
    return [text if sites == work.sites else f"{text}, {sites} sites" for text in texts]


def table(rows: Sequence[Row], flower: str | None) -> str:
    """Of rows with a last cell for Flower, which is left out if there is no version of it."""
    head: Row = ("", "fedelta", "bare gRPC", "share", "the aim", f"Flower {flower}")
    columns = len(head) if flower is not None else len(head) - 1
    lines = [" ".join(["|", *(f"{cell} |".lstrip() for cell in row[:columns])]) for row in (head, *rows)]
    text = "\n".join([lines[0], "|---|" + "---:|" * (columns - 1), *lines[1:]])
    return text if flower is None else f"{text}\n\n{_CAPTION}"


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


def _flower(options: argparse.Namespace, folder: Path) -> Flower | None:
    if options.python is None:
        return None
    if options.flower_sites < LARGE.sites:
        sys.exit(f"--flower-sites is {options.flower_sites}; let it be {LARGE.sites} or more, as {LARGE.name!r} has")
    try:
        return Flower(options.python, options.flower_sites, folder)
    except ValueError as error:
        sys.exit(str(error))


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.deployment", description=__doc__, formatter_class=form)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", choices=["large", "small", "idle"], action="append")
    parser.add_argument("--python", type=_python, metavar="flower=INTERPRETER", help="let Flower take part")
    parser.add_argument("--flower-sites", type=int, default=25, metavar="N", help="where others have more; %(default)s")
    parser.add_argument("--docs", action="store_true", help="rewrite the table of docs/deployment.md")
    return parser


def _python(setting: str) -> Path:
    name, _, path = setting.partition("=")
    if name != "flower" or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"flower=INTERPRETER with an interpreter that exists, not {setting!r}")
    return Path(path)


def _process(role: str, kind: str, folder: Path, *numbers: int) -> Any:
    arguments = [sys.executable, "-m", "benchmarks.deployment.party", role, kind, str(folder), *map(str, numbers)]
    return subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
