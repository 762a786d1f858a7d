"""A coordinator whose disk takes no more: it says so in one sentence, and goes on from its last round when it does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.fleet.chaos_processes import ROOT, Processes
from tests.ports import free_port

from fedelta.cli.deployment import loaded
from fedelta.core.program import run
from fedelta.fleet.local import Local
from fedelta.observe.folder import read_run

NAMES = ("h00", "h01", "h02")
LIMITED = """
import resource, sys
from fedelta.cli.main import main
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.close()


def limited(folder: Path, limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command no file of which may be longer than `limit` bytes: a write beyond fails, as one to a full disk does."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_sentence_and_it_goes_on_to_the_same_bits(processes: Processes) -> None:
    folder, at = processes.folder, f"127.0.0.1:{free_port()}"
    experiment = (ROOT / "tests" / "fleet" / "chaos_experiment.py").read_text()
    (folder / "experiment.py").write_text(experiment.replace("min_sites=8", "min_sites=1"))
    for name in NAMES:
        processes.start(name, "fedelta", "join", "experiment.py", "--insecure", "--name", name, "--at", at)
    serve = ["serve", "experiment.py", "--insecure", "--listen", at, "--sites", ",".join(NAMES), "--out", "run"]
    serve += ["--rounds", "30"]
    rounds = folder / "run" / "rounds.jsonl"
    kept = b""
    for limit in (20_000, 80_000):  # before the first round, and after some
        ended = limited(folder, limit, *serve, *(["--resume"] if rounds.exists() else []))
        (said,) = [line for line in ended.stderr.splitlines() if line.startswith("fedelta: ")]
        assert "--resume" in said
        assert ended.returncode == 2
        assert "Traceback" not in ended.stderr
        assert rounds.read_bytes().startswith(kept)
        kept = rounds.read_bytes()
    assert 0 < kept.count(b"\n") < 30
    ended = limited(folder, 0, *serve, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert rounds.read_bytes().startswith(kept)
    _, reports = read_run(folder / "run")
    assert [report.round for report in reports] == list(range(1, 31))
    assert not any(report.absent for report in reports)
    here, there = simulated(folder), load_file(folder / "run" / "model.safetensors")
    assert here.keys() == there.keys()
    assert all(here[name].equal(there[name]) for name in here)


def simulated(folder: Path) -> dict[str, torch.Tensor]:
    """The model of a run of the same sites in this process."""
    file, federation = loaded(folder / "experiment.py", (), test=True, rounds=30)
    states = [state for state, _ in run(federation, Local(federation, file.data, NAMES))]
    return dict(federation.model(states[-1]).state_dict())
