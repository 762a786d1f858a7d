"""The matrix of what goes together: what it allows runs, what it refuses says what to use, and the docs have it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.in_process import Fedelta, fedelta

import fedelta as fedelta_names
from fedelta.algorithms.federation import Federation
from fedelta.cli.combinations import (
    CLASSES,
    INPUTS,
    PROTECTIONS,
    SITES,
    TOKENS,
    Part,
    Row,
    Settings,
    combined,
    markdown,
    matrix,
    parts,
    refusal,
)
from fedelta.core.examples import Examples
from fedelta.core.program import SiteData, run
from fedelta.fleet.local import Local

__all__ = ["fedelta"]  # a fixture
SECURITY = Path(__file__).resolve().parents[2] / "docs" / "security.md"
ROWS = [(part.title, row) for part in parts() for row in part.rows]
IMPERATIVES = ("use", "leave", "give", "take", "ask", "lower", "raise", "set")


def points(name: str) -> SiteData:
    number = int(name[-1])
    x = torch.randn(10 + number, INPUTS, generator=torch.Generator().manual_seed(number))
    rows = Examples({"x": x}, (x.sum(dim=1) > 0).long())
    return SiteData(train=rows, validation=rows)


def texts(name: str) -> SiteData:
    drawn = torch.Generator().manual_seed(int(name[-1]))
    ids = torch.randint(1, TOKENS, (8, 5), generator=drawn)
    return SiteData(train=Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 0] % CLASSES))


@pytest.mark.parametrize(("title", "row"), ROWS, ids=[f"{title}: {row.name}" for title, row in ROWS])
def test_what_is_allowed_runs_and_what_is_refused_says_what_to_use(title: str, row: Row) -> None:
    data = texts if row.name.startswith("FedBPT") else points
    for protection in PROTECTIONS:
        for settings in combined(row, protection):
            why = refusal(settings)
            if why is None:
                runs(settings, data)
            else:
                check_sentence(why)


def runs(settings: Settings, data: Any) -> None:
    """One round, after that of a closed-form start if there is one, in which every site that is asked takes part."""
    measured = settings.get("validate_at_sites", False)  # otherwise not: to account for what is spent takes seconds
    program: Federation[Any] = Federation(**{**settings, "evaluate_every": 1 if measured else 10})
    rounds = run(program, Local(program, data, SITES))
    for _ in range(1 if program.start is None else 2):
        state, report = next(rounds)
        assert (report.absent, report.unmeasured) == ({}, {})
        assert len(report.cohort) >= 3
        assert program.algorithm.parameters(state.algorithm).vector.isfinite().all()


def check_sentence(why: str) -> None:
    assert "\n" not in why
    assert ". " not in why
    assert not why.endswith(".")
    _, _, cure = why.partition("; ") if "; " in why else why.rpartition(", so ")
    assert re.search(rf"\b({'|'.join(IMPERATIVES)})\b", cure), why


def test_the_matrix_has_what_is_known_of_some_cells() -> None:
    text = markdown(matrix())
    shown = {line.split(" | ")[0].strip("| "): line.rstrip(" |").split(" | ")[1:] for line in text.splitlines()[::-1]}
    assert shown["FedAvg"][0] == "✓ / ✓ / ✓"
    exact = shown["FlexLoRA"][0]
    assert re.fullmatch(r"✓ / \d+ / \d+", exact)
    (sentence,) = (line for line in text.splitlines() if line.startswith(f"{exact.split(' / ')[1]}. "))
    assert "works on single updates, but SecureAggregation(" in sentence
    assert shown["SiteLevel(bands=2)"][-4:] == ["✓ / ✓ / ✓", "–", "–", "–"]
    assert re.fullmatch(r"\d+ / ✓ / \d+", shown["FedAvg"][5])  # DistributedDP


def test_no_algorithm_is_forgotten() -> None:
    known = {name for name in fedelta_names.__all__ if hasattr(getattr(fedelta_names, name), "local_many")}
    assert {"FedAvg", "FedBPT", "OffsiteTuning"} <= known
    assert known <= {row.name.partition(",")[0] for row in parts()[0].rows}


def test_each_refusal_has_one_number_and_each_number_is_used() -> None:
    numbers = matrix().numbers
    assert sorted(numbers.values()) == list(range(1, len(numbers) + 1))
    cells = [line for _, lines in matrix().parts for line in lines]
    assert {refusal for line in cells for cell in line for refusal in cell.refusals} == {None, *numbers}


def test_the_command_prints_what_the_docs_have(fedelta: Fedelta) -> None:
    printed = fedelta("combinations", "--markdown")
    _, _, rest = SECURITY.read_text().partition("<!-- combinations -->\n\n")
    section, _, _ = rest.partition("\n<!-- /combinations -->")
    assert section == printed, "docs/security.md is not what `fedelta combinations --markdown` prints"


def test_the_command_shows_the_same_as_a_table(fedelta: Fedelta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    printed = [re.split(r"\s{2,}", line.strip()) for line in fedelta("combinations").splitlines()]
    for part, lines in matrix().parts:
        for row, cells in zip(part.rows, lines, strict=True):
            assert [row.name, *map(matrix().shown, cells)] in printed
    assert all([f"{number}. {sentence}"] in printed for sentence, number in matrix().numbers.items())


def test_a_narrow_terminal_has_a_table_for_each_collect(fedelta: Fedelta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = fedelta("combinations")
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    [fedavg, *_] = matrix().parts[0][1]
    for place in range(3):
        assert ["FedAvg", *(matrix().shown(cell, slice(place, place + 1)) for cell in fedavg)] in lines
    assert "…" not in printed.replace("public=…", "")


@pytest.mark.parametrize("part", parts(), ids=lambda part: part.title)
def test_names_are_told_apart(part: Part) -> None:
    assert len({row.name for row in part.rows}) == len(part.rows)
    assert len({protection.name for protection in PROTECTIONS}) == len(PROTECTIONS)
