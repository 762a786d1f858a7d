"""`fedelta demo`: a small run of it from end to end, and what it concludes from made-up numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.torch import load_file

from fedelta.cli.board import Board
from fedelta.cli.demo import command
from fedelta.cli.demo_methods import (
    ALONE,
    HEAD,
    LORA,
    POOLED,
    PRETRAINING,
    SCRATCH,
    WAYS,
    Network,
    Way,
    _federation,
    _sites,
    job,
    jobs,
    pretraining,
    split,
    train,
)
from fedelta.cli.demo_results import METRIC, Results, accuracy_sentence, rounds_sentence
from fedelta.cli.processes import Done, Processes
from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.program import Report
from fedelta.learning.plan import Plan
from fedelta.learning.training import train as local_training

LINES = [
    "pre-trained, as it is",
    "each site alone, mean",
    "each site alone, worst",
    "all data pooled",
    "federated from scratch",
    "federated, all weights",
    "federated, head only",
    "federated, LoRA",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A demo of one seed and one round, run in this process, in the folder of an earlier one."""
    out = tmp_path_factory.mktemp("demo")
    (out / "demo.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    arguments = ["--seeds", "1", "--rounds", "1", "--workers", "0", "--out", str(out)]
    return CliRunner().invoke(command, arguments, catch_exceptions=False), out


def test_the_table_has_every_line_and_the_reading_follows(demo: tuple[Result, Path]) -> None:
    result, out = demo
    assert result.exit_code == 0
    for line in LINES:
        assert re.search(rf"^ *{re.escape(line)} +\d+\.\d%", result.output, re.MULTILINE), line
    said = " ".join(result.output.split())
    for sentence in json.loads((out / "demo.json").read_text())["reading"]:
        assert sentence in said


def test_the_report_stands_alone(demo: tuple[Result, Path]) -> None:
    html = (demo[1] / "report.html").read_text(encoding="utf-8")
    for line in (*LINES, *(way.name for way in WAYS)):
        assert line in html
    assert html.count("<svg") == 4  # bars, two curves, what the sites hold
    assert "<script" not in html
    assert "@import" not in html
    fetched = re.findall(r"""(?:src|href|srcset|data)\s*=\s*["']?([^"'\s>]*)|url\(["']?([^"')]*)""", html)
    targets = [target for pair in fetched for target in pair if target]
    assert targets
    assert [target for target in targets if not target.startswith(("#", "data:"))] == []


def test_the_saved_model_loads_and_is_as_good_as_its_run_says(demo: tuple[Result, Path]) -> None:
    _, out = demo
    model = Network()
    model.load_state_dict(load_file(out / "model.safetensors"))
    test = split(0).test
    right = int((model(test.inputs["x"]).argmax(dim=1) == test.targets).sum())
    runs = json.loads((out / "demo.json").read_text())["runs"]
    finals = [
        run["reports"][-1]["metrics"]["test_accuracy"]
        for run in runs
        if run["method"] in ("federated, all weights", "federated, head only", "federated, LoRA")
    ]
    assert right / len(test) == pytest.approx(max(finals))


def test_the_numbers_cover_every_job(demo: tuple[Result, Path]) -> None:
    runs = json.loads((demo[1] / "demo.json").read_text())["runs"]
    assert len(runs) == len(jobs(1, 1)) == 6 + 8
    for run in runs:
        last = run["reports"][-1]
        assert last["round"] == (10 if run["method"] == "pre-training" else 1)
        assert last["bytes_up"] > 0
        assert not last["absent"]


def test_lora_is_saved_as_a_plain_network() -> None:
    start = _result(train(replace(pretraining(0), rounds=1), None))
    reports: list[Report] = []
    merged = _result(train(job(LORA, 0, 1), start), reports)
    model = Network()
    model.load_state_dict(_load(merged))
    test = split(0).test
    right = int((model(test.inputs["x"]).argmax(dim=1) == test.targets).sum())
    assert right / len(test) == pytest.approx(reports[-1].metrics["test_accuracy"])
    before = _load(start)
    assert not torch.equal(model.encoder[0].weight, before["encoder.0.weight"])


@pytest.mark.parametrize("seed", [0, 1])
def test_pooled_training_makes_as_many_steps_as_all_sites_together(seed: int) -> None:
    def steps(way: Way) -> float:
        once = job(replace(way, pretrained=False), seed, 1)
        federation = _federation(once, None)
        task, training = federation.algorithm.task, federation.algorithm.training
        return sum(
            local_training(task.flat(seed, Plan()), part, task.objective, training, round=1, seed=0)["steps"]
            for part in _sites(once).values()
        )

    assert steps(POOLED) == steps(SCRATCH)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_image_is_in_one_place(seed: int) -> None:
    whole = split(seed)
    parts = [whole.public, whole.test, *whole.sites.values()]
    images = torch.cat([part.inputs["x"] for part in parts]).flatten(1)
    assert len(images) == 1797
    assert len(whole.sites) == 8
    assert all(len(part) >= 20 for part in whole.sites.values())
    assert len(whole.public) == pytest.approx(0.3 * 1797, abs=5)
    assert 0.2 <= len(whole.test) / 1797 <= 0.25
    tested, public = (torch.bincount(part.targets, minlength=10) for part in (whole.test, whole.public))
    assert int(tested.min()) >= 0.8 * int(tested.max())
    assert sorted(int(count > 50) for count in public) == [0] * 5 + [1] * 5
    from sklearn.datasets import load_digits

    expected = torch.from_numpy(load_digits().data / 16).float()
    assert torch.equal(_sorted(images), _sorted(expected))


def test_seeds_differ_in_what_is_where() -> None:
    assert split(0).public.digest() != split(1).public.digest()
    assert split(0).test.digest() != split(1).test.digest()


def test_processes_give_what_one_process_gives() -> None:
    """And a job gets the model that it starts from, whoever made it."""
    todo = [
        pretraining(0),
        *(job(SCRATCH, seed, 1) for seed in (0, 1)),
        job(HEAD, 0, 1),
    ]
    found = {}
    for workers in (0, 2):
        with Processes(train, workers) as processes:
            found[workers] = {job: event.result for job, event in processes.run(todo) if isinstance(event, Done)}
    assert found[0].keys() == set(todo)
    assert found[0] == found[2]
    pretrained, headed = _load(found[0][todo[0]]), _load(found[0][todo[-1]])
    assert torch.equal(pretrained["encoder.0.weight"], headed["encoder.0.weight"])
    assert not torch.equal(pretrained["head.weight"], headed["head.weight"])


def test_an_error_in_a_process_comes_back_as_it_is() -> None:
    diverging = job(replace(SCRATCH, how=replace(SCRATCH.how, lr=1e30)), 0, 1)
    with Processes(train, 1) as processes, pytest.raises(FedeltaError, match="lower it"):
        list(processes.run([diverging]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads process groups in /proc")
@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_no_process_stays_behind(how: str, tmp_path: Path) -> None:
    call = "from fedelta.cli.main import main; main()"
    demo = subprocess.Popen(
        [sys.executable, "-c", call, "demo", "--workers", "2", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    with demo:
        assert demo.stdout is not None
        while "all 8" not in demo.stdout.readline():  # the last line before the work begins
            assert demo.poll() is None
        assert len(_group(demo.pid)) == 3
        if how == "interrupted":
            os.killpg(demo.pid, signal.SIGINT)
        else:
            demo.kill()
        _, errors = demo.communicate(timeout=300)
    if how == "interrupted":
        assert demo.returncode == 130
        assert errors.strip() == "fedelta: interrupted"
    patience = time.monotonic() + 120
    while _group(demo.pid) and time.monotonic() < patience:
        time.sleep(0.05)
    assert _group(demo.pid) == []


def test_a_wrong_option_is_refused(tmp_path: Path) -> None:
    for arguments in (["--seeds", "0"], ["--rounds", "none"], ["--workers", "-1"], ["--sites", "3"]):
        result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code != 0
        assert arguments[0] in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("three years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        result = CliRunner().invoke(command, ["--out", str(out)])
        assert isinstance(result.exception, BadInput)
        assert "choose another --out" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_of_a_demo_is_used_again(demo: tuple[Result, Path]) -> None:
    _, out = demo
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "model.safetensors", "notes.txt", "report.html"]
    assert json.loads((out / "demo.json").read_text())["settings"]["rounds"] == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_rounds_sentence_says_what_the_numbers_say() -> None:
    def said(warm: Sequence[int | None], cold: Sequence[int | None]) -> str:
        return rounds_sentence(0.88, warm=warm, cold=cold, rounds=10)

    fewer = said([1, 2, 3], [6, 7, 9])
    assert fewer.startswith("The pre-trained start needed fewer rounds than training from scratch: 88.0%")
    assert "after 2 rounds on average with all weights" in fewer
    assert "after 7.3 rounds on average from scratch" in fewer
    assert said([1], [None]).endswith(
        "after 1 round with all weights from that start, and not within 10 rounds from scratch."
    )
    assert "for only 2 of 3 seeds" in said([1, 2, 9], [6, 7, 9])
    assert "after 7 rounds by 1 of 2 seeds only from scratch" in said([1, 2], [None, 7])
    assert "after 5–7 rounds by 2 of 3 seeds only from scratch" in said([1, 2, 3], [5, None, 7])
    for warm, cold in (([5, 6], [5, 5]), ([None], [None]), ([None, None], [3, 4])):
        assert said(warm, cold).startswith("The pre-trained start did not need fewer rounds")


def test_accuracy_sentence_says_what_the_numbers_say() -> None:
    alone, pooled = [0.80, 0.82, 0.78], [0.97, 0.98, 0.96]  # a difference of (16, 15, 17): 16 ± 4.303 / sqrt(3)
    ways = {"all weights": [0.96, 0.97, 0.95], "LoRA": [0.93, 0.94, 0.92]}
    clear = accuracy_sentence(ways, alone=alone, pooled=pooled)
    assert clear.startswith("Every federated way from that start ends clearly above the mean site alone (80.0%)")
    assert "+16.0 ± 2.5 (all weights)" in clear
    assert "the best of them, all weights, ends 1.0 ± 0.0 points below pooled training (97.0%)" in clear

    noisy = ways | {"LoRA": [0.70, 0.99, 0.80]}  # above on average, but not by more than chance may give
    assert accuracy_sentence(noisy, alone=alone, pooled=pooled).startswith(
        "Not every federated way ends clearly above the mean site alone, only all weights"
    )
    worse = {"all weights": [0.70, 0.72, 0.68], "LoRA": [0.80, 0.82, 0.78]}
    assert accuracy_sentence(worse, alone=alone, pooled=pooled).startswith("No federated way ends clearly above")
    single = accuracy_sentence({"LoRA": [0.9]}, alone=[0.8], pooled=[0.85])
    assert single.startswith("On one seed, which tells no spread, 1 of 1 federated ways")
    assert "ends 5.0 points above pooled training" in single


def test_results_take_the_mean_and_the_worst_over_sites() -> None:
    def run(accuracy: float) -> list[Report]:
        return [Report(round=1, metrics={"test_accuracy": accuracy}, cohort=["a"], bytes_up=8)]

    todo = jobs(2, 1)
    accuracies = {job: 0.5 + 0.01 * position for position, job in enumerate(todo)}
    results = Results(seeds=2, rounds=1, reports={job: run(value) for job, value in accuracies.items()})
    by_name = {method.name: method for method in results.methods()}
    for seed in (0, 1):
        alone = [value for job, value in accuracies.items() if job.way == ALONE and job.seed == seed]
        assert by_name["each site alone, mean"].scores[seed] == pytest.approx(sum(alone) / 8)
        assert by_name["each site alone, worst"].scores[seed] == min(alone)
        untouched = [value for job, value in accuracies.items() if job.way == PRETRAINING and job.seed == seed]
        assert by_name["pre-trained, as it is"].scores[seed] == untouched[0]
    sent = by_name["federated, LoRA"].sent
    assert sent is not None
    assert sent.mean == 1  # 8 bytes in all, over 8 sites
    pooled = [value for job, value in accuracies.items() if job.way.name == "all data pooled"]
    assert results.target() == pytest.approx(0.9 * sum(pooled) / 2)
    assert results.best().way == HEAD  # the last of the three in the order of jobs, so the highest here


def test_the_board_shows_each_way_and_ends_full() -> None:
    todo = jobs(1, 4)
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with Board(todo, console, names=[way.name for way in WAYS], metric=METRIC) as board:
        for job in todo:
            board.show(job, Report(round=job.rounds, metrics={"test_accuracy": 0.625}))
            board.finish(job)
    for way in WAYS:
        assert way.name in screen.getvalue()
    assert "14/14" in screen.getvalue()
    assert "62.5%" in screen.getvalue()


def _result(steps, reports: list[Report] | None = None) -> bytes:
    """What a generator returns."""
    while True:
        try:
            report = next(steps)
        except StopIteration as end:
            return end.value
        if reports is not None:
            reports.append(report)


def _load(message: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(message)


def _sorted(rows: torch.Tensor) -> torch.Tensor:
    return rows[torch.from_numpy(np.lexsort(rows.numpy().T))]


def _group(leader: int) -> list[int]:
    """The living processes of a group, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
