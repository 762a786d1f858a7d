"""Warnings before a party's certificate, or the list of revoked certificates that it uses, ends.

Each is warned of in the last tenth of its life, in the last hundredth, and when it has ended; once each in a process.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedelta.fleet import certificate_forms as forms
from fedelta.fleet.own_files import CERTIFICATE
from fedelta.fleet.revocations import Revocations
from fedelta.fleet.wire import Credentials

log = logging.getLogger(__name__)
_SHARES = (0.1, 0.01, 0.0)  # of a life that are left when it is warned of
_LOOK_S = 600.0  # between two looks


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Something that ends."""

    what: str
    start: datetime
    end: datetime
    cure: str

    @classmethod
    def certificate(cls, folder: Path, credentials: Credentials) -> "Paper":
        """That with which the process has begun: another one in its file is read by the next."""
        path = folder / CERTIFICATE
        own = forms.read_certificate(credentials.chain, str(path))
        cure = "get another one from its authority, and start again with it"
        return cls(what=str(path), start=own.not_valid_before_utc, end=own.not_valid_after_utc, cure=cure)

    @classmethod
    def revoked(cls, found: Revocations) -> "Paper":
        """The list as it is now."""
        what = f"the list of revoked certificates {found.path}, without which nobody is let in,"
        cure = "renew it at the authority with `fedelta ca renew-list`, and copy it here"
        return cls(what=what, start=found.since, end=found.until, cure=cure)

    def warned(self, now: datetime) -> int:
        """How often it is warned of until then."""
        life = self.end - self.start
        return sum(now >= self.end - share * life for share in _SHARES)


class Expiry:
    """Looks at papers, each of which a function gives as it is at the moment."""

    def __init__(self, papers: Sequence[Callable[[], Paper]]) -> None:
        self._papers = papers
        self._warned: dict[tuple[str, datetime], int] = {}

    def look(self, now: datetime | None = None) -> None:
        now = datetime.now(UTC) if now is None else now
        for read in self._papers:
            paper = read()
            times = paper.warned(now)
            if times > self._warned.get((paper.what, paper.end), 0):
                self._warned[paper.what, paper.end] = times
                ends = "has ended" if now >= paper.end else "ends"
                said = f"{paper.what} {ends} on {forms.day(paper.end)}; {paper.cure}"
                log.warning("%s", said, extra={"event": "expires"})

    def begin(self) -> None:
        """Look now, and from then on as long as the process lives."""
        self.look()
        threading.Thread(target=self._go_on, name="fedelta-expiry", daemon=True).start()

    def _go_on(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            self.look()
