"""What an update passes through between a site and the rule: stages, one encoding, and the way it is collected."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests, Tensors, Update
from fedelta.core.parameters import Layout
from fedelta.core.program import Fleet, Sight, Site


class Stage(Protocol):
    """A transformation of an update on its way, vector to vector, with its halves at site and coordinator."""

    def on_site(self, update: Update, site: Site) -> Update: ...

    def on_arrival(self, update: Update) -> Update:
        """At the coordinator, on each update; in the reverse order of the stages."""
        ...

    def on_total(self, total: Update) -> Update:
        """At the coordinator, on the aggregate; in the reverse order of the stages."""
        ...


class Encoding(Protocol):
    """What the vector is written as, the last thing before the wire."""

    @property
    def linear(self) -> bool:
        """Whether the sum of encodings is an encoding of the sum, as a collect that shows only sums needs."""
        ...

    def encode(self, update: Update) -> Tensors: ...

    def decode(self, tensors: Tensors, layout: Layout) -> Update:
        """Raises BadTensors for anything that `encode` would not write."""
        ...


@dataclass(frozen=True, kw_only=True)
class Float32:
    """The vector as it is."""

    linear: bool = True

    def encode(self, update: Update) -> Tensors:
        return update.to_tensors()

    def decode(self, tensors: Tensors, layout: Layout) -> Update:
        return Update.from_tensors(tensors, layout)


class Collect(Protocol):
    """How updates reach the coordinator."""

    @property
    def shows(self) -> Sight: ...

    def gather(self, fleet: Fleet, requests: Requests, together: int) -> Iterator[Reply | Replies]:
        """Send the requests; yield what comes: a reply (or a failure) per site, or one that carries a sum.

        `together` is the number of sites that the program can handle in one go. Only a collect that shows each update
        may make use of it.
        """
        ...

    def handle(self, request: Request, site: Site, outgoing: Callable[[], Tensors]) -> Reply:
        """The site's half: what leaves it, given its encoded update."""
        ...


@dataclass(frozen=True, kw_only=True)
class Clear:
    """Each update in the clear: the coordinator sees them all."""

    shows: Sight = Sight.EACH

    def gather(self, fleet: Fleet, requests: Requests, together: int) -> Iterator[Reply | Replies]:
        waiting = set(requests.to)
        fleet.submit_many(requests, together)
        try:
            while waiting:
                reply = fleet.next_reply()
                if reply is None:
                    raise RuntimeError(f"the fleet has nothing outstanding, and {len(waiting)} replies are missing")
                answered = _answered(reply, requests) & waiting
                if answered:
                    waiting -= answered
                    yield reply
        finally:  # an interrupted round can be asked for again
            if waiting:
                fleet.cancel(requests.id)
                for party in waiting:
                    fleet.cancel(requests.id_to(party))

    def handle(self, request: Request, site: Site, outgoing: Callable[[], Tensors]) -> Reply:
        return Reply.to_request(request, outgoing())


def _answered(reply: Reply | Replies, requests: Requests) -> set[PartyId]:
    """The parties of `requests` that a reply speaks for."""
    if isinstance(reply, Replies):
        return {*reply.senders, *reply.errors} if reply.answers == requests.id else set()
    return {reply.sender} if reply.answers == requests.id_to(reply.sender) else set()
