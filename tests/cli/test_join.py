"""`fedelta join` before anybody is connected: a dry run, and what is refused."""

from pathlib import Path

import pytest
from tests.cli.in_process import Fedelta, fedelta

from fedelta.cli.main import main
from fedelta.fleet.certificates import CertificateAuthority

__all__ = ["fedelta"]  # a fixture

EXPERIMENT = '''
"""Whoever reads data fails."""
from functools import partial
from torch import nn
from fedelta import SGD, Classification, FedAvg, Federation, SecureAggregation, Task, Training

ROUNDS = 10
MASKS = True
KNOWN = True

def program():
    task = Task(model=partial(nn.Linear, 6, 3), objective=Classification(classes=3))
    algorithm = FedAvg(task=task, training=Training(optimizer=SGD(lr=0.1), batch=4))
    return Federation(algorithm=algorithm, rounds=ROUNDS, **({"collect": SecureAggregation()} if MASKS else {}))

def site(name):
    raise RuntimeError("the data were read")

def sites():
    if not KNOWN:
        raise OSError("no such folder")
    return ["a", "b", "c"]
'''
POLICY = """
[experiments]
digests = ["{digest}"]
[work]
requests = ["train"]
rounds = 10
[leaves]
tensors = ["weight", "bias"]
parameters = 21
bytes_per_reply = 1_000
bytes_per_round = 2_000
bytes_per_day = 20_000
[privacy]
unit = "any"
epsilon = "any"
delta = "any"
noise = "any"
[secure]
collect = ["masks"]
identities = false
least = 3
[hours]
zone = "UTC"
open = [{{days = ["sat", "sun"], from = "00:00", to = "24:00"}}]
"""


@pytest.fixture(autouse=True)
def experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT)
    return path


def policy(printed: str) -> str:
    """One that names the digest that was printed."""
    (line,) = (line for line in printed.splitlines() if line.startswith("experiment "))
    Path("policy.toml").write_text(POLICY.format(digest=line.split()[1]))
    return "policy.toml"


def words(printed: str) -> str:
    """Without the lines that a terminal makes of it."""
    return " ".join(printed.split())


def test_a_dry_run_tells_what_would_leave_and_reads_no_data(fedelta: Fedelta, tmp_path: Path) -> None:
    printed = fedelta("join", "experiment.py", "--dry-run", "--name", "a")
    for text in (
        "a has not connected to anybody",
        "computed train; 10 rounds; FedAvg, Training(",
        "weight 3 × 6 18",
        "bias 3 3",
        "in all 21",
        "under masks: the coordinator sees sums over 3 sites or more",
        "protected no guarantee of privacy",
        "the coordinator sees the sums of the updates",
        "this site would take part, whatever this is; give --policy",
    ):
        assert text in words(printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiment.py"]


def test_a_policy_that_is_met_is_said_so_demand_by_demand(fedelta: Fedelta) -> None:
    path = policy(fedelta("join", "experiment.py", "--dry-run", "--name", "a"))
    printed = fedelta("join", "experiment.py", "--dry-run", "--name", "a", "--policy", path)
    assert "This site would join." in printed
    assert "hours sat, sun 00:00-24:00 in UTC" in words(printed)
    assert "NOT MET" not in printed
    assert sum(line.startswith("met ") for line in printed.splitlines()) == 15


@pytest.mark.parametrize(
    ("setting", "keys"),
    [
        ("ROUNDS=11", ["work.rounds"]),  # of which the digest says nothing
        ("MASKS=false", ["experiments.digests", "secure.collect", "secure.least"]),
    ],
)
def test_a_policy_that_is_not_met_ends_with_status_2_and_each_reason(
    fedelta: Fedelta, capfd: pytest.CaptureFixture[str], setting: str, keys: list[str]
) -> None:
    path = policy(fedelta("join", "experiment.py", "--dry-run", "--name", "a"))
    with pytest.raises(SystemExit) as end:
        main(["join", "experiment.py", "--dry-run", "--name", "a", "--policy", path, "--set", setting])
    printed = capfd.readouterr().out
    assert end.value.code == 2
    assert f"This site would not join: {len(keys)} of 15 demands are not met." in printed
    unmet = [line.split()[2] for line in printed.splitlines() if line.startswith("NOT MET")]
    assert unmet == keys


def test_a_site_that_does_not_know_the_others_is_told_what_it_knows(fedelta: Fedelta) -> None:
    printed = fedelta("join", "experiment.py", "--dry-run", "--name", "a", "--set", "KNOWN=false")
    assert "as many bytes as each reply has, which is not known before" in words(printed)


def test_the_name_may_be_that_of_the_certificate(fedelta: Fedelta, tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path / "ca").issue("b", out=tmp_path / "own")
    assert fedelta("join", "experiment.py", "--dry-run", "--certificates", "own").startswith("b has not connected")
    assert "--name says 'a'" in fedelta(
        "join", "experiment.py", "--dry-run", "--certificates", "own", "--name", "a", status=2
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--dry-run"], "needs --name"),
        (["--dry-run", "--name", "d"], "has no site 'd'; it has a, b, c"),
        (["--dry-run", "--name", "a", "--policy", "no.toml"], "no.toml cannot be read"),
        (["--dry-run", "--name", "a", "--set", "ROUND=1"], "no constant ROUND"),
        (["--name", "a", "--insecure"], "Missing option '--at'"),
    ],
)
def test_what_is_missing_is_named(fedelta: Fedelta, arguments: list[str], why: str) -> None:
    assert why in fedelta("join", "experiment.py", *arguments, status=2)
