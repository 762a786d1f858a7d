"""What a user is told of privacy by `fedelta run` and `fedelta plan`: before, during and after a run, and on errors."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fedelta.cli.main import main
from fedelta.privacy.accounting import epsilon
from fedelta.privacy.ledger import verify

EXPERIMENT = '''
"""Four sites of 16 to 64 rows."""
import torch
from torch import nn
from fedelta import (
    SGD, AdaptiveClip, All, Classification, Examples, ExampleLevel, FedAvg, Federation, FileLedger, Fixed, LocalDP,
    Poisson, SiteData, SiteLevel, Task, Training
)

UNIT = "example"
EPSILON = 4.0
NOISE = 0.0
RATE = 0.0
ACCOUNTANT = "rdp"
SIZE = 0
LEDGERS = ""

def program():
    given = {"epsilon": EPSILON or None, "noise": NOISE or None, "accountant": ACCOUNTANT}
    privacy = {
        "none": lambda: None,
        "example": lambda: ExampleLevel(clip=1.0, **given),
        "site": lambda: SiteLevel(clip=0.5, **given),
        "adaptive": lambda: SiteLevel(clip=AdaptiveClip(), **given),
        "local": lambda: LocalDP(clip=0.5, **given),
    }[UNIT]()
    task = Task(model=lambda: nn.Linear(6, 3), objective=Classification(classes=3))
    return Federation(
        algorithm=FedAvg(task=task, training=Training(optimizer=SGD(lr=0.1), batch=8)),
        rounds=3,
        privacy=privacy,
        evaluate_every=100 if NOISE else 1,
        sampling=Poisson(rate=RATE) if RATE else Fixed(size=SIZE) if SIZE else All(),
    )

def sites():
    return [f"s{i}" for i in range(4)]

def examples(seed, n):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)

def site(name):
    number = int(name[1:])
    ledger = FileLedger.open(f"{LEDGERS}/{name}.jsonl", None) if LEDGERS else None
    return SiteData(train=Examples.of(examples(number, 16 + 16 * number)), ledger=ledger)

def test():
    return examples(100, 50)
'''


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "exp.py"
    path.write_text(EXPERIMENT)
    return path


def fedelta(capfd: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    printed = capfd.readouterr()
    assert ended.value.code == status, printed.out + printed.err
    if status:
        assert len(printed.err.strip().splitlines()) == 1, printed.err
    return printed.err if status else printed.out


def ran(capfd: pytest.CaptureFixture[str], experiment: Path, out: str, *options: object, status: int = 0) -> str:
    settings = [word for option in options if "=" in str(option) for word in ("--set", option)]
    others = [option for option in options if "=" not in str(option)]
    folder = experiment.parent / out
    return fedelta(
        capfd, "run", experiment, "--out", folder, "--workers", 0, "--plan", "plain", *settings, *others, status=status
    )


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_a_run_says_what_it_protects_and_what_it_has_spent(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = ran(capfd, experiment, "out")
    assert "each row of a site is protected from the coordinator and whoever sees the models; epsilon 4" in printed
    assert "noise multiplier 1.18 to 1.77 by site." in printed
    spent = [report["metrics"]["epsilon"] for report in rounds(tmp_path / "out")]
    assert 0 < spent[0] < spent[1] < spent[2] <= 4.0
    found = verify(tmp_path / "out" / "ledger.jsonl", tmp_path / "out" / "ledger.key.pub")
    assert spent[2] == pytest.approx(epsilon(found, delta=1e-5, accountant="rdp", unit="example"))
    assert "epsilon 4.000  " in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Epsilon 4 at delta 1e-05 is spent, of 4, as the accountant RDP computes it." in page
    assert "Epsilon by round." in page
    assert "DP-SGD at each site" in page
    assert "Poisson sample at rate 0.125: Gaussian noise 1.176" in page


@pytest.mark.parametrize(("unit", "noise"), [("example", 4.0), ("site", 3.0), ("local", 3.0)])
def test_a_run_whose_budget_is_spent_ends_and_says_so(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], unit: str, noise: float
) -> None:
    printed = ran(capfd, experiment, "out", f"UNIT={unit}", f"NOISE={noise}", "--rounds", 40)
    reports = rounds(tmp_path / "out")
    assert f"it lasts for {len(reports)} of 40 rounds" in printed
    assert f"Ended after round {len(reports)}: its privacy budget (epsilon 4 at delta 1e-05) is spent." in printed
    assert 1 < len(reports) < 40
    assert "test_loss" in reports[-1]["metrics"]  # the last round is evaluated, though no one knew that it would be
    assert "epsilon" not in reports[0]["metrics"]
    found = verify(tmp_path / "out" / "ledger.jsonl", tmp_path / "out" / "ledger.key.pub")
    what: dict[str, Any] = {"delta": 1e-5, "accountant": "rdp", "unit": "example" if unit == "example" else "site"}
    more = [*found, *(release for release in found if release.round == 1)]
    assert epsilon(found, **what) <= 4.0 < epsilon(more, **what)


def test_a_round_that_was_done_twice_counts_twice(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As after a kill between a release and its commit: the ledger has a round that the run has not."""
    whole = ran(capfd, experiment, "whole", "NOISE=4", "--rounds", 40)
    done = len(rounds(tmp_path / "whole"))
    ran(capfd, experiment, "killed", "NOISE=4", "--rounds", 2)
    shutil.copytree(tmp_path / "killed", tmp_path / "further")
    ran(capfd, experiment, "further", "NOISE=4", "--rounds", 3, "--resume")
    shutil.copy(tmp_path / "further" / "ledger.jsonl", tmp_path / "killed")
    again = ran(capfd, experiment, "killed", "NOISE=4", "--rounds", 40, "--resume")
    assert f"Ended after round {done}: its privacy budget" in whole
    assert f"Ended after round {done - 1}: its privacy budget" in again


def test_runs_that_share_a_ledger_share_its_budget(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = ("--ledger", tmp_path / "all.jsonl")
    ran(capfd, experiment, "first", *shared)
    error = ran(capfd, experiment, "second", *shared, status=2)
    assert "not one round fits into epsilon 4 at delta 1e-05, of which 4 is spent already" in error
    assert not (tmp_path / "second").exists()
    printed = ran(capfd, experiment, "second", *shared, "EPSILON=6")
    assert "of 3 rounds." in printed
    found = verify(tmp_path / "all.jsonl", tmp_path / "all.key.pub")
    assert 4.0 < epsilon(found, delta=1e-5, accountant="rdp", unit="example") <= 6.0


def test_what_cannot_be_is_refused_before_a_folder_is_made(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for sentence, options in (
        ("not one round fits into epsilon 1 at delta 1e-05", ["NOISE=0.1", "EPSILON=1"]),
        ("not one round fits into epsilon 1 at delta 1e-05", ["UNIT=site", "NOISE=0.1", "EPSILON=1"]),
        ("give a fixed norm as the clip (--clip C)", ["UNIT=adaptive"]),
        ("use accountant 'rdp'", ["UNIT=site", "NOISE=1", "EPSILON=0", "ACCOUNTANT=pld", "SIZE=2"]),
        ("is the name of a key", ["--ledger", tmp_path / "x.key"]),
    ):
        assert sentence in ran(capfd, experiment, "out", *options, status=2)
        assert not (tmp_path / "out").exists()


def test_a_ledger_that_was_changed_or_lost_its_key_is_refused(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran(capfd, experiment, "out", "--rounds", 1)
    ledger = tmp_path / "out" / "ledger.jsonl"
    whole = ledger.read_text()
    ledger.write_text(whole.replace('"round":1', '"round":2', 1))
    assert "line 2 of" in ran(capfd, experiment, "out", "--resume", "--rounds", 2, status=2)
    ledger.write_text(whole)
    (tmp_path / "out" / "ledger.key").unlink()
    assert "has no key" in ran(capfd, experiment, "out", "--resume", "--rounds", 2, status=2)


def test_sites_may_have_ledgers_of_their_own_also_in_workers(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    ran(capfd, experiment, "without")
    settings = ("--set", f"LEDGERS={own}")
    fedelta(capfd, "run", experiment, "--out", tmp_path / "with", "--workers", 2, "--plan", "plain", *settings)
    manifests = [json.loads((tmp_path / out / "manifest.json").read_text()) for out in ("without", "with")]
    assert manifests[0]["data"] == manifests[1]["data"]
    assert manifests[0]["experiment"] == manifests[1]["experiment"]
    found = verify(tmp_path / "with" / "ledger.jsonl", tmp_path / "with" / "ledger.key.pub")
    for name in ("s0", "s3"):
        assert verify(own / f"{name}.jsonl", None) == [release for release in found if release.of == name]
        assert sum(release.of == name for release in found) == 3


# What a plan says


def planned(capfd: pytest.CaptureFixture[str], experiment: Path, *settings: str) -> tuple[list[str], dict[str, Any]]:
    given = [word for setting in settings for word in ("--set", setting)]
    as_json = fedelta(capfd, "plan", experiment, "--json", *given)
    return list(given), json.loads(as_json)


@pytest.mark.parametrize(
    ("settings", "coordinator", "models"),
    [
        (
            ["UNIT=site"],
            "NOT protected from: it gets each site's update in the clear, cut to a norm, no loss and no number of "
            "rows; it is trusted to add the noise",
            "protected from",
        ),
        (
            ["UNIT=site", "RATE=0.5"],
            "tell nobody which",
            "protected from as long as it does not learn who was asked",
        ),
        (["UNIT=local"], "protected from: it gets each site's update with its noise", "protected from"),
        (["UNIT=none"], "sees each site's update in the clear", "nothing bounds what they tell about a row"),
    ],
    ids=str,
)
def test_a_plan_says_who_is_protected_from_whom(
    experiment: Path, capfd: pytest.CaptureFixture[str], settings: list[str], coordinator: str, models: str
) -> None:
    _, told = planned(capfd, experiment, *settings)
    found, trust = told["privacy"], told["trust"]
    assert coordinator in trust["the coordinator"]
    assert trust["whoever sees the models"] == models
    leaving = {piece["name"] for piece in told["leaves_a_site"]}
    assert ("sum/loss" in leaving) == ("UNIT=none" in settings)
    if "UNIT=none" in settings:
        assert found["protected"] is None
    else:
        (tier,) = found["tiers"][:1]
        assert tier["rounds"] == 3
        assert 3.9 <= tier["epsilon"] <= 4.0


def test_a_plan_is_printed_with_the_noise_of_each_size_of_site(
    experiment: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = fedelta(capfd, "plan", experiment)
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "protected each row of a site" in lines
    assert "noise multiplier 1.77 (smallest), 1.45 (median), 1.18 (largest); solved, so that the whole run" in " ".join(
        lines
    )
    assert any(line.startswith("withheld what sites measure in training") for line in lines)
    assert any("each site's update, which was learned with noise, and its number of rows" in line for line in lines)
    printed = fedelta(capfd, "plan", experiment, "--set", "UNIT=site", "--set", "NOISE=3", "--rounds", 40)
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert any(line.startswith("the budget lasts for") and line.endswith("of 40 rounds") for line in lines)
    printed = fedelta(capfd, "plan", experiment, "--set", "UNIT=none")
    assert "no guarantee: no noise is added" in printed
