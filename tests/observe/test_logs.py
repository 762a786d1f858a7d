"""Log records as lines of JSON."""

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO

import pytest

from fedelta.observe.logs import JsonLines


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
