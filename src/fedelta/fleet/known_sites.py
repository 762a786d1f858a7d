"""What is known of the sites, and how a fleet tells of them: the words of the registry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

from fedelta.core.messages import PartyId

Happened = Literal["joined", "left", "refused", "shut out", "protocol broken"]
What = Literal[Happened, "update refused", "quarantined", "readmitted"]


class Register(Protocol):
    """What a fleet tells of its sites, and asks; in its event loop, so that neither may wait."""

    def barred(self, name: PartyId) -> str | None:
        """Why a site may not take part, connected or not: what it is asked fails at once. None if it may."""
        ...

    def tell(self, what: Happened, site: PartyId, why: str = "", certificate: bytes = b"") -> None:
        """Something happened to a stream; `certificate` (DER) of a site that joined, if it has one.

        The name of a site that was refused may be any text: where there is no certificate, whatever it calls itself.
        """
        ...


class NoRegister:
    """A `Register` that lets everybody take part, and keeps nothing."""

    def barred(self, name: PartyId) -> str | None:
        return None

    def tell(self, what: Happened, site: PartyId, why: str = "", certificate: bytes = b"") -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Quarantine:
    since: datetime
    why: str

    def told(self, name: PartyId) -> str:
        """As the site's owner reads it."""
        return (
            f"{name!r} is in quarantine since {minute(self.since)}. When what follows is mended, ask the coordinator's "
            f"operator to readmit it (`fedelta sites RUN --readmit {name}`), and join again. {self.why}"
        )


@dataclass(frozen=True, kw_only=True)
class KnownSite:
    """A site as the registry has it."""

    name: PartyId
    here: bool  # when the coordinator last wrote
    first_seen: datetime | None
    last_seen: datetime | None
    streams: int  # that it has opened
    fingerprint: str | None  # SHA-256 of the certificate that it showed last, in hex
    expires: datetime | None  # that certificate
    counted: int  # committed rounds in which its update is
    failures: int  # of its own making, in a row
    quarantine: Quarantine | None


@dataclass(frozen=True, kw_only=True)
class Turns:
    """A round that is committed in the run's folder: who counted, who was absent and why."""

    number: int
    counted: Sequence[PartyId] = ()
    absent: Mapping[PartyId, str] = field(default_factory=dict)
    refused: Sequence[PartyId] = ()  # of the absent: those whose update could not be used
    state: str | None = None  # SHA-256 of the state's file after the round, in hex; None: not known


@dataclass(frozen=True, kw_only=True)
class Event:
    time: datetime  # the first of those that are counted in it
    latest: datetime
    times: int
    site: PartyId | None
    what: What
    why: str


def minute(time: datetime) -> str:
    """ "2026-11-22 19:40 UTC"."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
