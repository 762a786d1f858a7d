"""`fedelta plan` against `fedelta run` on the same experiment file."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedelta.cli.main import main

EXPERIMENT = '''
"""Six sites of unequal size; some hold rows back."""
import torch
from torch import nn
from fedelta import (
    SGD, Classification, Examples, FedAdam, FedAvg, FedOpt, Federation, Fixed, Poisson, SiteData, Task, Training
)

BROKEN = ""
RATE = 0.0

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())

def program():
    task = Task(model=Net, objective=Classification(classes=3))
    client = FedAvg(task=task, training=Training(optimizer=SGD(lr=0.1), batch=8))
    return Federation(
        algorithm=FedOpt(client=client, server=FedAdam(lr=0.03)),
        sampling=Poisson(rate=RATE) if RATE else Fixed(size=4),
        rounds=6,
        evaluate_every=4,
        validate_at_sites=True,
    )

def sites():
    return [f"s{i}" for i in range(6)]

def examples(seed, n):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)

def site(name):
    number = int(name[1:])
    if name == BROKEN:
        raise FileNotFoundError(f"{name}.csv is not there")
    held_back = Examples.of(examples(number, 10)) if number % 2 else None
    return SiteData(train=Examples.of(examples(number, 10 + 10 * number)), validation=held_back)

def test():
    return examples(100, 200)
'''


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "exp.py"
    path.write_text(EXPERIMENT)
    return path


def fedelta(capfd: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    printed = capfd.readouterr()
    assert ended.value.code == status, printed.out + printed.err
    return printed.err if status else printed.out


@pytest.mark.parametrize(
    "options", [[], ["--rounds", 3, "--seed", 8], ["--set", "RATE=0.5"], ["--set", "BROKEN=s3", "--seed", 2]]
)
def test_the_bytes_are_those_that_the_run_reports(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[object]
) -> None:
    told: dict[str, Any] = json.loads(fedelta(capfd, "plan", experiment, "--json", *options))
    fedelta(capfd, "run", experiment, "--out", tmp_path / "out", "--workers", 0, *options)
    reports = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    names = ("round", "bytes_down", "bytes_up")
    assert [[each[name] for name in names] for each in told["rounds"]] == [
        [report[name] for name in names] for report in reports
    ]
    assert told["bytes_up"] == sum(report["bytes_up"] for report in reports)
    failing = {site["name"] for site in told["sites"] if site["failures"]}
    assert failing == ({"s3"} if "BROKEN=s3" in options else set())
    assert (told["trained"], told["frozen"], told["test_rows"]) == (6 * 16 + 2 * 16 + 16 * 3 + 3, 16, 200)


def test_what_is_printed(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    before = sorted(tmp_path.rglob("*"))
    printed = fedelta(capfd, "plan", experiment, "--set", "BROKEN=s5", "--bandwidth", 8, "--upload", 2)
    assert sorted(tmp_path.rglob("*")) == before
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0] == "exp: 6 sites, 6 rounds, seed 0"
    assert "norm, statistics 3 33 132 B" in lines
    assert "frozen, at every party 16 64 B" in lines
    assert "smallest (s0) median (s2) largest (s4)" in lines
    assert "rows 10 30 50" in lines
    assert "steps of training a round 2 4 7" in lines
    assert "8/2 Mbit/s, 20 ms" in printed
    assert "besides, the coordinator gets each site's evaluation; its own test set of 200 rows" in lines
    assert any(line.startswith("the coordinator sees each site's update in the clear, its number of") for line in lines)
    assert any(line.startswith("an eavesdropper sees all that travels, each update in the clear") for line in lines)
    assert any(line.startswith("s5 will not answer: ") and "s5.csv is not there" in line for line in lines)
    assert max(map(len, printed.splitlines()[:-2])) <= 100


def test_what_is_wrong_is_one_sentence(experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "there is no experiment file" in fedelta(capfd, "plan", tmp_path / "no.py", status=2)
    assert "--bandwidth" in fedelta(capfd, "plan", experiment, "--bandwidth", 0, status=2)
    error = fedelta(capfd, "plan", experiment, "--bandwidth", "nan", status=2)
    assert "down_mbit must be a finite number" in error
    experiment.write_text(EXPERIMENT.replace("nn.Linear(16, 3)", "nn.Linear(17, 3)"))
    error = fedelta(capfd, "plan", experiment, status=1)
    assert error.startswith("fedelta: RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert len(error.strip().splitlines()) == 1
