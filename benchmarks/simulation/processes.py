"""Contestants as processes: one each, fresh at the start and warm from then on; one works at a time."""

import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SAMPLE_S = 0.05
_PATIENCE_S = 5.0


class Missing(Exception):
    """A contestant cannot take part: what it needs is not installed."""


class Failed(Exception):
    """A contestant failed or took too long."""


class Process:
    """The process of one contestant; what it prints goes to `log`."""

    def __init__(self, name: str, python: str, device: str, cores: int, log: Path) -> None:
        self.name = name
        self._log = log
        arguments = [python, "-m", "benchmarks.simulation.worker", name, device, str(cores)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

    def ask(self, timeout_s: float, *, watch: bool = False, **order: Any) -> dict[str, Any]:
        """The answer to an order, with "peak_mb" if `watch`: the largest memory of the process and its descendants.

        Memory is looked at every 50 ms, which disturbs: not to be used where time is measured. Raises Missing, Failed.
        """
        reading, writing = self._process.stdout, self._process.stdin
        assert reading is not None
        assert writing is not None
        with suppress(BrokenPipeError):
            writing.write(json.dumps(order).encode() + b"\n")
            writing.flush()
        peak = waited = 0.0
        wait = _SAMPLE_S if watch else 1.0
        while not select.select([reading], [], [], wait)[0]:
            waited += wait
            if waited > timeout_s:
                raise Failed(f"{self.name} gave no answer within {timeout_s:g} s; its output is in {self._log}")
            if watch:
                peak = max(peak, memory_mb(self._process.pid))
        line = reading.readline()
        if not line:
            raise Failed(f"{self.name} ended (exit code {self._process.wait()}); its output is in {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Missing(answer["error"]) if answer["missing"] else Failed(f"{self.name}: {answer['error']}")
        return answer | ({"peak_mb": peak} if watch else {})

    def stop(self) -> None:
        """End the process and what it started."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session is its own
        self._process.wait()


def memory_mb(pid: int) -> float:
    """Memory of a process and its descendants in MB, shared pages once (proportional set size); 0 if it has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    except OSError:
        return 0.0
    own = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return own * 1024 / 1e6 + sum(memory_mb(child) for child in children)


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:
        return []
