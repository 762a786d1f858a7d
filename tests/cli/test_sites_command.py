"""`fedelta sites`, and a site that sends NaN: put in quarantine by its coordinator, and readmitted by an operator."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.cli.in_process import Fedelta, fedelta
from tests.cli.test_serve import EXPERIMENT, Processes
from tests.ports import free_port

from fedelta.cli.deployment import loaded
from fedelta.core.digest import digest
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.known_sites import Turns
from fedelta.fleet.registry import DATABASE, Registry
from fedelta.fleet.wire import METHOD, PROTOCOL, frame, parse
from fedelta.observe.folder import read_run

__all__ = ["fedelta"]  # a fixture

SPOILING = """
from dataclasses import replace
from fedelta.cli.main import main
from fedelta.fleet import working
honest = working.answer
def answer(program, request, site):
    reply = honest(program, request, site)
    return replace(reply, body={name: x * float("nan") if x.numel() > 1 else x for name, x in reply.body.items()})
working.answer = answer
main()
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    (tmp_path / "experiment.py").write_text(EXPERIMENT.replace("ROUNDS = 30", "ROUNDS = 100000"))
    yield found
    found.end()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has ended, with a site in quarantine and one that never came."""
    with Registry(tmp_path / DATABASE, quarantine_after=2) as registry:
        registry.begin(["a", "[red]b", "c"])
        registry.joined("a", b"")
        registry.joined("[red]b", b"")
        for number in (1, 2):
            absent = {"[red]b": "its value is [NaN]", "c": "it has not been connected for 60 s"}
            registry.committed(Turns(number=number, counted=["a"], absent=absent, refused=["[red]b"]))
    return tmp_path


def spoiling(processes: Processes, log: str, *arguments: str) -> subprocess.Popen[bytes]:
    """As `processes`, of a site whose every value is NaN."""
    with (processes.folder / f"{log}.log").open("ab") as file:
        one = subprocess.Popen(
            [sys.executable, "-c", SPOILING, *arguments], cwd=processes.folder, stdout=file, stderr=file
        )
    processes.running.append(one)
    return one


def sites(folder: Path) -> dict[str, dict[str, object]]:
    """As the operator sees them, from a process of its own: a lock is the process's."""
    code = "from fedelta.cli.main import main; main()"
    arguments = [sys.executable, "-c", code, "sites", str(folder / "run"), "--json"]
    found = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    return {one["name"]: one | {"running": found["running"]} for one in found["sites"]}


def rounds(folder: Path) -> int:
    file = folder / "run" / "rounds.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def until_round(folder: Path, number: int) -> None:
    for _ in range(30000):
        if rounds(folder) >= number:
            return
        time.sleep(0.01)
    raise AssertionError(f"{rounds(folder)} of {number} rounds")


@pytest.mark.slow
def test_a_site_that_sends_nan_is_put_in_quarantine_and_readmitted(processes: Processes, fedelta: Fedelta) -> None:
    folder, port = processes.folder, free_port()
    authority = CertificateAuthority.create(folder / "ca")
    for name in ("a", "b"):
        authority.issue(name, out=folder / name)
    authority.issue("coordinator", hosts=["127.0.0.1"], out=folder / "coordinator")
    serve = ["serve", "experiment.py", "--listen", f"127.0.0.1:{port}", "--certificates", "coordinator", "--out", "run"]
    serve += ["--log", "json", "--absence", "3600"]
    join = ["join", "experiment.py", "--log", "json", "--at", f"127.0.0.1:{port}", "--certificates"]
    coordinator = processes("serve", *serve)
    processes("a", *join, "a", may_read="a")
    bad = spoiling(processes, "bad", *join, "b")
    assert bad.wait(300) == 2, processes.said("bad")
    refusal = "'b' is in quarantine since"
    for said in (
        refusal,
        "failed 3 times in a row, the last in round 3: ",
        "holds nan",
        "fedelta sites RUN --readmit b",
    ):
        assert said in processes.said("bad")
    until_round(folder, 10)  # it is not waited for
    found = sites(folder)
    one = found["b"]
    assert (found["a"]["here"], one["here"], one["counted"], one["failures"]) == (True, False, 0, 3)
    assert found["a"]["expires"] is not None

    coordinator.send_signal(signal.SIGKILL)
    coordinator.wait()
    one = sites(folder)["a"]
    assert (one["running"], one["here"]) == (False, False)
    coordinator = processes("serve", *serve, "--resume")
    until_round(folder, rounds(folder) + 5)
    again = processes("again", *join, "b", may_read="b")
    assert again.wait(300) == 2
    assert refusal in processes.said("again")

    fedelta("sites", folder / "run", "--readmit", "b")
    processes.until("serve", "site b is readmitted")
    processes("b", *join, "b", may_read="b")
    for _ in range(1000):
        if sites(folder)["b"]["counted"]:
            break
        time.sleep(0.05)
    coordinator.send_signal(signal.SIGINT)
    assert coordinator.wait(300) == 130
    found = sites(folder)
    assert found["b"]["counted"]
    assert found["b"]["failures"] == 0
    assert found["b"]["quarantine"] is None
    _, reports = read_run(folder / "run")
    with Registry(folder / "run" / DATABASE) as registry:
        own = registry.rounds()
        states = [one.state for one in own]
    assert len(reports) - len(own) in (0, 1)  # the interrupt may have come between the two: --resume adds the last one
    assert [one.number for one in own] == [report.round for report in reports[: len(own)]]
    assert all(
        ({*one.counted}, {*one.absent}) == ({*report.cohort} - report.absent.keys(), {*report.absent})
        for one, report in zip(own, reports, strict=False)
    )
    assert [report.refused for report in reports[:4]] == [("b",), ("b",), ("b",), ()]  # it is not asked any more
    assert None not in states[-3:]
    check_logs(processes, folder)


def check_logs(processes: Processes, folder: Path) -> None:
    """Each line of a log is JSON, but for what is printed; and no secret is in any."""
    lines = [line for line in processes.said("serve").splitlines() if line.startswith("{")]
    told = [json.loads(line) for line in lines]
    assert {"joined", "round", "quarantined", "readmitted", "refused", "shut out"} <= {one.get("event") for one in told}
    third = next(one for one in told if one.get("round") == 3 and one["event"] == "round")
    assert (third["level"], third["answered"], [*third["absent"]]) == ("INFO", ["a"], ["b"])
    assert {one["site"] for one in told if one.get("event") == "joined"} == {"a", "b"}
    secrets = [
        line
        for key in folder.rglob("*.key")
        for line in key.read_text(errors="replace").splitlines()
        if len(line) > 20 and not line.startswith("--")
    ]
    assert secrets
    for log in ("serve", "a", "b", "bad"):
        assert not any(secret in processes.said(log) for secret in secrets)
    assert [json.loads(line)["event"] for line in processes.said("a").splitlines() if "connected to" in line]


def test_without_a_quarantine_nobody_is_shut_out_for_good(processes: Processes) -> None:
    _, federation = loaded(processes.folder / "experiment.py", (), test=False)
    port = free_port()
    processes("serve", "serve", "experiment.py", "--insecure", "--listen", f"127.0.0.1:{port}", "--quarantine-after", 0)
    processes.until("serve", "Listening at")
    hello = frame(frames.Hello(protocol=PROTOCOL, name="a", experiment=digest(federation)))
    for _ in range(5):  # more than a fleet bears by itself
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            first, *_, last = channel.stream_stream(METHOD)(iter([hello, b"\x99 what no site sends"]))
        assert isinstance(parse(first), frames.Welcome)
        assert not parse(last).final  # type: ignore[union-attr]


def test_the_table_has_all_sites_and_why_one_is_in_quarantine(
    fedelta: Fedelta, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = fedelta("sites", run)
    table = printed.partition("No coordinator runs")[0].splitlines()
    rows = {line.split()[0]: line for line in table if line.strip()}
    with Registry(run / DATABASE) as registry:
        since = registry.quarantined()["[red]b"].since
    assert rows["a"].split()[3] == "2"  # rounds, after a day and a minute
    assert rows["[red]b"].split()[4:6] == ["2", f"{since:%Y-%m-%d}"]  # failures, since when
    assert "never" in rows["c"]
    assert "[red]b is in quarantine since" in printed
    assert "It has failed 2 times in a row, the last in round 2: its value is [NaN]" in printed
    assert "No coordinator runs" in printed


def test_an_operator_readmits_and_shuts_out(fedelta: Fedelta, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is readmitted" in fedelta("sites", run, "--readmit", "[red]b")
    assert "in quarantine" in fedelta("sites", run, "--quarantine", "a", "--because", "its owner asked for it")
    found = {one["name"]: one for one in json.loads(fedelta("sites", run, "--json"))["sites"]}
    assert found["[red]b"]["quarantine"] is None
    assert found["a"]["quarantine"]["why"] == "By the operator: its owner asked for it"
    monkeypatch.setenv("COLUMNS", "160")
    lines = fedelta("sites", run, "--events", 2).splitlines()
    assert "readmitted" in lines[-2]
    assert "its owner asked for it" in lines[-1]
    assert len(fedelta("sites", run, "--events").splitlines()) == 2 + 6


def test_what_cannot_be_done_is_one_sentence(fedelta: Fedelta, run: Path) -> None:
    for arguments, why in [
        (["--quarantine", "a"], "--because TEXT go together"),
        (["--because", "x"], "go together"),
        (["--quarantine", "a", "--because", " "], "go together"),
        (["--readmit", "a"], "'a' is not in quarantine"),
        (["--readmit", "nobody"], "'nobody' is not among the sites"),
    ]:
        assert why in fedelta("sites", run, *arguments, status=2)
    assert "there is no coordinator.sqlite" in fedelta("sites", run / "elsewhere", status=2)
    (run / DATABASE).write_bytes(b"not a database" * 99)
    assert "coordinator.sqlite is damaged" in fedelta("sites", run, status=2)


def test_options_of_serve_are_checked(fedelta: Fedelta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "pigeon")
    arguments = [
        "serve",
        tmp_path / "experiment.py",
        "--insecure",
        "--listen",
        "127.0.0.1:0",
        "--out",
        tmp_path / "run",
    ]
    assert "no exporter 'pigeon' for metrics" in fedelta(*arguments, "--telemetry", status=2)
    assert "--quarantine-after" in fedelta(*arguments, "--quarantine-after", -1, status=2)
    assert "--log" in fedelta(*arguments, "--log", "xml", status=2)
