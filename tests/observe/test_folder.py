import errno
import json
import math
import os
import resource
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedelta.core.errors import CannotResume, FedeltaError
from fedelta.core.messages import Plain
from fedelta.core.program import Report
from fedelta.observe.folder import RunFolder, read_run

NEVER = math.inf


@dataclass(frozen=True, kw_only=True)
class State:
    round: int
    values: Tensor


def state(round: int) -> State:
    return State(round=round, values=torch.arange(5.0) * round)


def report(round: int) -> Report:
    return Report(round=round, metrics={"loss": 1 / round}, absent={"ü": "its loss is NaN"}, stop=None)


def written(path: Path, commits: Sequence[bool]) -> int:
    """A folder with a round for each of `commits`, committed where True; gives the length of the committed lines."""
    folder = RunFolder.create(path, {"seed": 1}, commit_every_s=NEVER)
    committed = 0
    for round, commit in enumerate(commits, start=1):
        folder.add(state(round), report(round))
        if commit:
            folder.commit()
            committed = (path / "rounds.jsonl").stat().st_size
    folder.close()
    return committed


def test_a_round_can_be_read_as_soon_as_it_is_added(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {"seed": 1, "name": "è"}, commit_every_s=NEVER) as folder:
        folder.add(state(1), report(1))
        assert read_run(tmp_path / "run") == ({"seed": 1, "name": "è"}, [report(1)])
        assert not (tmp_path / "run" / "state.safetensors").exists()
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_leaving_by_an_interrupt_commits(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunFolder.create(tmp_path, {}, commit_every_s=NEVER) as folder:  # noqa: PT012
        folder.add(state(1), report(1))
        raise KeyboardInterrupt
    with RunFolder.open(tmp_path) as folder:
        resumed, reports = folder.resume(state(0))
    assert resumed is not None
    assert resumed.round == 1
    assert reports == [report(1)]


def test_a_run_killed_before_its_first_commit_starts_anew(tmp_path: Path) -> None:
    assert written(tmp_path, [False, False]) == 0
    with RunFolder.open(tmp_path) as folder:
        assert folder.resume(state(0)) == (None, [])
    assert (tmp_path / "rounds.jsonl").read_bytes() == b""


def test_lines_without_a_state_are_kept_aside_the_longest(tmp_path: Path) -> None:
    written(tmp_path, [True, True, True])
    lines = (tmp_path / "rounds.jsonl").read_bytes()
    (tmp_path / "state.safetensors").unlink()
    for _ in range(3):  # the later ones have one round, or none, to keep
        with RunFolder.open(tmp_path, commit_every_s=NEVER) as folder:
            assert folder.resume(state(0)) == (None, [])
            assert (tmp_path / "rounds.jsonl").read_bytes() == b""
            assert (tmp_path / "rounds.uncommitted.jsonl").read_bytes() == lines
            folder.add(state(1), report(1))
            folder.close()


@settings(max_examples=20)
@given(commits=st.lists(st.booleans(), min_size=1, max_size=6), cut=st.floats(0, 1), tail=st.binary(max_size=200))
def test_whatever_a_crash_leaves_after_the_commit_is_cut_off(
    tmp_path_factory: pytest.TempPathFactory, commits: list[bool], cut: float, tail: bytes
) -> None:
    path = tmp_path_factory.mktemp("run")
    committed = written(path, commits)
    lines = path / "rounds.jsonl"
    content = lines.read_bytes()
    lines.write_bytes(content[: committed + round(cut * (len(content) - committed))] + tail)
    (path / ".state.safetensors.new").write_bytes(tail)  # a torn state that never got its name
    count = max((number for number, commit in enumerate(commits, start=1) if commit), default=0)
    with RunFolder.open(path, commit_every_s=0) as folder:
        resumed, reports = folder.resume(state(0))
        assert reports == [report(number) for number in range(1, count + 1)]
        assert lines.read_bytes() == content[:committed]
        assert (resumed.round if resumed else 0) == count
        folder.add(state(count + 1), report(count + 1))
    assert read_run(path)[1] == [report(number) for number in range(1, count + 2)]


@settings(max_examples=20)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_damaged_state_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    path = tmp_path_factory.mktemp("run")
    written(path, [True])
    whole = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(whole[: int(cut * len(whole))])
    with RunFolder.open(path) as folder, pytest.raises(CannotResume, match=r"state\.safetensors"):
        folder.resume(state(0))


@settings(max_examples=20)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_committed_lines_that_are_missing_are_refused(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    path = tmp_path_factory.mktemp("run")
    committed = written(path, [False, True])
    whole = (path / "rounds.jsonl").read_bytes()
    (path / "rounds.jsonl").write_bytes(whole[: int(cut * committed)])
    with RunFolder.open(path) as folder, pytest.raises(CannotResume, match=r"rounds\.jsonl are not what was committed"):
        folder.resume(state(0))


def test_committed_lines_that_were_edited_are_refused(tmp_path: Path) -> None:
    written(tmp_path, [True])
    lines = tmp_path / "rounds.jsonl"
    lines.write_bytes(lines.read_bytes().replace(b"1.0", b"0.5"))
    with RunFolder.open(tmp_path) as folder, pytest.raises(CannotResume, match="not what was committed"):
        folder.resume(state(0))


@settings(max_examples=20)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_damaged_manifest_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    path = tmp_path_factory.mktemp("run")
    written(path, [True])
    whole = (path / "manifest.json").read_bytes().rstrip()
    (path / "manifest.json").write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(CannotResume, match=r"manifest\.json is damaged"):
        RunFolder.open(path)


def test_a_folder_that_holds_a_run_is_not_started_again(tmp_path: Path) -> None:
    written(tmp_path, [True])
    with pytest.raises(CannotResume, match="--resume"):
        RunFolder.create(tmp_path, {})


def test_an_empty_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CannotResume, match="no run in"):
        RunFolder.open(tmp_path)


def test_a_run_is_continued_only_as_it_was_started(tmp_path: Path) -> None:
    manifest: dict[str, Plain] = {
        "seed": 1,
        "experiment": "ab",
        "data": {"a": "01", "b": "02"},
        "plan": {"threads": 1},
        "platform": "x",
    }
    with RunFolder.create(tmp_path, manifest) as folder:
        folder.check_same({**manifest, "platform": "y"})
        with pytest.raises(CannotResume, match="seed = 1 and this one has seed = 2"):
            folder.check_same({**manifest, "seed": 2})
        with pytest.raises(CannotResume, match=r'data.b = "02" and this one has data.b = "03"'):
            folder.check_same({**manifest, "data": {"a": "01", "b": "03"}})
        with pytest.raises(CannotResume, match=r'data.b = "02" and this one has data.b = nothing'):
            folder.check_same({**manifest, "data": {"a": "01"}})
        with pytest.raises(CannotResume, match=r"1 more difference\)"):
            folder.check_same({**manifest, "seed": 2, "plan": {"threads": 2}})


def test_a_full_disk_leaves_the_last_commit_intact(tmp_path: Path) -> None:
    """The limit on a file's size stands in for a full disk: the write itself fails, in the middle of a line."""
    folder = RunFolder.create(tmp_path, {}, commit_every_s=NEVER)
    folder.add(state(1), report(1))
    folder.commit()
    size = (tmp_path / "rounds.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        with pytest.raises(FedeltaError, match=os.strerror(errno.EFBIG)), folder:
            folder.add(state(2), report(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "rounds.jsonl").stat().st_size == size + 10
    with RunFolder.open(tmp_path) as folder:
        resumed, reports = folder.resume(state(0))
    assert resumed is not None
    assert torch.equal(resumed.values, state(1).values)
    assert reports == [report(1)]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedeltaError, match=r"file/run cannot be written: Not a directory"):
        RunFolder.create(tmp_path / "file" / "run", {})


def test_lines_are_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    with RunFolder.create(tmp_path, {}) as folder:
        folder.add(state(1), Report(round=1, metrics={"a": math.nan, "b": -math.inf}))
    (line,) = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["metrics"] == {"a": "NaN", "b": "-Infinity"}
