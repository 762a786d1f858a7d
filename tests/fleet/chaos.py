"""A run between a coordinator and its sites, to which everything happens: `python -m tests.fleet.chaos --help`.

Processes over mutual TLS on a loopback address: `fedelta serve`, twenty times `fedelta join`, and one with sites and
strangers that send what they must not (chaos_rogues.py). Sites and the coordinator are killed and started again, or
stopped for a while, certificates expire and are revoked. What happens when is drawn from a seed, and follows the
rounds that are committed, not the clock. chaos_checks.py says what has to hold all the same.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.fleet.chaos_checks import check
from tests.fleet.chaos_experiment import HONEST, ROGUES
from tests.fleet.chaos_processes import Processes
from tests.ports import free_port

from fedelta.core import codec
from fedelta.fleet.certificates import CertificateAuthority

REVOKED, EXPIRING, GUARDED = "h18", "h19", HONEST[:3]
STILL_S = 4.5  # of a coordinator that is stopped: longer than the deadline of those whom it has asked
FAREWELL_S = 60  # after which whoever is still there has not heard of the end
LIFE_S = 35  # of the certificate that expires while its site is connected
POLICY = """
[experiments]
digests = "any"
[work]
requests = ["train"]
rounds = 1000000
[leaves]
tensors = "any"
parameters = 21
bytes_per_reply = 10000
bytes_per_round = "any"
bytes_per_day = "any"
[privacy]
unit = "any"
epsilon = "any"
delta = "any"
noise = "any"
[secure]
collect = "any"
identities = false
least = 1
[hours]
zone = "UTC"
open = "any"
"""


@dataclass
class Watched:
    """What the driver has seen of the run, for the checks."""

    rounds: int
    seed: int
    folder: Path
    committed: dict[int, bytes] = field(default_factory=dict)  # lines of rounds that were committed when we looked
    torn: set[int] = field(default_factory=set)  # rounds in which the coordinator was killed or stopped
    memory: list[list[tuple[int, int, int]]] = field(default_factory=list)  # a coordinator: round, RSS, peak; in kB
    given: dict[str, list[int]] = field(default_factory=dict)
    exits: list[tuple[str, int]] = field(default_factory=list)  # of processes that nobody had killed
    left: list[str] = field(default_factory=list)  # who did not hear of the end
    kills: int = 0
    seconds: float = 0.0

    def said(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""


class Chaos:
    """One run; `run` returns what was seen of it."""

    def __init__(self, folder: Path, seed: int, rounds: int, limit_s: float, tell: Callable[[str], None]) -> None:
        self.seen = Watched(rounds=rounds, seed=seed, folder=folder)
        self._folder, self._limit_s, self._tell = folder, limit_s, tell
        self._rng = random.Random(seed)
        self._at = f"127.0.0.1:{free_port()}"
        self._later: list[tuple[float, Callable[[], None]]] = []  # moment of the monotonic clock, what then
        self._read = 0  # bytes of rounds.jsonl
        self._round = 0
        self._stopped: dict[str, int] = {}  # site -> round in which it goes on
        self._events = self._schedule()
        self._authority = self._certificates()
        self._processes = Processes(folder)

    def _schedule(self) -> dict[int, list[tuple[str, str]]]:
        """Round -> what happens after it. The last quarter has one coordinator, whose memory is looked at."""
        rng, rounds = self._rng, self.seen.rounds
        found: dict[int, list[tuple[str, str]]] = {}

        def add(round: int, what: str, whom: str = "") -> None:
            found.setdefault(round, []).append((what, whom))

        for _ in range(max(5, rounds // 40)):
            add(rng.randrange(2, rounds * 3 // 5), "kill the coordinator")
        for _ in range(max(2, rounds // 100)):
            add(rng.randrange(2, rounds * 3 // 5), "stop the coordinator")
        for _ in range(rounds // 4):
            add(rng.randrange(1, rounds - 12), "kill", rng.choice(HONEST[:18]))
        for _ in range(max(3, rounds // 66)):
            add(rng.randrange(1, rounds - 12), "stop", rng.choice(HONEST[:18]))
        add(rng.randrange(rounds // 3, rounds // 2), "revoke", REVOKED)
        add(rounds * 3 // 5 + 2, "outlast the certificate")  # later than all that kills the coordinator
        return found

    def _certificates(self) -> CertificateAuthority:
        authority = CertificateAuthority.create(self._folder / "ca", name="authority")
        now = datetime.now(UTC)
        self._expires = time.monotonic() + LIFE_S
        for name in (*HONEST, *ROGUES):
            soon = now - timedelta(days=1) + timedelta(seconds=LIFE_S)
            authority.issue(name, self._folder / name, days=1, start=soon if name == EXPIRING else None)
        authority.issue("r0", self._folder / "expired", renew=True, days=1, start=now - timedelta(days=3))
        authority.issue("coordinator", self._folder / "coordinator", hosts=["127.0.0.1"], days=1)
        other = CertificateAuthority.create(self._folder / "other-ca", name="authority")
        other.issue("r0", self._folder / "other", days=1)
        (self._folder / "other" / "ca.pem").write_bytes((self._folder / "ca" / "ca.pem").read_bytes())
        (self._folder / "experiment.py").write_text(Path(__file__).with_name("chaos_experiment.py").read_text())
        (self._folder / "policy.toml").write_text(POLICY)
        return authority

    def run(self) -> Watched:
        began = time.monotonic()
        try:
            self._serve()
            for name in HONEST:
                self._join(name)
            seen = self.seen
            self._processes.start("rogues", "rogues", self._at, seen.seed, seen.rounds, *ROGUES)
            while self._processes.running:
                if time.monotonic() - began > self._limit_s:
                    raise AssertionError(f"round {self._round} after {self._limit_s:g} s\n" + self._tail("serve"))
                self._look()
                time.sleep(0.02)
        finally:
            self.seen.kills, self.seen.seconds = self._processes.kills, time.monotonic() - began
            self._processes.close()
        return self.seen

    def _look(self) -> None:
        """What is new since the last time, and what is due."""
        now = time.monotonic()
        due = [what for at, what in self._later if at <= now]
        self._later = [item for item in self._later if item[0] > now]
        for what in due:
            what()
        for name, code in self._processes.ended().items():
            self.seen.exits.append((name, code))
            self._stopped.pop(name, None)
            if name == "serve" and code:
                raise AssertionError(f"the coordinator ended with status {code}\n{self._tail('serve')}")
            if name == "serve":
                for stopped in list(self._stopped):
                    self._go_on(stopped)
                self._later.append((now + FAREWELL_S, self._end))
        for round in self._new_rounds():
            self._note(round)
            for what, whom in self._events.pop(round, []):
                self._do(what, whom)
            for name, until in list(self._stopped.items()):
                if round >= until:
                    self._go_on(name)

    def _new_rounds(self) -> list[int]:
        path = self._folder / "run" / "rounds.jsonl"
        if not path.exists():
            return []
        size = path.stat().st_size
        if size < self._read:  # rounds that were not committed were cut off
            self._read = 0
        with path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        self._read += sum(map(len, lines))
        found = [round for line in lines if (round := int(json.loads(line)["round"])) > self._round]
        self._round = max([self._round, *found])
        return found

    def _note(self, round: int) -> None:
        self._tell(f"round {round}: {self._processes.kills} killed, {len(self._stopped)} stopped")
        pid = self._processes.running.get("serve")
        if pid is not None:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            numbers = [int(status[key].split()[0]) for key in ("VmRSS", "VmHWM") if key in status]
            if len(numbers) == 2:
                self.seen.memory[-1].append((round, *numbers))
        for name in HONEST:
            for path in (self._folder / "joined" / name).glob("*/given.json"):
                self.seen.given.setdefault(name, []).append(json.loads(path.read_bytes())["train"])

    def _do(self, what: str, whom: str) -> None:
        soon = time.monotonic() + self._rng.random() * 0.3
        if what == "kill the coordinator":
            self._later.append((soon, self._kill_coordinator))
        elif what == "stop the coordinator":
            self._stop_coordinator(soon + STILL_S)
        elif what == "outlast the certificate":  # on a machine so fast that the run would be over before
            self._stop_coordinator(max(soon, self._expires + 1.0))
        elif what == "kill":
            self._later.append((soon, lambda: self._kill(whom)))
        elif what == "stop" and whom not in self._stopped and whom in self._processes.running:
            self._processes.signal(whom, signal.SIGSTOP)
            self._stopped[whom] = self._round + 2
        elif what == "revoke":
            self._authority.revoke(whom)

    def _kill(self, name: str) -> None:
        if name in self._processes.running and name not in self._stopped:
            self._processes.kill(name)
            self._join(name)

    def _kill_coordinator(self) -> None:
        if "serve" not in self._processes.running:
            return
        self._processes.kill("serve")
        self._new_rounds()
        self.seen.torn |= {self._round + more for more in range(-1, 4)}
        state, rounds = self._folder / "run" / "state.safetensors", self._folder / "run" / "rounds.jsonl"
        if state.exists():
            meta: Any = codec.decode(state.read_bytes())[1]
            lines = rounds.read_bytes()[: meta["meta"]["bytes"]].splitlines()
            self.seen.committed |= {int(json.loads(line)["round"]): line for line in lines}
        self._serve("--resume")

    def _stop_coordinator(self, until: float) -> None:
        if "serve" in self._processes.running:
            pid = self._processes.running["serve"]
            self._processes.signal("serve", signal.SIGSTOP)
            self.seen.torn |= {self._round + more for more in range(4)}
            self._later.append((until, lambda: self._wake_coordinator(pid)))

    def _wake_coordinator(self, pid: int) -> None:
        if self._processes.running.get("serve") == pid:
            self._processes.signal("serve", signal.SIGCONT)

    def _serve(self, *more: str) -> None:
        self.seen.memory.append([])
        self._processes.start(
            "serve",
            *("fedelta", "serve", "experiment.py", "--listen", self._at, "--certificates", "coordinator"),
            *("--revoked", "ca/revoked.crl", "--out", "run", "--min-sites", "14", "--rounds", self.seen.rounds),
            *("--deadline", "4", "--absence", "2", *more),
        )

    def _join(self, name: str) -> None:
        policy = ("--policy", "policy.toml") if name in GUARDED else ()
        join = ("fedelta", "join", "experiment.py", "--at", self._at, "--certificates", name)
        self._processes.start(name, *join, *policy)

    def _end(self) -> None:
        """Of those who had no stream when the run ended, and were told nothing."""
        for name in list(self._processes.running):
            if name != "rogues":
                self.seen.left.append(name)
            self._processes.kill(name)

    def _go_on(self, name: str) -> None:
        del self._stopped[name]
        if name in self._processes.running:
            self._processes.signal(name, signal.SIGCONT)

    def _tail(self, name: str) -> str:
        return "\n".join(self._processes.said(name).splitlines()[-60:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="an empty one, which is kept; otherwise one that is removed")
    arguments = parser.parse_args()

    def tell(line: str) -> None:
        print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        seen = Chaos(folder.resolve(), arguments.seed, arguments.rounds, float("inf"), tell).run()
        print(f"\n{check(seen)}")


if __name__ == "__main__":
    main()
