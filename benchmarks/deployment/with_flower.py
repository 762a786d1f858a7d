"""Flower's deployment as a contestant: flower-superlink, a flower-supernode for each site, `flwr run` of flower_app.

A SuperLink gets the certificate that the other contestants' coordinator has, and speaks TLS. Flower has no mutual TLS:
SuperNodes sign their requests instead, also here. Between the processes of one site, which are on one machine, there is
no TLS, as its documentation allows. Otherwise: no telemetry, no look-up of newer versions, no installation of an app's
dependencies, state in memory, and defaults, which are the documented settings; large messages are cut without any.

A site of Flower is a SuperNode, a SuperExec and, for each message, a new process for the ClientApp: 200 MB, and 300 MB
at work. Most of a round of many sites is the start of processes. Where so many start at once that one takes longer than
a minute, its site gives it up and starts another one: on two busy cores, rounds of 25 sites ended, and of 50 did not.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

APP = Path(__file__).with_name("flower_app")
SITE_BYTES = 300_000_000  # of memory, with its ClientApp
LIMIT_S = 300.0
_POLL_S = 0.5
_COMMANDS = ("flwr", "flower-superlink", "flower-supernode")


class NoAnswer(Exception):
    """Flower has not answered in time."""


@dataclass(frozen=True, kw_only=True)
class Found:
    connected: float  # bytes that all connected sites add to the SuperLink
    seconds: list[float]  # of the rounds
    peak: float  # bytes of SuperLink and ServerApp, beyond those with all sites connected and no model


class Flower:
    """Flower in one environment. Raises ValueError if it is not there, or if so many sites do not fit in memory."""

    def __init__(self, python: Path, sites: int, folder: Path) -> None:
        self._bin = python.absolute().parent
        if missing := [name for name in _COMMANDS if not (self._bin / name).exists()]:
            raise ValueError(f"{self._bin} has no {missing[0]}; give the interpreter of an environment with Flower")
        room = _memory("/proc/meminfo", "MemAvailable:")
        if sites * SITE_BYTES > room:
            most = room // SITE_BYTES
            raise ValueError(
                f"{sites} sites of Flower need {sites * SITE_BYTES / 1e9:.0f} GB of memory, and {room / 1e9:.0f} GB "
                f"are free; let --flower-sites be {most} at most"
            )
        self.sites = sites
        asked = [str(python), "-c", "import importlib.metadata as m; print(m.version('flwr'))"]
        self.version = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
        self._folder = folder

    def measure(self, sites: int, size: int, rounds: int) -> Found:
        """Rounds with a model of `size` bytes; the first one is not told. Raises NoAnswer."""
        with Deployment(self._bin, self._folder / f"flower-{sites}-{size}") as deployment:
            deployment.start(sites)
            lines = deployment.run(sites=sites, parameters=size // 4, rounds=rounds + 1 if rounds else 0)
        first, *others = lines
        return Found(
            connected=first["superlink"] - deployment.alone,
            seconds=[line["seconds"] for line in others[1:]],
            peak=max((line["peak"] for line in others), default=first["both"]) - first["both"],
        )


class Deployment:
    """A SuperLink and its SuperNodes on loopback; none of their processes is left when the context ends."""

    def __init__(self, bin: Path, home: Path) -> None:
        self._bin = bin
        self._home = home
        own = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        self._environment = {**os.environ, **own, "PATH": f"{bin}:{os.environ['PATH']}"}
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Deployment":
        self._home.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        end_all(f"FLWR_HOME={self._home}")
        for process in self._started:
            process.wait()

    def start(self, sites: int) -> None:
        """Start it; SuperNodes connect in their own time."""
        for part, pem in json.loads((self._home.parent / "coordinator.json").read_text()).items():
            (self._home / part).write_text(pem)
        port, *ports = free_ports(1 + sites)
        root = str(self._home / "root")
        tls = ["--ssl-ca-certfile", root, "--ssl-certfile", self._home / "chain", "--ssl-keyfile", self._home / "key"]
        self._start("flower-superlink", *tls, "--port", port, "--disable-runtime-dependency-installation")
        address = f"127.0.0.1:{port}"
        connection = f"[superlink.here]\naddress = {json.dumps(address)}\nroot-certificates = {json.dumps(root)}\n"
        (self._home / "config.toml").write_text(connection)
        self._wait(partial(_listens, port))
        self.alone = _memory(f"/proc/{self._started[0].pid}/status", "VmRSS:")
        for site, own in enumerate(ports):
            node = ["--node-config", f"partition-id={site} num-partitions={sites}"]
            self._start("flower-supernode", "--root-certificates", root, "--superlink", address, "--port", own, *node)

    def run(self, *, rounds: int, **config: int) -> list[dict[str, float]]:
        """Run the app: what it has to say when all sites are connected, and of each round."""
        lines = self._home / "lines"
        values = {**config, "rounds": rounds, "superlink": self._started[0].pid, "lines": str(lines)}
        settings = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
        arguments = [str(self._bin / "flwr"), "run", str(APP), "here", "-c", settings]
        try:
            subprocess.run(arguments, env=self._environment, cwd=self._home, capture_output=True, check=True)
        except subprocess.CalledProcessError as error:
            print((error.stdout + error.stderr).decode(), file=sys.stderr)
            raise NoAnswer("flwr run failed") from error
        for number in range(1, rounds + 2):
            self._wait(partial(_has, lines, number))
        return [json.loads(line) for line in lines.read_text().splitlines()]

    def _start(self, command: str, *arguments: object) -> None:
        with (self._home / "log").open("ab") as log:
            started = subprocess.Popen(
                [str(self._bin / command), *map(str, arguments)],
                env=self._environment,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
            )
        self._started.append(started)

    def _wait(self, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + LIMIT_S
        while not ready():
            ended = any(process.poll() is not None for process in self._started)
            if ended or time.monotonic() > until:
                last = (self._home / "log").read_text(errors="replace").splitlines()[-20:]
                print("Flower's last lines:", *last, sep="\n", file=sys.stderr)
                raise NoAnswer("a process has ended" if ended else f"no answer within {LIMIT_S:.0f} s")
            time.sleep(_POLL_S)


def end_all(setting: str) -> None:
    """End every process that has NAME=VALUE in its environment, also those that others have started."""
    while left := having(setting):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def having(setting: str) -> list[int]:
    """Processes that have NAME=VALUE in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal() and setting.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def free_ports(number: int) -> list[int]:
    """So many ports of loopback that nobody has now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [int(one.getsockname()[1]) for one in sockets]


def _has(file: Path, lines: int) -> bool:
    return file.exists() and file.read_text().count("\n") >= lines


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def _memory(file: str, key: str) -> int:
    """Bytes."""
    found = Path(file).read_text().split()
    return 1024 * int(found[found.index(key) + 1])
