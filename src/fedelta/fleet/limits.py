"""What a coordinator takes from a site: how much, how often, and how long it waits."""

from dataclasses import dataclass, fields

from fedelta.core.errors import BadInput
from fedelta.fleet.rate import Rate


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds, bytes and numbers are of one site each, but for `room`."""

    deadline_s: float = 3600.0  # from when a site is asked until its reply is there
    absence_s: float = 60.0  # that a site may be away before it counts as absent
    stall_s: float = 60.0  # without a byte in the middle of a message, a greeting, or a stream in a connection
    check_s: float = 5.0  # between two looks at who may stay
    keepalive_s: float = 20.0  # of silence before a connection is tried
    message: int = 8 * 2**30  # bytes of a reply
    room: int = 64 * 2**20  # bytes of all replies in memory, or one of up to 1 GiB; others wait, then go to files
    faults: int = 3  # streams in a row with what a site must not send, until it is let in no more
    streams: Rate = Rate(per_minute=60, burst=20)  # that it may open
    unasked: Rate = Rate(per_minute=64 * 2**20, burst=64 * 2**20)  # bytes that nobody has asked for

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Rate) and not value > 0:
                raise BadInput(f"Limits.{field.name} must be > 0, got {value}")
