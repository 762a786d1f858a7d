"""`fedelta serve` and `fedelta join` as their users call them: processes of their own, over mutual TLS."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.cli.in_process import Fedelta, fedelta
from tests.ports import free_port

from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.departures import read

__all__ = ["fedelta"]  # a fixture

EXPERIMENT = '''
"""Two sites of three classes; the data of a site are read at that site alone."""
import os
import torch
from torch import nn
from fedelta import SGD, Classification, FedAvg, Federation, Task, Training

ROUNDS = 30
LR = 0.1
WIDTH = 6

def program():
    task = Task(model=lambda: nn.Linear(WIDTH, 3), objective=Classification(classes=3))
    training = Training(optimizer=SGD(lr=LR), batch=4)
    return Federation(algorithm=FedAvg(task=task, training=training), rounds=ROUNDS)

def rows(count, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=g)
    x = torch.randn(count, WIDTH, generator=g)
    x[torch.arange(count), y] += 2
    return x, y

def site(name):
    assert os.environ.get("MAY_READ", name) == name
    return rows(40, ord(name))

def sites():
    return ["a", "b"]

def test():
    return rows(60, 0)
'''
POLICY = """
[experiments]
digests = "any"
[work]
requests = ["train"]
rounds = 30
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


class Processes:
    """Commands of one experiment, each in a process of its own; what they print is in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []
        (folder / "experiment.py").write_text(EXPERIMENT)

    def __call__(self, log: str, *arguments: object, may_read: str = "") -> subprocess.Popen[bytes]:
        code = "from fedelta.cli.main import main; main()"
        with (self.folder / f"{log}.log").open("ab") as file:
            one = subprocess.Popen(
                [sys.executable, "-c", code, *map(str, arguments)],
                cwd=self.folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MAY_READ": may_read},
                stdout=file,
                stderr=file,
            )
        self.running.append(one)
        return one

    def said(self, log: str) -> str:
        return (self.folder / f"{log}.log").read_text()

    def until(self, log: str, text: str) -> None:
        for _ in range(30000):
            if (self.folder / f"{log}.log").exists() and text in self.said(log):
                return
            time.sleep(0.01)
        raise AssertionError(self.said(log))

    def end(self) -> None:
        for one in self.running:
            one.kill()
            one.wait()


@pytest.fixture(autouse=True)
def folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.end()


@pytest.mark.slow
def test_a_run_whose_coordinator_and_a_site_are_killed_ends_with_the_bits_of_a_simulation(
    processes: Processes, fedelta: Fedelta
) -> None:
    folder, port = processes.folder, free_port()
    authority = CertificateAuthority.create(folder / "ca")
    for name in ("a", "b"):
        authority.issue(name, out=folder / name)
    authority.issue("coordinator", hosts=["127.0.0.1"], out=folder / "coordinator")
    serve = ["serve", "experiment.py", "--listen", f"127.0.0.1:{port}", "--certificates", "coordinator", "--out", "run"]
    serve += ["--revoked", "ca/revoked.crl"]
    coordinator = processes("serve", *serve)
    join = ["join", "experiment.py", "--at", f"127.0.0.1:{port}", "--certificates"]
    (folder / "policy.toml").write_text(POLICY)
    guarded = [*join, "a", "--policy", "policy.toml"]
    sites = {"a": processes("a", *guarded, may_read="a"), "b": processes("b", *join, "b", may_read="b")}
    rounds = folder / "run" / "rounds.jsonl"
    while not rounds.exists() or rounds.read_bytes().count(b"\n") < 3:
        assert coordinator.poll() is None, processes.said("serve")
        time.sleep(0.002)
    for one in (coordinator, sites["b"]):
        one.send_signal(signal.SIGKILL)
        one.wait()
    done = rounds.read_bytes().count(b"\n")
    coordinator = processes("serve", *serve, "--resume")
    processes.until("serve", "Waiting for sites")
    again = processes("b", *join, "b", may_read="b")
    assert coordinator.wait(300) == 0, processes.said("serve")
    assert sites["a"].wait(300) == again.wait(300) == 0
    assert "a: the run is over" in processes.said("a")
    assert "Resumed after round" in processes.said("serve")
    reports = [json.loads(line) for line in rounds.read_text().splitlines()]
    assert [report["round"] for report in reports] == list(range(1, 31))
    assert done < 30
    assert not any(report["absent"] for report in reports)
    for name in ("a", "b"):  # one with a policy, and one without
        left = [line.entry for line in read(folder / "joined" / name / "departures.jsonl")]
        assert {entry.round for entry in left if entry.op == "train"} == {*range(1, 31)}
    options: list[Any] = ["--plan", "plain", "--workers", 0, "--out", folder / "here"]
    fedelta("run", folder / "experiment.py", *options)
    here, there = load_file(folder / "here" / "model.safetensors"), load_file(folder / "run" / "model.safetensors")
    assert here.keys() == there.keys()
    assert all(here[name].equal(there[name]) for name in here)
    for name in ("a", "b"):
        (model,) = (folder / "joined" / name).rglob("model.safetensors")
        assert model.read_bytes() == (folder / "run" / "model.safetensors").read_bytes()
        assert f"{name}: the model is in {model.relative_to(folder)}." in processes.said(name)


@pytest.mark.parametrize(("strict", "what"), [("serve", "a reply"), ("join", "a broadcast")])
def test_a_message_beyond_the_limit_is_refused_with_the_option_that_raises_it(
    processes: Processes, strict: str, what: str
) -> None:
    port, limit = free_port(), ["--largest-message", 1]
    experiment = ["experiment.py", "--insecure", "--set", "WIDTH=100_000"]
    serve = ["serve", *experiment, "--listen", f"127.0.0.1:{port}", "--sites", "a"]
    processes("serve", *serve, *(limit if strict == "serve" else []))
    processes.until("serve", "Listening")
    join = ["join", *experiment, "--at", f"127.0.0.1:{port}", "--name", "a"]
    processes("join", *join, *(limit if strict == "join" else []), may_read="a")
    processes.until(strict, "; where that is too little, raise --largest-message")
    assert re.search(rf"{what} of 12\d{{5}} bytes is announced, and at most 1048576 are taken", processes.said(strict))


def test_a_site_with_another_experiment_is_told_so(processes: Processes) -> None:
    port = free_port()
    processes("serve", "serve", "experiment.py", "--listen", f"127.0.0.1:{port}", "--insecure")
    processes.until("serve", "Listening")
    join = ["join", "experiment.py", "--at", f"127.0.0.1:{port}", "--insecure", "--set", "LR=0.2"]
    other = processes("other", *join, "--name", "a")
    stranger = processes("stranger", *join, "--name", "c")
    assert other.wait(300) == stranger.wait(300) == 2
    assert "fedelta: a has another experiment" in processes.said("other")
    assert "'c' is not a registered site" in processes.said("stranger")
    assert "another experiment" in processes.said("serve")
    assert "any process of this machine may take part" in processes.said("serve")


def test_as_json_each_round_is_a_record_and_for_people_it_is_not_told_twice(processes: Processes) -> None:
    for form in ("json", "text"):
        port = free_port()
        common = ["experiment.py", "--insecure", "--log", form, "--set", "ROUNDS=3"]
        listen = ["--listen", f"127.0.0.1:{port}", "--out", form]
        coordinator = processes(form, "serve", *common, *listen)
        join = ["join", *common, "--at", f"127.0.0.1:{port}", "--name"]
        sites = [processes(name, *join, name, may_read=name) for name in ("a", "b")]
        assert coordinator.wait(300) == 0, processes.said(form)
        assert [one.wait(300) for one in sites] == [0, 0]  # their folders are free again
    told = [json.loads(line) for line in processes.said("json").splitlines() if line.startswith("{")]
    rounds = [one for one in told if one.get("event") == "round"]
    run = json.loads((processes.folder / "json" / "manifest.json").read_text())["run"]
    reports = [json.loads(line) for line in (processes.folder / "json" / "rounds.jsonl").read_text().splitlines()]
    assert [one["metrics"] for one in rounds] == [report["metrics"] for report in reports]
    for number, one in enumerate(rounds, start=1):
        assert (one["level"], one["job"], one["round"]) == ("INFO", run, number)
        assert (sorted(one["answered"]), one["absent"]) == (["a", "b"], {})
    assert "is over: 2 of 2" not in processes.said("text")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_it_is_told_once_how_to_go_on(processes: Processes, how: signal.Signals) -> None:
    port = free_port()
    serve = processes("serve", "serve", "experiment.py", "--listen", f"127.0.0.1:{port}", "--insecure", "--out", "run")
    join = processes("join", "join", "experiment.py", "--at", f"127.0.0.1:{port}", "--insecure", "--name", "a")
    processes.until("serve", "site a has joined")
    for log, one in (("join", join), ("serve", serve)):
        one.send_signal(how)
        assert one.wait(300) == 130
        assert processes.said(log).lower().count("interrupted") == 1, processes.said(log)
    assert "0 rounds are kept. Continue with:\n  fedelta serve" in processes.said("serve")


def test_on_a_terminal_what_happens_stands_above_the_progress(processes: Processes) -> None:
    port, (ours, theirs) = free_port(), pty.openpty()
    code = "from fedelta.cli.main import main; main()"
    serve = ["serve", "experiment.py", "--insecure", "--listen", f"127.0.0.1:{port}", "--out", "run"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    serving = subprocess.Popen(
        [sys.executable, "-c", code, *serve], cwd=processes.folder, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    processes.running.append(serving)
    processes("a", "join", "experiment.py", "--at", f"127.0.0.1:{port}", "--insecure", "--name", "a")
    screen = b""
    while b"Waiting for sites: 1 of at least 2" not in screen:
        screen += os.read(ours, 4096)  # raises where the process has ended
    os.close(ours)
    plain = re.sub(rb"\x1b\[[0-9;]*m", b"", screen)  # without colours
    assert b"site a has joined" in plain
    assert not re.search(rb"waiting for the first round(Waiting|\d)", plain), plain


def test_options_that_do_not_go_together_are_refused(fedelta: Fedelta, tmp_path: Path) -> None:
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT)
    out, strict = ["--out", tmp_path / "run"], tmp_path / "policy.toml"
    strict.write_text(POLICY.replace("rounds = 30", "rounds = 3"))
    for arguments, why in [
        (["serve", file], "give --certificates"),
        (["join", file, "--at", "127.0.0.1:1", "--insecure"], "needs --name"),
        (["serve", file, "--insecure", "--listen", "0.0.0.0:0", *out], "without TLS"),
        (["serve", file, "--insecure", "--listen", "127.0.0.1:70000", *out], "no port 70000 in '127.0.0.1:70000'"),
        (["serve", file, "--insecure", "--listen", "127.0.0.1", *out], "is not HOST:PORT, such as"),
        (["join", file, "--at", "127.0.0.1:65536", "--insecure", "--name", "a"], "they are from 1 to 65535"),
        (["join", file, "--at", "127.0.0.1:0", "--insecure", "--name", "a"], "they are from 1 to 65535"),
        (["serve", file, "--insecure", "--min-sites", 3, *out], "--min-sites 3 is more than the 2 sites"),
        (["serve", file, "--insecure", "--enough", 3, *out], "--enough 3 is more than the 2 sites"),
        (["serve", file, "--insecure", "--sites", "a,,b", *out], "distinct names"),
        (["join", file, "--at", "example.org:1", "--insecure", "--name", "a"], "without TLS"),
        (
            ["join", file, "--at", "127.0.0.1:1", "--insecure", "--name", "a", "--policy", strict],
            "refuses the experiment",
        ),
        (["serve", file, "--certificates", tmp_path], "ca.pem cannot be read"),
    ]:
        assert why in fedelta(*arguments, status=2)
    assert not (tmp_path / "run").exists()  # of which a second try would say that it is there already
