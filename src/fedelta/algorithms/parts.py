"""What an update passes through between a site and the rule: stages, one encoding, and the way it is collected."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from fedelta.core.errors import BadInput
from fedelta.core.exchange import exchange
from fedelta.core.grid import Terms
from fedelta.core.messages import Replies, Reply, Request, Requests, Tensors, Update
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

    @property
    def least(self) -> int:
        """The number of sites without whose answers nothing comes of a round."""
        ...

    @property
    def whole(self) -> bool:
        """Whether it can add whole numbers modulo a power of two, and shows nothing but the sum."""
        ...

    @property
    def registered(self) -> int | None:
        """How many sites there are, where each of them knows that by itself; None where it does not."""
        ...

    def honest(self, cohort: int) -> int:
        """The fewest sites, in whatever is shown of `cohort` that were asked, of which a spectator is not one.

        Those that collude with the coordinator, as far as that is allowed for, do not count, and one never does: it may
        be who looks. Raises BadInput where so many cannot be asked.
        """
        ...

    def gather(self, fleet: Fleet, requests: Requests, together: int, terms: Terms) -> Iterator[Reply | Replies]:
        """Send the requests; yield what comes: a reply (or a failure) per site, or one with the mean of those it names.

        `together` is the number of sites that the program can handle in one go. Only a collect that shows each update
        may make use of it; only one that shows sums needs the `terms`. Raises TooFewSites, or RoundLost, where no sum
        can be had.
        """
        ...

    def handle(self, request: Request, site: Site, outgoing: Callable[[], Tensors], terms: Terms) -> Reply:
        """The site's half: what leaves it, given its encoded update."""
        ...

    def answer(self, request: Request, site: Site) -> Reply:
        """A site's half of the collect's own messages. Raises BadInput for a request that it does not know."""
        ...


@dataclass(frozen=True, kw_only=True)
class Clear:
    """Each update in the clear: the coordinator sees them all."""

    shows: ClassVar[Sight] = Sight.EACH
    least: ClassVar[int] = 1
    whole: ClassVar[bool] = False
    registered: ClassVar[None] = None

    def honest(self, cohort: int) -> int:
        return 1

    def gather(self, fleet: Fleet, requests: Requests, together: int, terms: Terms) -> Iterator[Reply | Replies]:
        return exchange(fleet, requests, together)

    def handle(self, request: Request, site: Site, outgoing: Callable[[], Tensors], terms: Terms) -> Reply:
        return Reply.to_request(request, outgoing())

    def answer(self, request: Request, site: Site) -> Reply:
        raise BadInput(f"this program knows no {request.op!r} request")
