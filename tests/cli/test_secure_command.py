"""`--secure` of `fedelta run`, `fedelta plan` and `fedelta finetune`: what is added up, refused, told and resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.cli.in_process import Fedelta, fedelta
from tests.cli.test_finetune import Command, experiment, federation, files, finetune

from fedelta import LoRA, SecureAggregation
from fedelta.core.digest import digest

__all__ = ["fedelta", "files", "finetune"]  # fixtures

EXPERIMENT = '''
"""Ten sites, of 16 to 52 rows."""
import torch
from torch import nn
from fedelta import (
    SGD, AdaptiveClip, Classification, ExampleLevel, Examples, FedAvg, Federation, Fixed, LocalDP, SecureAggregation,
    SiteData, SiteLevel, Task, Training
)
from fedelta.adapters.flora import FLoRA
from fedelta.learning.lora import LoRA

UNIT = "none"
METHOD = "fedavg"
COLLUDING = 0.0

def build():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return LoRA(rank=2, targets=("0",)).apply(net) if METHOD == "flora" else net

def program():
    privacy = {
        "none": lambda: None,
        "example": lambda: ExampleLevel(clip=1.0, noise=4.0),
        "site": lambda: SiteLevel(clip=0.5, noise=4.0),
        "local": lambda: LocalDP(clip=0.5, noise=4.0),
    }[UNIT]()
    task = Task(model=build, objective=Classification(classes=3))
    algorithm = {"fedavg": FedAvg, "flora": FLoRA}[METHOD]
    given = {"collect": SecureAggregation(colluding=COLLUDING)} if COLLUDING else {}
    training = Training(optimizer=SGD(lr=0.1), batch=8)
    return Federation(
        algorithm=algorithm(task=task, training=training),
        rounds=2,
        privacy=privacy,
        evaluate_every=100,
        validate_at_sites=UNIT == "none",
        **given,
    )

def sites():
    return [f"s{i}" for i in range(10)]

def examples(seed, n):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)

def site(name):
    number = int(name[1:])
    held_back = Examples.of(examples(50 + number, 9)) if UNIT == "none" and number % 2 else None
    return SiteData(train=Examples.of(examples(number, 16 + 4 * number)), validation=held_back)

def test():
    return examples(100, 50)
'''


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "exp.py"
    file.write_text(EXPERIMENT)
    return file


QUICK = ["--workers", 0, "--plan", "plain"]


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_a_secure_run_ends_where_one_in_the_clear_does(fedelta: Fedelta, path: Path, tmp_path: Path) -> None:
    clear, wide, narrow = (tmp_path / name for name in ("clear", "wide", "narrow"))
    assert "each way" in fedelta("run", path, "--out", clear, *QUICK)
    printed = fedelta("run", path, "--out", wide, "--secure", *QUICK)
    assert "Updates reach the coordinator under masks, as integers of 64 bits" in printed
    fedelta("run", path, "--out", narrow, "--secure", "--secure-bits", 32, *QUICK)
    models = [load_file(out / "model.safetensors") for out in (clear, wide, narrow)]
    for name, tensor in models[0].items():
        assert tensor.equal(models[1][name])
        assert tensor.allclose(models[2][name], atol=1e-5)
    assert [report["metrics"] for report in rounds(clear)] == [report["metrics"] for report in rounds(wide)]
    assert rounds(clear)[-1]["per_site"]
    assert not rounds(wide)[-1]["per_site"]
    page = (narrow / "report.html").read_text()
    assert "Updates reach the coordinator under masks, as integers of 32 bits" in page
    assert "the coordinator with up to 1 of 10 sites" in page
    assert "Updates reach the coordinator in the clear" in (clear / "report.html").read_text()


def test_a_resume_has_to_be_as_secure_as_the_run(fedelta: Fedelta, path: Path, tmp_path: Path) -> None:
    run = ("run", path, "--out", tmp_path / "out", *QUICK)
    fedelta(*run, "--secure", "--rounds", 1)
    for other in ((), ("--secure", "--secure-bits", 32)):
        error = fedelta(*run, *other, "--resume", status=2)
        assert "continue it as it was started" in error
        assert len(error.strip().splitlines()) == 1
    assert "Resumed after round 1." in fedelta(*run, "--secure", "--secure-bits", 64, "--resume")
    assert [report["round"] for report in rounds(tmp_path / "out")] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        ([], ["--secure-bits", 32], "--secure-bits has no effect without --secure"),
        (["METHOD=flora"], ["--secure"], "reveals only their sum; use Clear() as the collect"),
        (["UNIT=local"], ["--secure", "--secure-bits", 32], "use --secure-bits 64"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_cannot_be_added_up_is_refused(
    fedelta: Fedelta,
    path: Path,
    tmp_path: Path,
    command: str,
    settings: list[str],
    options: list[object],
    sentence: str,
) -> None:
    given = [part for setting in settings for part in ("--set", setting)]
    out = ["--out", tmp_path / "out"] if command == "run" else []
    error = fedelta(command, path, *given, *options, *out, status=2)
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("unit", ["none", "example", "site", "local"])
def test_a_plan_tells_what_a_secure_run_sends(fedelta: Fedelta, path: Path, tmp_path: Path, unit: str) -> None:
    given = ("--set", f"UNIT={unit}", "--secure")
    told = json.loads(fedelta("plan", path, "--json", *given))
    fedelta("run", path, "--out", tmp_path / "out", *given, *QUICK)
    sizes = ("round", "bytes_down", "bytes_up")
    assert [[each[name] for name in sizes] for each in told["rounds"]] == [
        [report[name] for name in sizes] for report in rounds(tmp_path / "out")
    ]
    sum = told["secure_sum"]
    assert (sum["bits"], sum["sites"], sum["quorum"], sum["colluding"], sum["identities"]) == (64, 10, 7, 1, False)


SEES = {  # of each unit: what the coordinator, the coordinator with a site, another site, and an eavesdropper can see
    "none": (
        "of a single site nothing, as long as it keeps to the protocol",
        "sees the sum of the updates of the others, at least 6; nothing bounds",
        "and who else takes part",
        "nothing of an update; on the lines of all sites, the sum of the updates",
    ),
    "example": (
        "protected from: it gets the sum of the updates, which were learned with noise; of a single site its number of",
        "protected from, as each site adds noise of its own",
        "protected from",
        "protected from",
    ),
    "site": (
        "NOT protected from: it gets the sum of the updates, each cut to a norm, without noise; of a single site",
        "NOT protected from: it gets the sum of the updates of the others, at least 6, without noise",
        "protected from",
        "without noise: NOT protected from there, so lines have to be encrypted",
    ),
    "local": (
        "protected from: it gets the sum of the updates with their noise",
        "protected from, as each site adds noise of its own",
        "protected from",
        "protected from",
    ),
}


@pytest.mark.parametrize("unit", SEES)
def test_who_sees_what_with_masks_and_without(fedelta: Fedelta, path: Path, unit: str) -> None:
    given = ("plan", path, "--json", "--set", f"UNIT={unit}")
    who = ["the coordinator", "the coordinator with up to 1 of 10 sites", "another site", "an eavesdropper"]
    masked, clear = (json.loads(fedelta(*given, *more))["trust"] for more in (["--secure"], []))
    for party, seen in zip(who, SEES[unit], strict=True):
        assert seen in masked[party]
        assert party not in clear or seen not in clear[party] or seen == "protected from"
    assert "the coordinator with other sites" in clear
    assert masked["whoever sees the models"] == clear["whoever sees the models"]


def test_an_experiments_own_secure_aggregation_is_kept(fedelta: Fedelta, path: Path) -> None:
    told = json.loads(fedelta("plan", path, "--json", "--set", "COLLUDING=0.2", "--secure", "--secure-bits", 32))
    assert (told["secure_sum"]["bits"], told["secure_sum"]["colluding"]) == (32, 2)


def test_a_printed_plan_has_the_table_of_trust(fedelta: Fedelta, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    lines = [" ".join(line.split()) for line in fedelta("plan", path, "--secure").splitlines()]
    assert any(line.startswith("leaves a site difference (float32,") and "under masks" in line for line in lines)
    for party in ("the coordinator sees", "the coordinator with up to 1 of 10 sites sees", "an eavesdropper"):
        assert sum(line.startswith(party) for line in lines) == 1
    assert any(line.startswith("keys and shares: received") for line in lines)
    assert any(line.startswith("holds a sum hides single updates of 10 sites 7 must answer, 1 may") for line in lines)


LINEAR = ["fedavg", "fedprox", "fedadam", "hetlora", "ffa-lora", "rolora", "fedsa-lora", "fed-sb"]
NOT_LINEAR = ["flexlora", "flora", "fedex-lora", "lora-fair", "flora-na"]


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_method_is_added_up_securely(finetune: Command, name: str) -> None:
    """With a head in closed form first, where the method has one."""
    ends = []
    for more in ([], ["--secure"]):
        out = finetune.folder / f"out{len(more)}"
        finetune("--algorithm", name, "--rounds", 2, *more, sites=4, out=out)
        ends.append({file.relative_to(out): load_file(file) for file in out.glob("model*/**/*.safetensors")})
        assert not any(report["absent"] for report in rounds(out))
    clear, masked = ends
    assert clear.keys() == masked.keys() != set()
    for file, tensors in clear.items():
        assert all(tensor.equal(masked[file][key]) for key, tensor in tensors.items())
    card = next((finetune.folder / "out1").glob("model*/**/README.md")).read_text()
    assert "| updates reached the coordinator | under masks, as integers of 64 bits" in card


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_method_that_needs_single_updates_is_refused(finetune: Command, name: str) -> None:
    error = finetune("--algorithm", name, "--secure", sites=4, status=2)
    assert error.startswith("fedelta: ")
    assert "SecureAggregation" in error
    assert len(error.strip().splitlines()) == 1
    assert not (finetune.folder / "out").exists()


def test_noise_in_shares_is_asked_for_by_its_unit(finetune: Command) -> None:
    amount = ["--unit", "distributed", "--clip", 1.0, "--epsilon", 8.0, "--rounds", 2]
    finetune(*amount, "--secure", sites=4)
    out = finetune.folder / "out"
    card = next(out.glob("model*/**/README.md")).read_text()
    assert "| updates reached the coordinator | under masks, as integers of 16 bits" in card
    assert 7.5 < rounds(out)[-1]["metrics"]["epsilon"] <= 8.0
    for wrong, sentence in (
        ([*amount], "--unit distributed needs --secure"),
        ([*amount[:2], *amount[4:], "--secure"], "--unit distributed needs --clip"),
        ([*amount, "--secure", "--secure-bits", 64], "leave it out"),
    ):
        assert sentence in finetune(*wrong, sites=4, out=finetune.folder / "other", status=2)


def test_integers_of_32_bits_are_spread_over_the_rows_of_the_largest_site(finetune: Command, bert: Path) -> None:
    finetune("--secure", "--secure-bits", 32, sites=4)
    plain = federation(bert, LoRA(rank=8), 5e-4)
    largest = 6.0  # of 24 rows for training
    collect = SecureAggregation(bits=32, weight_bound=largest)
    assert experiment(finetune) == digest(replace(plain, collect=collect))
    assert "--secure-bits has no effect" in finetune("--secure-bits", 32, sites=4, status=2)
