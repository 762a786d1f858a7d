"""What a coordinator notes down while the replies of a round come in: who is absent and why, and the bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedelta.core import codec
from fedelta.core.errors import RoundLost
from fedelta.core.messages import PUBLIC, PartyId, Replies, Reply, Request, Requests, Tensors, Update
from fedelta.core.program import Fleet, Report
from fedelta.core.release import Release
from fedelta.core.watched import Watched

_NOT_TOLD = "it gave nothing that could be used; no guarantee covers why, so that is not told"


@dataclass(kw_only=True)
class Tally:
    """What a round notes down while replies come in."""

    cohort: Sequence[PartyId]
    accepted: int = 0
    answered: list[PartyId] = field(default_factory=list)
    absent: dict[PartyId, str] = field(default_factory=dict)
    refused: list[PartyId] = field(default_factory=list)
    unmeasured: dict[PartyId, str] = field(default_factory=dict)
    per_site: dict[PartyId, Mapping[str, float]] = field(default_factory=dict)
    aggregation_errors: Mapping[str, float] | None = None
    # Sites whose update came, whether it can be used or not, with their rows where that number is public.
    arrived: dict[PartyId, int] = field(default_factory=dict)
    registered: int = 0
    validated: bool = True  # whether sites may be asked what they measure
    told: bool = True  # whether reports may say why a site is absent: its reason is data like any other
    releases: Sequence[Release] = ()
    bytes_down: int = 0
    bytes_up: int = 0
    waited: float = 0.0  # seconds spent waiting for replies

    def metered(self, fleet: Fleet) -> Fleet:
        """The same fleet; bytes, and the time that is spent waiting for replies, are added up."""
        return Watched(fleet=fleet, on_request=self._down, on_reply=self._up, on_wait=self._waited)

    def accept(self, senders: Sequence[PartyId], count: int) -> None:
        self.accepted += count
        self.answered.extend(senders)

    def refuse(self, senders: Sequence[PartyId], why: str) -> None:
        """What they have sent cannot be used."""
        self.absent |= dict.fromkeys(senders, why)
        self.refused.extend(senders)

    def late(self, why: str) -> None:
        """Nobody waits any more for the sites that have not answered."""
        heard = {*self.answered, *self.absent}
        self.absent |= {site: why for site in self.cohort if site not in heard}

    def only(self, updates: Iterator[Update]) -> Update:
        """What arrives where a collect shows nothing but the mean. Raises RoundLost if it cannot be used."""
        found = list(updates)
        if not found:
            raise RoundLost(f"the sum of the sites cannot be used ({self.reasons(self.absent)})")
        (mean,) = found
        return mean

    def report(
        self, round: int, metrics: Mapping[str, float], seconds: Mapping[str, float], stop: str | None
    ) -> Report:
        return Report(
            round=round,
            metrics=metrics,
            cohort=self.cohort,
            per_site=self.per_site,
            absent=self._tellable(self.absent),
            refused=tuple(self.refused) if self.told else (),
            unmeasured=self.unmeasured,
            aggregation_errors=self.aggregation_errors,
            releases=self.releases,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            seconds=seconds,
            stop=stop,
        )

    def _tellable(self, absent: Mapping[PartyId, str]) -> Mapping[PartyId, str]:
        return absent if self.told else dict.fromkeys(absent, _NOT_TOLD)

    def _down(self, request: Request | Requests) -> None:
        if isinstance(request, Request):
            self.bytes_down += codec.size({**request.shared, **request.body}, request.meta)
            return
        alike = len(request) - len(request.bodies)
        self.bytes_down += alike * codec.size(request.shared)
        self.bytes_down += sum(codec.size({**request.shared, **body}) for body in request.bodies.values())

    def _up(self, reply: Reply | Replies) -> None:
        if isinstance(reply, Replies):
            self.bytes_up += sum(len(senders) * codec.size(body) for senders, body in bodies(reply, {}))
        elif reply.error is None:
            self.bytes_up += codec.size(reply.body, reply.meta)

    def _waited(self, seconds: float) -> None:
        self.waited += seconds

    def shortage(self, round: int, needed: int) -> str:
        answered = f"{self.accepted} of {len(self.cohort)} sites answered and {needed} must"
        return f"round {round}: {answered} ({self.reasons(self.absent)})"

    def reasons(self, absent: Mapping[PartyId, str]) -> str:
        """Why sites are absent, as far as that may be told: three of them."""
        reasons = [f"{site}: {reason}" for site, reason in sorted(self._tellable(absent).items())]
        return "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")


def bodies(reply: Reply | Replies, absent: dict[PartyId, str]) -> Iterator[tuple[Sequence[PartyId], Tensors]]:
    """The bodies of a reply, each with the sites that it is of; the others go to `absent` with the reason.

    That of sites that were handled at once is their sum, or it holds a row for each.
    """
    if isinstance(reply, Reply):
        if reply.error is None:
            yield [reply.sender], reply.body
        else:
            absent[reply.sender] = reply.error
        return
    absent |= reply.errors
    if not reply.senders:
        return
    if reply.body["weight"].ndim == 0:
        yield reply.senders, reply.body
    else:
        for row, sender in enumerate(reply.senders):
            yield [sender], {name: tensor[row] for name, tensor in reply.body.items()}


def parted(body: Tensors) -> tuple[Tensors, Tensors]:
    """What the body of a sum has of each site, by the names of the numbers; and the sum."""
    public = {name.removeprefix(PUBLIC): tensor for name, tensor in body.items() if name.startswith(PUBLIC)}
    return public, {name: tensor for name, tensor in body.items() if not name.startswith(PUBLIC)} if public else body
