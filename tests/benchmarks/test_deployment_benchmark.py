"""The benchmark of the deployment: what is told of Flower, and that none of its processes is left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.deployment.__main__ import SMALL, main, table, told
from benchmarks.deployment.with_flower import SITE_BYTES, Flower, end_all, free_ports, having

ROW = ("a work", "1 MB/s", "2 MB/s", "50%", "70%", "3 MB/s, 5 sites")


def environment_with(folder: Path, version: str) -> Path:
    """An environment with commands by the names of Flower's, and an interpreter that tells a version."""
    for name in ("flwr", "flower-superlink", "flower-supernode", "python"):
        (folder / name).write_text(f"#!/bin/sh\necho {version}\n")
        (folder / name).chmod(0o755)
    return folder / "python"


def test_flower_has_a_column_where_it_was_measured() -> None:
    without, measured = table([ROW], None), table([ROW], "1.41.0")
    assert without.splitlines() == [
        "| | fedelta | bare gRPC | share | the aim |",
        "|---|---:|---:|---:|---:|",
        "| a work | 1 MB/s | 2 MB/s | 50% | 70% |",
    ]
    assert "| the aim | Flower 1.41.0 |\n|---|---:|---:|---:|---:|---:|\n" in measured
    assert "| 70% | 3 MB/s, 5 sites |\n\nFlower's deployment" in measured


def test_a_deployment_that_ends_is_no_answer_and_nothing_of_it_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "coordinator.json").write_text("{}")
    flower = Flower(environment_with(tmp_path, "9.9"), 3, tmp_path)
    assert flower.version == "9.9"
    assert told(flower, SMALL, 1, lambda found: "a figure") == ["a process has ended, 3 sites"]
    assert "Flower's last lines:\n9.9" in capfd.readouterr().err
    assert having(f"FLWR_HOME={tmp_path / f'flower-3-{SMALL.size}'}") == []


def test_processes_are_ended_with_those_that_they_started() -> None:
    setting = f"FEDELTA_TEST=ended-{os.getpid()}"
    name, value = setting.split("=")
    script = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, name: value},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"\n"
        while len(having(setting)) < 2:  # a program that has just begun has no environment yet
            time.sleep(0.01)
        end_all(setting)
    assert having(setting) == []


def test_ports_are_free_and_differ() -> None:
    assert len(set(free_ports(50))) == 50


def test_flower_is_refused_where_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no flwr"):
        Flower(tmp_path / "python", 3, tmp_path)
    python = environment_with(tmp_path, "9.9")
    with pytest.raises(ValueError, match=r"let --flower-sites be \d+ at most"):
        Flower(python, 10**15 // SITE_BYTES, tmp_path)
    for wrong in (f"flower={tmp_path}/none", str(python), f"pfl={python}"):
        with pytest.raises(SystemExit, match="2"):
            main(["--python", wrong])
    with pytest.raises(SystemExit, match="--flower-sites is 3; let it be 4 or more"):
        main(["--python", f"flower={python}", "--flower-sites", "3"])
