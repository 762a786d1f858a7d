"""Runs that are really killed, and then continued, end as the run that was never disturbed: bit for bit."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedelta.observe.folder import RunFolder

Killer = Callable[..., dict[str, Any]]
ENDED = {"killed": False, "refused": False, "calls": 0}


@pytest.fixture(scope="module")
def start() -> Iterator[Killer]:
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("killed_run.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def start(
        folder: Path, rounds: int, commit_every_s: float = 0.0, remembers: bool = False, **kill: float
    ) -> dict[str, Any]:
        committed = committed_round(folder)
        command = {"folder": str(folder), "rounds": rounds, "commit_every_s": commit_every_s}
        command |= {"remembers": remembers, **kill}
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()
        answer: dict[str, Any] = json.loads(stdout.readline())
        began = answer.pop("began")
        assert began == committed or (began is None and (answer["killed"] or answer["refused"]))
        return answer

    yield start
    stdin.close()
    server.wait()
    stdout.close()


def committed_round(folder: Path) -> int:
    """The round of the state file, read here by the format alone; 0 if there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return int(json.loads(header["__metadata__"]["fedelta"])["meta"]["round"])


def same(folder: Path, undisturbed: Path) -> bool:
    return all(
        (folder / name).read_bytes() == (undisturbed / name).read_bytes()
        for name in ("rounds.jsonl", "state.safetensors")
    )


def test_two_processes_do_not_write_one_folder(start: Killer, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, {"seed": 7}):
        assert start(tmp_path, 1)["refused"]
    assert start(tmp_path, 1) == ENDED


@pytest.mark.parametrize(("commit_every_s", "remembers"), [(0.0, False), (0.01, False), (60.0, True)])
def test_a_run_killed_twenty_times_in_a_row(
    start: Killer, tmp_path: Path, commit_every_s: float, remembers: bool
) -> None:
    moments = random.Random(1)
    kills = reached = 0
    while kills < 20 or not reached:  # a busy machine may need longer for a round
        kill_after_s = moments.uniform(0, 0.05) * (1 + kills // 20)
        assert start(tmp_path / "killed", 10**9, commit_every_s, remembers, kill_after_s=kill_after_s)["killed"]
        kills += 1
        reached = (tmp_path / "killed" / "rounds.jsonl").read_bytes().count(b"\n")
    if remembers or not commit_every_s:
        assert committed_round(tmp_path / "killed") >= reached - 1
    assert start(tmp_path / "killed", reached + 3, 10, remembers) == ENDED
    assert start(tmp_path / "undisturbed", reached + 3, 10, remembers) == ENDED
    assert same(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.parametrize(("commit_every_s", "remembers"), [(0.0, False), (60.0, True)])
def test_a_run_killed_after_each_call_that_touches_a_file(
    start: Killer, tmp_path: Path, commit_every_s: float, remembers: bool
) -> None:
    how = (2, commit_every_s, remembers)
    calls = start(tmp_path / "undisturbed", *how, kill_after_call=0)["calls"]
    assert calls > 2 * 5  # a line, its sync, the new state, its sync and its new name, at least, for every round
    for k in range(1, calls + 1):
        folder = tmp_path / f"killed-{k}"
        assert start(folder, *how, kill_after_call=k)["killed"]
        again = start(folder, *how, kill_after_call=k)  # and where the first resume is, too
        assert again["killed"] or again["calls"] < k
        assert start(folder, *how) == ENDED
        assert same(folder, tmp_path / "undisturbed"), f"killed after call {k} of {calls}"
