"""Measuring one workload: do the contestants agree, and how long does each take, in turns."""

import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.simulation.plans import fedelta_plans
from benchmarks.simulation.processes import Failed, Missing, Process

BASE = "bare"
MOST_ROUNDS = 200
TIMEOUT_S = 900.0
_SAME = 1e-4  # largest difference of a value between two ways to take the same two steps
_SAME_DIRECTION = 1e-2  # norm of that difference, in units of how far the model moved
_SAME_DIRECTION_BF16 = 0.3
_SAME_LENGTH = 0.15  # how much longer or shorter a round of the real workload may move the model than bare does

Vector = npt.NDArray[np.float32]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    contestants: Sequence[str]  # the base first
    device: str
    cores: int
    repeats: int
    seconds: float  # that a repeat takes at least, unless that were more than MOST_ROUNDS
    rounds: int | None  # instead, the number of rounds of every repeat
    folder: Path  # for outputs of contestants
    pythons: Mapping[str, str] = field(default_factory=dict)  # contestant -> interpreter of its own environment
    say: Say = print

    def workload(self, name: str, *, agreement: bool = True) -> dict[str, Any]:
        """All of one workload, as plain JSON values."""
        with ExitStack() as stack:
            ready, missing = self._start(name, stack)
            if agreement:
                self._agree(name, ready, missing)
            self._warm_up(name, ready, missing)
            self._repeats(name, ready, missing)
        return {
            "workload": name,
            "machine": machine(self.device),
            "date": time.strftime("%Y-%m-%d"),
            "settings": {"repeats": self.repeats, "seconds": self.seconds, "cores": self.cores},
            "contestants": {entry.name: entry.result for entry in ready},
            "missing": missing,
        }

    def _start(self, name: str, stack: ExitStack) -> tuple[list["_Entry"], dict[str, str]]:
        entries, missing = [], {}
        for contestant in self.contestants:
            if not self._is_for(contestant, name):
                continue
            log = self.folder / f"{name}-{contestant.replace(':', '-')}.log".replace("/", "-")
            process = Process(contestant, self.pythons[contestant.partition(":")[0]], self.device, self.cores, log)
            stack.callback(process.stop)
            try:
                entries.append(_Entry(contestant, process, process.ask(TIMEOUT_S, do="load")))
            except (Missing, Failed) as error:
                kind = "not installed" if isinstance(error, Missing) else "failed"
                missing[contestant] = f"{kind}: {error}"
                self.say(f"{name}: {contestant} {missing[contestant]}")
        if not entries or entries[0].name != BASE:
            raise Failed(f"the bare loop does not run here: {missing.get(BASE)}")
        return entries, missing

    def _is_for(self, contestant: str, workload: str) -> bool:
        kind, _, plan = contestant.partition(":")
        if kind != "fedelta":
            return True
        only = fedelta_plans(self.cores, self.device)[plan].workloads
        return not only or workload.partition("@")[0] in only

    def _warm_up(self, name: str, ready: list["_Entry"], missing: dict[str, str]) -> None:
        """One run of two rounds: what a first run costs more, memory, and how many rounds fill a repeat."""

        def work(entry: _Entry) -> None:
            answer = entry.process.ask(TIMEOUT_S, watch=True, do="run", workload=name, rounds=2)
            first, second = answer["ends"]
            fitting = math.ceil(self.seconds / max(second - first, 1e-9))
            entry.rounds = self.rounds or 1 + max(2, min(fitting, MOST_ROUNDS))
            entry.result |= {"rounds": entry.rounds, "first_run_s": first, "peak_mb": round(answer["peak_mb"], 1)}
            self.say(f"{name}: {entry.name}, first round of the process {first:.2f} s, then {second - first:.4f} s")

        self._each(name, ready, missing, work)

    def _repeats(self, name: str, ready: list["_Entry"], missing: dict[str, str]) -> None:
        def work(entry: _Entry) -> None:
            answer = entry.process.ask(TIMEOUT_S, do="run", workload=name, rounds=entry.rounds)
            entry.result.setdefault("repeats", []).append(answer)

        for repeat in range(1, self.repeats + 1):
            self._each(name, ready, missing, work)
            self.say(f"{name}: repeat {repeat} of {self.repeats}")

    def _agree(self, name: str, ready: list["_Entry"], missing: dict[str, str]) -> None:
        """Compare each contestant with the bare loop.

        `/steady`: two steps on all of a site's examples, every site, no dropout. Shuffling changes nothing, so the
        models are the same but for rounding. `/few`: the real batches and epochs; each contestant shuffles in its own
        way, so only the distance that the model moves is compared, which tells another number of steps or another rate.
        """
        base = ready[0]
        start = self._model(base, f"{name}/steady", rounds=0)
        steady = self._model(base, f"{name}/steady", rounds=1) - start
        few = self._model(base, f"{name}/few", rounds=1) - start

        def work(entry: _Entry) -> None:
            moved = self._model(entry, f"{name}/steady", rounds=1) - start
            length = _norm(self._model(entry, f"{name}/few", rounds=1) - start) / _norm(few)
            found = agreement(moved, steady, length, bf16=self._bf16(entry.name))
            entry.result["agreement"] = found
            verdict = "agrees" if found["agrees"] else "DOES NOT AGREE"
            self.say(
                f"{name}: {entry.name} {verdict}: differs by {found['largest']:.1e}, "
                f"{found['relative']:.1e} of the way; moves {length:.3f} times as far"
            )

        self._each(name, ready, missing, work)

    def _bf16(self, contestant: str) -> bool:
        kind, _, plan = contestant.partition(":")
        return kind == "fedelta" and fedelta_plans(self.cores, self.device)[plan].bf16

    def _model(self, entry: "_Entry", workload: str, rounds: int) -> Vector:
        file = (self.folder / "model.npy").resolve()
        entry.process.ask(TIMEOUT_S, do="run", workload=workload, rounds=rounds, model=str(file))
        model: Vector = np.load(file)
        return model

    def _each(
        self, name: str, ready: list["_Entry"], missing: dict[str, str], work: Callable[["_Entry"], None]
    ) -> None:
        """Let each work in turn; one that fails takes no further part."""
        for entry in list(ready):
            try:
                work(entry)
            except (Failed, Missing) as error:
                if entry.name == BASE:
                    raise
                ready.remove(entry)
                missing[entry.name] = f"failed: {error}"
                self.say(f"{name}: {entry.name} {missing[entry.name]}")


@dataclass(eq=False)
class _Entry:
    name: str
    process: Process
    result: dict[str, Any]
    rounds: int = 2


def agreement(moved: Vector, base: Vector, length: float, *, bf16: bool) -> dict[str, Any]:
    """How far two movements from the same start differ, and whether that is within bounds."""
    if moved.shape != base.shape:
        raise Failed(f"a model of {moved.size} trained values where the bare loop has {base.size}")
    largest = float(np.abs(moved - base).max())
    relative = _norm(moved - base) / _norm(base)
    same = relative <= _SAME_DIRECTION_BF16 if bf16 else largest <= _SAME and relative <= _SAME_DIRECTION
    agrees = bool(same and abs(length - 1) <= _SAME_LENGTH)
    return {"largest": largest, "relative": relative, "length": length, "agrees": agrees}


def _norm(values: Vector) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))


def machine(device: str) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory),
        "platform": platform.platform(),
        "device": device,
    }
