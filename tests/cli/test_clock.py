"""A run over TLS while the wall clock of all parties jumps by hours, forward and back, after every round.

Limits: gRPC and TLS have the machine's own clock.
"""

import json
import sqlite3
import sys
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.cli.in_process import Fedelta, fedelta
from tests.cli.test_serve import EXPERIMENT
from tests.fleet.remote_sites import site
from tests.ports import free_port

from fedelta.cli.experiment import federated
from fedelta.cli.facts import facts
from fedelta.fleet import departures, receipts
from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.departures import Departures
from fedelta.fleet.own_files import Party
from fedelta.fleet.policy import NO_POLICY, Door
from fedelta.fleet.registry import DATABASE, Registry
from fedelta.fleet.wire import Credentials

__all__ = ["fedelta"]  # a fixture

ROUNDS = 12
JUMPS_H = (0, 7, -9, 30, 0, -40, 3)  # off the right time, after each round
SITES = ("a", "b")


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `datetime.now` of fedelta's own is off by what belongs to the rounds that are written."""

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Jumping":
            rounds = Path("run/rounds.jsonl")
            done = rounds.read_bytes().count(b"\n") if rounds.exists() else 0
            return cls.fromtimestamp(datetime.now(UTC).timestamp() + 3600 * JUMPS_H[done % len(JUMPS_H)], UTC)

    patched = [
        module
        for name, module in sys.modules.items()
        if name.startswith("fedelta.") and getattr(module, "datetime", None) is datetime
    ]
    assert len(patched) > 8
    for module in patched:
        monkeypatch.setattr(module, "datetime", Jumping)


def credentials(name: str) -> Credentials:
    own = Party.read(name, "site")
    return Credentials(root=own.root, chain=own.chain, key=own.key)


def test_a_clock_that_jumps_costs_no_round_and_loses_nothing(
    fedelta: Fedelta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    file, port = Path("experiment.py"), free_port()
    file.write_text(EXPERIMENT)
    begin = datetime.now(UTC) - timedelta(days=4)
    authority = CertificateAuthority.create("ca", start=begin)
    for name in ("coordinator", *SITES):
        authority.issue(name, hosts=["127.0.0.1"] if name == "coordinator" else [], out=name, start=begin)
    settings = [f"ROUNDS={ROUNDS}"]
    loaded, program = federated(file, settings, test=False)
    request.getfixturevalue("jumping")
    policy = replace(NO_POLICY, bytes_per_day=10**6)
    with ExitStack() as stack:
        for name in SITES:
            Path("joined", name).mkdir(parents=True)
            door = Door(policy, facts(program, name), Departures.open(Path("joined", name, "log")))
            own = {"credentials": credentials(name), "folder": Path("joined", name), "guards": door}
            stack.enter_context(site(program, loaded.data, name, port, **own))
        at = ["--listen", f"127.0.0.1:{port}", "--certificates", "coordinator", "--revoked", "ca/revoked.crl"]
        fedelta("serve", file, *at, "--set", settings[0], "--out", "run", "--no-hand-over")
    reports = [json.loads(line) for line in Path("run/rounds.jsonl").read_text().splitlines()]
    assert [one["round"] for one in reports] == list(range(1, ROUNDS + 1))
    assert not any(one["absent"] for one in reports)
    with Registry(Path("run") / DATABASE) as registry:
        assert [(one.name, one.counted, one.failures, one.streams) for one in registry.sites()] == [
            (name, ROUNDS, 0, 1) for name in SITES
        ]
    with sqlite3.connect(Path("run") / DATABASE) as database:
        times = [
            datetime.fromisoformat(time) for (time,) in database.execute("SELECT time FROM rounds ORDER BY number")
        ]
    steps = [after - before for before, after in pairwise(times)]
    assert min(steps) < -timedelta(hours=30)  # or this shows nothing
    assert max(steps) > timedelta(hours=30)
    assert sum(one.what == "reply" for one in receipts.read(Path("run"))) == len(SITES) * ROUNDS
    for name in SITES:
        left = [line.entry for line in departures.read(Path("joined", name, "log"))]
        assert [entry.round for entry in left] == list(range(1, ROUNDS + 1))
        (kept,) = Path("joined", name).glob("*/memory")
        assert {one.round for one in receipts.read(kept.parent)} == {*range(1, ROUNDS + 1)}
    fedelta("run", file, "--plan", "plain", "--workers", 0, "--set", settings[0], "--out", "here")
    here, there = load_file("here/model.safetensors"), load_file("run/model.safetensors")
    assert all(here[name].equal(there[name]) for name in here)
