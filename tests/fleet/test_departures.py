"""A site's log has what left, counts it over restarts, and shows what happened to the file."""

import hashlib
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core import codec
from fedelta.core.errors import BadLedger
from fedelta.core.messages import Reply, Request
from fedelta.fleet.departures import DAY, Departure, Departures, Piece, Total, read, totals

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def departure(
    size: int = 100, *, round: int = 1, op: str = "train", experiment: str = "e", error: str | None = None
) -> Departure:
    return Departure(experiment=experiment, job="", round=round, op=op, attempt=0, bytes=size, sha256="00", error=error)


def request(op: str = "train", round: int = 1, job: str = "") -> Request:
    return Request(to="a", op=op, round=round, job=job)


def test_a_reply_is_described_by_what_would_be_sent() -> None:
    body = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(2)}
    reply = Reply(sender="a", answers="", round=1, body=body, meta={"b": 1, "a": 2})
    found = Departure.of("digest", request(), reply)
    message = codec.encode(body, {"b": 1, "a": 2})
    assert (found.bytes, found.sha256) == (len(message), hashlib.sha256(message).hexdigest())
    assert found.tensors == (
        Piece(name="n", dtype="int64", shape=()),
        Piece(name="w", dtype="float32", shape=(2, 3)),
    )
    assert (found.experiment, found.op, found.round, found.meta, found.error) == (
        "digest",
        "train",
        1,
        ("a", "b"),
        None,
    )


def test_a_failure_is_its_text_and_nothing_else() -> None:
    found = Departure.of("digest", request(op="x" * 9999, job="y" * 9999), Reply.failure(request(), "é" * 1000))
    assert (found.bytes, found.tensors) == (2000, ())
    assert found.sha256 == hashlib.sha256(("é" * 1000).encode()).hexdigest()
    assert [len(found.error or ""), len(found.op), len(found.job)] == [600] * 3  # others choose these texts


def test_nothing_is_nothing() -> None:
    assert Departure.of("", request(), Reply.to_request(request(), {})).bytes == 0


texts = st.text(st.characters(exclude_categories=()), max_size=8)
departures = st.builds(
    Departure,
    experiment=texts,
    job=texts,
    round=st.integers(-1, 2**63),
    op=texts,
    attempt=st.integers(0, 9),
    bytes=st.integers(0, 2**70),
    sha256=texts,
    tensors=st.lists(
        st.builds(Piece, name=texts, dtype=texts, shape=st.lists(st.integers(0, 9)).map(tuple)), max_size=3
    ).map(tuple),
    meta=st.lists(texts, max_size=2).map(tuple),
    error=st.none() | texts,
)


@settings(max_examples=40)
@given(recorded=st.lists(departures, max_size=4), signed=st.booleans())
def test_what_was_recorded_is_read_back(
    recorded: list[Departure], signed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "departures"
    log = Departures.open(path, KEY if signed else None)
    for number, one in enumerate(recorded):
        log.record(one, NOON + timedelta(seconds=number))
    lines = read(path, KEY.public_key() if signed else None)
    assert [line.entry for line in lines] == recorded
    assert [line.time for line in lines] == [NOON + timedelta(seconds=number) for number in range(len(recorded))]
    assert totals(lines) == log.totals() == Departures.open(path, KEY if signed else None).totals()


def test_a_restart_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "departures"
    for round in (1, 2, 3):
        log = Departures.open(path)
        log.record(departure(round, round=round), NOON)
        log.record(departure(10, op="evaluate", round=round), NOON)
    spent = Departures.open(path).spent("e", 3, NOON)
    assert (spent.answers, spent.round_bytes, spent.day_bytes) == ({"train": 3, "evaluate": 3}, 13, 36)


def test_two_objects_count_each_other(tmp_path: Path) -> None:
    one, other = Departures.open(tmp_path / "log"), Departures.open(tmp_path / "log")
    one.record(departure(5), NOON)
    other.record(departure(7, experiment="f"), NOON)
    assert one.spent("e", 1, NOON).day_bytes == 12
    assert one.spent("e", 1, NOON).round_bytes == 5
    one.record(departure(3), NOON)
    assert other.record(departure(), NOON, lambda spent: f"{spent.day_bytes} already") == "15 already"


def test_failures_count_as_bytes_and_not_as_answers(tmp_path: Path) -> None:
    log = Departures.open(tmp_path / "log")
    log.record(departure(9, error="no"), NOON)
    spent = log.spent("e", 1, NOON)
    assert (spent.answers, spent.round_bytes, spent.day_bytes) == ({}, 9, 9)
    assert log.totals() == {"e": Total(answers={}, failures=1, rounds=1, bytes=9)}


def test_what_is_not_allowed_is_not_taken_down(tmp_path: Path) -> None:
    log = Departures.open(tmp_path / "log")
    assert log.record(departure(), NOON, lambda spent: f"{spent.day_bytes} already") == "0 already"
    assert log.totals() == {}
    assert read(tmp_path / "log") == []


def test_a_day_is_24_hours(tmp_path: Path) -> None:
    log = Departures.open(tmp_path / "log")
    log.record(departure(1), NOON)
    log.record(departure(2), NOON + timedelta(hours=23))
    last = NOON + DAY - timedelta(microseconds=1)
    assert [log.spent("e", 1, when).day_bytes for when in (last, NOON + DAY, NOON + 2 * DAY)] == [3, 2, 0]
    assert log.spent("e", 1, last).day_bytes == 3  # a look changes nothing


@pytest.mark.parametrize("restart", [False, True])
def test_a_clock_that_goes_back_gives_nothing_free(tmp_path: Path, restart: bool) -> None:
    log = Departures.open(tmp_path / "log")
    log.record(departure(100), NOON)
    earlier = NOON - 30 * DAY
    for step in range(3):
        log = Departures.open(tmp_path / "log") if restart else log
        assert log.spent("e", 1, earlier).day_bytes == 100 + step
        log.record(departure(1), earlier)
    log = Departures.open(tmp_path / "log") if restart else log
    assert log.spent("e", 1, NOON + timedelta(hours=23)).day_bytes == 103  # as of the latest moment that was seen
    assert log.spent("e", 1, NOON + DAY).day_bytes == 0


@given(steps=st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 9)), max_size=30))
@settings(max_examples=40)
def test_the_day_is_that_of_a_slow_count(
    steps: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = Departures.open(tmp_path_factory.mktemp("log") / "log")
    now, latest, seen = NOON, NOON - 1000 * DAY, list[tuple[datetime, int]]()
    for hours, size in steps:
        now += timedelta(hours=hours)
        present = max(now, latest)
        assert log.spent("e", 1, now).day_bytes == sum(own for time, own in seen if present - time < DAY)
        log.record(departure(size), now)
        latest = present
        seen.append((present, size))


def test_every_altered_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Departures.open(path, KEY)
    for round in (1, 2, 3):
        log.record(departure(round=round), NOON)
    good, dice = path.read_bytes(), random.Random(0)
    for place in dice.sample(range(len(good) - 1), 60):
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << dice.randrange(7))]) + good[place + 1 :])
        with pytest.raises(BadLedger, match="put back a copy"):
            read(path, KEY.public_key())
    lines = good.splitlines(keepends=True)
    for other in (lines[1:], [lines[0], lines[2]], [lines[1], lines[0], lines[2]], [*lines, lines[2]]):
        path.write_bytes(b"".join(other))
        with pytest.raises(BadLedger, match="put back a copy"):
            Departures.open(path, KEY)
    path.write_bytes(b"".join(lines[:2]))
    with pytest.raises(BadLedger, match="has 2 departures and must have at least 3"):
        Departures.open(path, KEY, at_least=3)
    with pytest.raises(BadLedger, match="has become shorter"):
        log.spent("e", 1, NOON)


def test_a_line_that_was_torn_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Departures.open(path)
    log.record(departure(1), NOON)
    whole = path.read_bytes()
    log.record(departure(2), NOON)
    second = path.read_bytes()[len(whole) :]
    for cut in range(0, len(second), 40):
        path.write_bytes(whole + second[:cut])
        log = Departures.open(path)
        assert log.spent("e", 1, NOON).day_bytes == 1
        log.record(departure(3, op="after"), NOON)
        assert [line.entry.bytes for line in read(path)] == [1, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": -1},
        {"bytes": True},
        {"round": "1"},
        {"op": None},
        {"error": 1},
        {"meta": "x"},
        {"tensors": [["w", "float32"]]},
        {"tensors": [["w", "float32", [-1]]]},
        {"more": 1},
    ],
    ids=str,
)
def test_only_a_departure_is_read(tmp_path: Path, change: dict[str, object]) -> None:
    """A line that somebody wrote by hand, with a hash that fits."""
    path = tmp_path / "log"
    Departures.open(path).record(departure(), NOON)
    plain = json.loads(path.read_bytes())
    del plain["seal"]
    plain["departure"] |= change
    body = json.dumps(plain, separators=(",", ":")).encode()
    seal = hashlib.sha256(b"fedelta departures 1\n" + body).hexdigest().encode()
    path.write_bytes(body[:-1] + b',"seal":"' + seal + b'"}\n')
    with pytest.raises(BadLedger, match=r"^line 1 of .* (has|does not have the fields of) "):
        read(path)
