"""`fedelta departures`: a site's log is checked and added up."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from tests.cli.in_process import Fedelta, fedelta

from fedelta.core.messages import Reply, Request
from fedelta.fleet.departures import FILE, Departure, Departures

__all__ = ["fedelta"]  # a fixture

TEN = datetime(2026, 11, 22, 10, tzinfo=UTC)


def words(printed: str) -> str:
    """Without the lines that a terminal makes of it."""
    return " ".join(printed.split())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    log = Departures.open(tmp_path / FILE)
    for round in (1, 2):
        request = Request(to="a", op="train", round=round)
        reply = Reply.to_request(request, {f"part-{i}": torch.zeros(2, 3) for i in range(6)})
        log.record(Departure.of("ab" * 32, request, reply), TEN)
    log.record(Departure.of("ab" * 32, *_step("keys")), TEN)
    log.record(Departure.of("ab" * 32, *_step("reveal")), TEN)
    refused = Request(to="a", op="evaluate", round=2)
    log.record(Departure.of("cd" * 32, refused, Reply.failure(refused, "it [may] not")), TEN)
    return tmp_path / FILE


def _step(name: str) -> tuple[Request, Reply]:
    request = Request(to="a", op=f"train/{name}", round=2)
    return request, Reply.to_request(request, {})


def test_a_log_is_checked_and_added_up(fedelta: Fedelta, log: Path) -> None:
    printed = fedelta("departures", log.parent)
    assert "5 replies. Nothing was altered, removed or moved." in printed
    for text in (
        "abababababababab… 2 train, 2 steps of secure",
        "cdcdcdcdcdcdcdcd… none 1 1",
        "part-0:float32[2,3]",
        "… 2 more",
    ):
        assert text in words(printed)
    assert "it [may] not" in words(printed)
    head = printed.partition("head ")[2].split()[0]
    assert fedelta("departures", log, "--last", 1, "--head", head).count("2026-11-22") == 1
    found = json.loads(fedelta("departures", log, "--json"))
    assert found["head"] == head
    assert [one["op"] for one in found["departures"]] == ["train", "train", "train/keys", "train/reveal", "evaluate"]


def test_a_log_that_was_changed_is_refused(fedelta: Fedelta, log: Path) -> None:
    text = log.read_text()
    log.write_text(text.replace('"round":2', '"round":3', 1))
    assert "was altered" in fedelta("departures", log, status=2)
    first, *_ = text.splitlines(keepends=True)
    log.write_text(first)
    head = json.loads(text.splitlines()[2])["seal"]
    assert "departures.jsonl" in fedelta("departures", log, "--head", head, status=2)
    assert "nothing.jsonl" in fedelta("departures", log.with_name("nothing.jsonl"), status=2)
