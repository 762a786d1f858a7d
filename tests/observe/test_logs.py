"""Log records as lines of JSON."""

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO

import pytest

from fedelta.observe.logs import ROUND, JsonLines, NoRounds


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, StringIO]]:
    logger, stream = logging.getLogger("fedelta.test_logs"), StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    yield logger, stream
    logger.handlers = []


def test_a_record_is_one_line_with_what_is_known_of_it(written: tuple[logging.Logger, StringIO]) -> None:
    logger, stream = written
    before = datetime.now(UTC)
    logger.info("site %s\nhas joined", "ä\x1b", extra={"event": "joined", "site": "ä\x1b", "round": 0, "job": ""})
    text = stream.getvalue()
    assert text.isascii()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    found = json.loads(text)
    time = datetime.fromisoformat(found.pop("time"))
    assert time.utcoffset() == UTC.utcoffset(None)
    assert abs((time - before).total_seconds()) < 60
    assert found == {
        "level": "INFO",
        "event": "joined",
        "round": 0,
        "site": "ä\x1b",
        "message": "site ä\x1b\nhas joined",
        "logger": "fedelta.test_logs",
    }


def test_a_round_has_its_sites_and_metrics(written: tuple[logging.Logger, StringIO]) -> None:
    logger, stream = written
    told = {"answered": ["a", "b"], "absent": {"c": "it sleeps"}, "metrics": {"loss": 0.5, "rate": "NaN"}}
    logger.info("a round", extra={"event": ROUND, "round": 3, **told})
    logger.info("a round", extra={"event": ROUND, "answered": [object()], "absent": {"c": b"key"}, "metrics": "all"})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert {name: first[name] for name in told} == told
    assert not told.keys() & second.keys()


def test_rounds_are_left_out_of_what_people_read(written: tuple[logging.Logger, StringIO]) -> None:
    logger, stream = written
    logger.handlers[0].addFilter(NoRounds())
    logger.info("a round", extra={"event": ROUND})
    logger.info("a site has joined", extra={"event": "joined"})
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["joined"]


def test_nothing_else_that_is_passed_along_is_written(written: tuple[logging.Logger, StringIO]) -> None:
    logger, stream = written
    logger.warning("it is %s", "said", extra={"key": "-----BEGIN PRIVATE KEY-----", "site": object()})
    assert json.loads(stream.getvalue()).keys() == {"time", "level", "message", "logger"}


def test_an_exception_has_its_traceback(written: tuple[logging.Logger, StringIO]) -> None:
    logger, stream = written
    try:
        raise ValueError("no such thing")
    except ValueError:
        logger.exception("it failed")
    found = json.loads(stream.getvalue())
    assert found["level"] == "ERROR"
    assert "ValueError: no such thing" in found["traceback"]
    assert "test_logs.py" in found["traceback"]
