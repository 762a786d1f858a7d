"""Processes that can be killed and are there again within milliseconds: forks of one that has imported everything.

`python -m tests.fleet.chaos_processes` is that one. It has a single thread and no stream of gRPC, so that a fork of it
can do all that a new process can. It takes orders as lines of JSON, and ends, with all that it has forked, when nobody
gives any more.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUICK = {"check_s": 0.3, "stall_s": 4.0, "keepalive_s": 6.0}  # of Limits: what would take minutes
HASTE = {"first_pause_s": 0.05, "longest_pause_s": 0.3, "connect_s": 10.0, "keepalive_s": 6.0}  # of Patience


class Processes:
    """The driver's side. Each process has a name; what it prints is added to NAME.log in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.fleet.chaos_processes"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.running: dict[str, int] = {}
        self.kills = 0

    def start(self, name: str, *command: object) -> int:
        """`command` is "fedelta" or "rogues", and its arguments."""
        order = {"command": [str(part) for part in command], "log": str(self.folder / f"{name}.log")}
        self.running[name] = pid = self._ask(order | {"folder": str(self.folder)})
        return pid

    def kill(self, name: str) -> None:
        """With SIGKILL; returns once it is gone."""
        self.kills += 1
        self._ask({"kill": self.running.pop(name)})

    def signal(self, name: str, number: int) -> None:
        os.kill(self.running[name], number)

    def ended(self) -> dict[str, int]:
        """Those that have ended by themselves since the last call, with their exit code."""
        names = {pid: name for name, pid in self.running.items()}
        found = {names[pid]: code for pid, code in self._ask({"reap": True})}
        for name in found:
            del self.running[name]
        return found

    def said(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait(120)
        self._parent.stdout.close()

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())


def main() -> None:
    import tests.fleet.chaos_rogues  # noqa: F401

    children: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "kill" in order:
            pid = order["kill"]
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            children.discard(pid)
            answer: Any = None
        elif "reap" in order:
            answer = []
            for pid in sorted(children):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    children.discard(pid)
                    answer.append((pid, os.waitstatus_to_exitcode(status)))
        else:
            answer = os.fork()
            if answer == 0:
                _be(order["command"], order["log"], order["folder"])
            children.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _be(command: Sequence[str], log: str, folder: str) -> None:
    """Become one of the processes; never returns."""
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(out, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        _make_haste()
        sys.argv = list(command)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        try:
            if command[0] == "fedelta":
                from fedelta.cli.main import main as become
            else:
                from tests.fleet.chaos_rogues import main as become
            become(list(command[1:]))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _make_haste() -> None:
    """The command line leaves some times as they are: minutes, where a test has seconds."""
    from fedelta.fleet.limits import Limits
    from fedelta.fleet.member import Member, Patience

    defaults: Any = (Limits.__init__.__kwdefaults__, Member.__init__.__kwdefaults__)  # type: ignore[attr-defined]
    defaults[0].update(QUICK)
    defaults[1].update(patience=Patience(**HASTE))


if __name__ == "__main__":
    main()
