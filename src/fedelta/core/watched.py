"""A fleet that tells what passes through it: to a progress bar, a tally, a trace."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests
from fedelta.core.program import Fleet


def _nobody(_: object) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The same fleet. Requests and withdrawals are told before they are passed on, replies once they are there.

    `on_wait` gets the seconds that a call of `next_reply` took, before its reply is told.
    """

    fleet: Fleet
    on_request: Callable[[Request | Requests], None] = _nobody
    on_reply: Callable[[Reply | Replies], None] = _nobody
    on_cancel: Callable[[str], None] = _nobody
    on_wait: Callable[[float], None] = _nobody

    def parties(self) -> Sequence[PartyId]:
        return self.fleet.parties()

    def submit(self, request: Request) -> None:
        self.on_request(request)
        self.fleet.submit(request)

    def submit_many(self, requests: Requests, together: int) -> None:
        self.on_request(requests)
        self.fleet.submit_many(requests, together)

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        asked = time.perf_counter()
        reply = self.fleet.next_reply(timeout_s)
        self.on_wait(time.perf_counter() - asked)
        if reply is not None:
            self.on_reply(reply)
        return reply

    def cancel(self, request_id: str) -> None:
        self.on_cancel(request_id)
        self.fleet.cancel(request_id)
