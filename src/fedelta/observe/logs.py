"""What happens in a deployment as one line of JSON each, for programs that read logs.

    {"time": "2026-11-22T10:00:00.123456+00:00", "level": "INFO", "event": "joined", "site": "a", "message": "site a
     has joined", "logger": "fedelta.fleet.remote"}

`time`, `level`, `message` and `logger` are always there; `event`, `job`, `round`, `site` and `op` where the code that
logs knows them; of a round that is over, `answered` (the sites), `absent` (site: why), and `metrics` (name: value); and
`traceback` where an exception is logged. Nothing else is written of what a call passes as `extra`, so that an object
which holds a secret cannot get into a log by being passed along.
"""

import json
import logging
from datetime import UTC, datetime

ROUND = "round"  # the event that a round is over
_ONE = ("event", "job", "round", "site", "op")  # what `extra` may say: numbers and texts; empty ones are left out
_MANY = ("answered", "absent", "metrics")  # lists and dictionaries of these


class JsonLines(logging.Formatter):
    """A record as one line of JSON, with all that is not ASCII escaped."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
        }
        for name in _ONE:
            value = getattr(record, name, None)
            if isinstance(value, str | int) and value != "":
                found[name] = value
        for name in _MANY:
            value = getattr(record, name, None)
            if isinstance(value, list | dict):
                inner = value.values() if isinstance(value, dict) else value
                if all(isinstance(one, str | int | float) for one in inner):
                    found[name] = value
        found["message"] = record.getMessage()
        found["logger"] = record.name
        if record.exc_info and record.exc_info[0] is not None:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)


class NoRounds(logging.Filter):
    """Leaves out the rounds, of which a person sees the progress."""

    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(record, "event", None) != ROUND
