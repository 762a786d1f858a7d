"""The parties of the consortium, each in a folder that stands for a machine, and the commands that they type."""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = {  # as the experiment has them; to import it takes seconds, and a wrong option should be told at once
    "cleveland": ["processed.cleveland.data"],
    "hungary": ["processed.hungarian.data"],
    "switzerland": ["processed.switzerland.data", "processed.va.data"],
}
NOBODY = "0" * 64  # what stands for the digest of the experiment in a policy that is to name it
_FEDELTA = [sys.executable, "-c", "from fedelta.cli.main import main; main()"]
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 120.0  # that a process may take until it says what is waited for


class Failed(Exception):
    """A command did not do what it should; the message is for whoever started all this."""


def say(text: str = "") -> None:
    print(text, flush=True)


def parsed(about: str) -> argparse.Namespace:
    """`data` and `out` of the command line."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with the heart disease records")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to be made; a folder of each party")
    found = parser.parse_args()
    found.data, found.out = found.data.resolve(), found.out.resolve()
    return found


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong within ends the process: with a sentence and status 1, or 130 after Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except Failed as error:
        sys.exit(f"consortium: {error}")
    except KeyboardInterrupt:
        print("consortium: interrupted; all that was started has ended", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM within count when it is over."""
    came = list[int]()
    before = {one: signal.signal(one, lambda number, _frame: came.append(number)) for one in _SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if came:
        raise KeyboardInterrupt


@dataclass
class Party:
    """Somebody with a machine: `folder`, and `before`, which is put before commands that use the network."""

    name: str
    folder: Path
    before: Sequence[str] = ()
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *words: str, status: int = 0, show: bool = True) -> str:
        """A command to its end, and what it printed. Raises Failed if it ends with another status."""
        self._tell(words)
        done = subprocess.run(
            _command(words),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        if show and done.stdout:
            say(_indented(done.stdout))
        if done.returncode != status:
            raise Failed(f"{shlex.join(words)} ended with status {done.returncode}:\n{done.stdout}")
        return done.stdout

    def start(self, log: str, *words: str) -> subprocess.Popen[bytes]:
        """A command that goes on; what it prints is in the file `log`."""
        self._tell([*words, "&"])
        with (self.folder / log).open("ab") as file, _uninterrupted():  # or nobody knew of the process
            one = subprocess.Popen(
                [*self.before, *_command(words)], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
            self.running.append(one)
        return one

    def give(self, files: Sequence[str], to: "Party", where: str = ".") -> None:
        """Hand files over, as a message would."""
        goal = to.folder / where
        goal.mkdir(parents=True, exist_ok=True)
        self.run("cp", *files, os.path.relpath(goal, self.folder))

    def publish(self, file: str, parties: Sequence["Party"], where: str) -> None:
        """Hand a file over to all of them, this one, too."""
        for party in parties:
            (party.folder / where).mkdir(exist_ok=True)
        names = " ".join(party.name for party in parties)
        script = f"for party in {names}; do cp {file} ../$party/{where}; done"
        say(f"{self.name}$ {script}")
        subprocess.run(["sh", "-c", script], cwd=self.folder, check=True)

    def end(self) -> None:
        """Whatever still runs."""
        for one in self.running:
            if one.poll() is None:
                one.kill()
        for one in self.running:
            one.wait()

    def _tell(self, words: Sequence[str]) -> None:
        say(f"{self.name}$ {' '.join(word if word == '&' else shlex.quote(word) for word in words)}")


def _command(words: Sequence[str]) -> list[str]:
    return [*_FEDELTA, *words[1:]] if words[0] == "fedelta" else [*words]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


@dataclass
class Consortium:
    """An authority, a coordinator, and the hospitals."""

    out: Path
    authority: Party
    coordinator: Party
    hospitals: dict[str, Party]
    digest: str = ""  # of the experiment, as each hospital has found it

    @classmethod
    def at(cls, out: Path, data: Path) -> "Consortium":
        """In a new folder, with the records in `data`. Raises Failed if something is there, or the records are not."""
        for file in (file for files in FILES.values() for file in files):
            if not (data / file).is_file():
                raise Failed(
                    f"there is no file {data / file}; --data names a folder with the processed files of the UCI heart "
                    "disease data (https://archive.ics.uci.edu/dataset/45)"
                )
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise Failed(f"{out} is there already; give another --out, or remove it")
        names = ["authority", "coordinator", *FILES]
        for name in names:
            (out / name).mkdir(parents=True)
        parties = {name: Party(name, out / name) for name in names}
        return cls(out, parties["authority"], parties["coordinator"], {name: parties[name] for name in FILES})

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Within it processes may run; none does after it."""
        try:
            yield
        finally:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is to be cleared away is little
            for party in (*self.hospitals.values(), self.coordinator):
                party.end()
            signal.signal(signal.SIGINT, before)

    def bring(self, data: Path) -> None:
        """Each hospital has its own records, and everybody the experiment."""
        for name, files in FILES.items():
            for file in files:
                shutil.copy(data / file, self.hospitals[name].folder)
            shutil.copy(HERE / "policies" / f"{name}.toml", self.hospitals[name].folder / "policy.toml")
        for party in (self.coordinator, *self.hospitals.values()):
            shutil.copy(HERE / "experiment.py", party.folder)

    def certify(self, hosts: Sequence[str]) -> None:
        """Keys, certificates and identities, as organisations would exchange them."""
        authority, coordinator = self.authority, self.coordinator
        authority.run("fedelta", "ca", "init", "--name", "Heart consortium")
        options = [word for host in hosts for word in ("--host", host)]
        authority.run("fedelta", "ca", "issue", "coordinator", *options, show=False)
        files = [f"coordinator/{file}" for file in ("certificate.pem", "private.key", "ca.pem")]
        authority.give([*files, "ca/revoked.crl"], coordinator, "certificates")
        for name, hospital in self.hospitals.items():
            hospital.run("fedelta", "ca", "request", name, "--out", "certificates", show=False)
            hospital.give([f"certificates/{name}.csr"], authority)
            authority.run("fedelta", "ca", "issue", name, "--request", f"{name}.csr", show=False)
            authority.give([f"{name}/certificate.pem", f"{name}/ca.pem"], hospital, "certificates")
        parties = (coordinator, *self.hospitals.values())
        for name, hospital in self.hospitals.items():
            hospital.publish(f"certificates/{name}.pub", parties, "identities")

    def agree(self) -> None:
        """Each hospital looks at what would leave it, and writes the digest into its policy. Raises Failed."""
        look = ("fedelta", "join", "experiment.py", "--dry-run", "--certificates", "certificates")
        looking = {name: hospital.start("dry-run.log", *look) for name, hospital in self.hospitals.items()}
        found = {}
        for name, hospital in self.hospitals.items():
            if looking[name].wait():
                raise Failed(f"the dry run of {name} failed: {(hospital.folder / 'dry-run.log').read_text()}")
            printed = (hospital.folder / "dry-run.log").read_text()
            found[name] = re.findall(r"^experiment +([0-9a-f]{64})", printed, re.MULTILINE)[0]
        say(_indented(printed))
        if len(set(found.values())) > 1:
            raise Failed(f"the hospitals do not have the same experiment: {found}")
        for name, hospital in self.hospitals.items():
            policy = hospital.folder / "policy.toml"
            policy.write_text(policy.read_text().replace(NOBODY, found[name]))
        (self.digest,) = set(found.values())

    def serve(self, host: str, *more: str, port: int = 0) -> str:
        """Start the coordinator; where it listens."""
        words = ("fedelta", "serve", "experiment.py", "--listen", f"{host}:{port}", "--certificates", "certificates")
        one = self.coordinator.start(
            "serve.log", *words, "--revoked", "certificates/revoked.crl", "--out", "run", *more
        )
        log = self.coordinator.folder / "serve.log"
        until = time.monotonic() + _PATIENCE_S
        while not (found := re.search(r"Listening at (\S+) ", log.read_text())):
            if one.poll() is not None or time.monotonic() > until:
                raise Failed(f"the coordinator does not listen: {log.read_text()}")
            time.sleep(0.1)
        return found[1]

    def join(self, name: str, at: str, *more: str) -> subprocess.Popen[bytes]:
        words = ("fedelta", "join", "experiment.py", "--at", at, "--certificates", "certificates")
        return self.hospitals[name].start("join.log", *words, "--policy", "policy.toml", *more)

    def finish(self) -> None:
        """Wait for the end of the run. Raises Failed as soon as a party has failed."""
        parties = (self.coordinator, *self.hospitals.values())
        while any(party.running[-1].poll() is None for party in parties):
            self.check()
            time.sleep(0.1)
        self.check()

    def check(self) -> None:
        """Raises Failed if a party has."""
        for party in (self.coordinator, *self.hospitals.values()):
            if party.running[-1].poll():
                log = party.folder / ("serve.log" if party is self.coordinator else "join.log")
                raise Failed(f"{party.name} ended with an error:\n{log.read_text()}")

    def same(self, data: Path) -> None:
        """Raises Failed unless a simulation in the clear gives the very model that the consortium has."""
        everybody = Party("everybody", self.out / "everybody")
        everybody.folder.mkdir()
        shutil.copy(HERE / "experiment.py", everybody.folder)
        options = ["--set", "COLLECT=clear", "--set", f"DATA={data}", "--plan", "plain", "--workers", "0"]
        everybody.run("fedelta", "run", "experiment.py", *options, "--out", "simulation", show=False)
        here = everybody.run("sha256sum", "simulation/model.safetensors")
        there = self.coordinator.run("sha256sum", "run/model.safetensors")
        if here.split()[0] != there.split()[0]:
            raise Failed("the simulation has another model than the consortium")
