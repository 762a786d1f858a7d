"""`fedelta ledger` on ledgers that were written for the purpose."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedelta.cli.main import main
from fedelta.cli.releases import event_text
from fedelta.core.keys import new_key
from fedelta.core.release import Release
from fedelta.privacy.accounting import epsilon
from fedelta.privacy.events import concentrated, from_plain, gaussian, no_op, steps, without_replacement_gaussian
from fedelta.privacy.ledger import FileLedger


def rows(site: str, round: int, noise: float) -> Release:
    event: dict[str, Any] = {"self_composed": {"count": 4, "event": gaussian(noise)}}
    return Release(event=event, unit="example", relation="replace_special", of=site, job="j" * 20, round=round)


RELEASES = [
    *(rows(site, round, noise) for round in (1, 2, 3) for site, noise in (("a", 2.0), ("b", 1.5), ("c", 2.0))),
    Release(event=gaussian(3.0), unit="example", relation="replace_special", of="b", job="k" * 20),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "160")
    new_key(tmp_path / "ledger.key")
    FileLedger.open(tmp_path / "ledger.jsonl", tmp_path / "ledger.key").record(*RELEASES)
    return tmp_path


def told(capfd: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["ledger", *map(str, arguments)])
    printed = capfd.readouterr()
    assert ended.value.code == status, printed.out + printed.err
    if status:
        assert len(printed.err.strip().splitlines()) == 1, printed.err
    return printed.err if status else printed.out


def test_alike_releases_are_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = told(capfd, folder / "ledger.jsonl", "--sites")
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "jjjjjjjj example 4 times: Gaussian noise 2 2 1–3 6" in lines
    assert "jjjjjjjj example 4 times: Gaussian noise 1.5 1 1–3 3" in lines
    assert "kkkkkkkk example Gaussian noise 3 1 0 1" in lines
    largest = epsilon(RELEASES, delta=1e-5, unit="example", of="b")
    assert f"each row: epsilon {largest:.4g} at delta 1e-05 (largest of all sites; PLD)" in lines
    assert f"a: epsilon {epsilon(RELEASES, delta=1e-5, unit='example', of='a'):.4g}" in lines
    assert "each site as a whole: no guarantee at delta 1e-05 (largest of all sites; PLD)" in lines
    assert "Each line is signed, and was checked with" in printed


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (steps(1 / 12, 1.1312, 24), "24 times: Poisson sample at rate 0.08333: Gaussian noise 1.131"),
        ({"composed": [gaussian(1.0), no_op()]}, "Gaussian noise 1 and nothing new"),
        ({"tree_aggregation": {"noise_multiplier": 1.1, "steps": 100}}, "Gaussian noise 1.1 on a tree of 100 steps"),
        (
            {"self_composed": {"count": 3, "event": concentrated(0.125)}},
            "3 times: sum of discrete Gaussian noise: concentrated, rho 0.125",
        ),
        ({"non_private": {}}, "everything: it is not private"),
    ],
)
def test_events_in_words(event: Mapping[str, Any], text: str) -> None:
    from_plain(event)  # there is such an event
    assert event_text(event) == text


def test_a_folder_and_json(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = json.loads(told(capfd, folder, "--json", "--delta", 1e-6, "--sites"))
    assert (found["releases"], found["signed"], found["delta"]) == (10, True, 1e-6)
    assert [group["releases"] for group in found["groups"]] == [6, 3, 1]
    assert found["epsilon"]["example"]["epsilon"] == epsilon(RELEASES, delta=1e-6, unit="example")
    assert found["epsilon"]["example"]["sites"].keys() == {"a", "b", "c"}
    assert found["epsilon"]["site"]["epsilon"] is None
    ledger = FileLedger.open(folder / "ledger.jsonl", folder / "ledger.key")
    assert found["head"] == ledger.head
    ledger.record(RELEASES[0])
    assert ledger.head in told(capfd, folder, "--head", found["head"], "--unit", "example")


def test_an_unsigned_ledger_is_said_to_be_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cohort = Release(event=without_replacement_gaussian(2, 20, 1.0), unit="site", relation="replace_one", round=1)
    FileLedger.open(tmp_path / "plain.jsonl", None).record(cohort)
    printed = told(capfd, tmp_path / "plain.jsonl", "--unit", "site")
    assert "not signed: this shows damage, and not what anybody changed on purpose" in printed
    assert re.search(r"each site as a whole: epsilon [\d.]+ at delta 1e-05 \(all sites alike; RDP\)", printed)
    assert re.search(r"2 of 20: Gaussian noise 1 +all together", printed)


def test_what_is_wrong_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ledger, key = folder / "ledger.jsonl", folder / "ledger.key.pub"
    assert "there is no ledger" in told(capfd, folder / "none.jsonl", status=2)
    assert "has no line with the hash 00ff" in told(capfd, ledger, "--head", "00ff", status=2)
    assert "no public key" in told(capfd, ledger, "--key", ledger, status=2)
    new_key(folder / "other.key")
    assert "not signed with this key" in told(capfd, ledger, "--key", folder / "other.key.pub", status=2)
    hidden = key.rename(folder / "kept")
    assert "is signed, and" in told(capfd, ledger, status=2)
    assert "10 releases" in told(capfd, ledger, "--key", hidden, "--unit", "example")
    ledger.write_bytes(ledger.read_bytes().replace(b'"round":2', b'"round":1', 1))
    assert "line 4 of" in told(capfd, ledger, "--key", hidden, status=2)
