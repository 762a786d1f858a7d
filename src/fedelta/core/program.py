"""Program, fleet, site, and the one loop that runs a program on a fleet."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from torch import Tensor, nn

from fedelta.core.examples import Array, Examples
from fedelta.core.heap import keep_freed_memory
from fedelta.core.memory import Memory
from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests
from fedelta.core.release import Ledger, Release

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

S = TypeVar("S")


class Sight(Enum):
    """What the coordinator gets to see, and what a rule has to see."""

    EACH = "each update"
    SUM = "only the sum of the updates"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened in one round; observers read nothing else."""

    round: int  # from 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    cohort: Sequence[PartyId] = ()
    per_site: Mapping[PartyId, Mapping[str, float]] = field(default_factory=dict)  # where the coordinator sees them
    absent: Mapping[PartyId, str] = field(default_factory=dict)  # site of the cohort -> why it is not in the total
    refused: Sequence[PartyId] = ()  # of the absent: those whose update came, and could not be used
    unmeasured: Mapping[PartyId, str] = field(default_factory=dict)  # site -> why its evaluation is missing
    # layer -> what the aggregation of LoRA's factors lost (aggregation/factors.py: Meter); empty if not observable,
    aggregation_errors: Mapping[str, float] | None = None  # None if there was nothing to measure
    releases: Sequence[Release] = ()  # what the round let out about protected data, as the ledger has it
    bytes_down: int = 0  # over all sites, as encoded
    bytes_up: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase
    stop: str | None = None  # why the run ends with this round


HAND_OVER = "model"  # the request with which a run ends: a site that answers it has kept its model, and nothing leaves


@dataclass(kw_only=True)
class Site:
    """A party that owns data, as its half of a program sees it.

    `scratch` lives for one attempt and is never written to disk; `memory` lasts over rounds. `given` has, for each kind
    of request, the last round that it has worked on, where it must do so only once. `keep(model, round)` is what the
    owner does with the model that a run ends with, such as saving it; None: it is handed none, as in a simulation.
    """

    id: PartyId
    data: Callable[[], "SiteData"]  # loads on the first call, then returns the same object
    memory: Memory = field(default_factory=Memory)
    scratch: dict[str, object] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    keep: Callable[[nn.Module, int], object] | None = None


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """What `site(name)` of an experiment gives: the training part, and the part that the site holds back."""

    train: Examples
    validation: Examples | None = None
    ledger: Ledger | None = None  # where this site takes down what it lets out; it may have a limit of its own
    identity: "Path | str | Ed25519PrivateKey | None" = None  # with which it signs, so that other sites know it

    @classmethod
    def of(cls, data: "SiteData | Examples | tuple[Tensor | Array, Tensor | Array]") -> "SiteData":
        """Site data from what `site(name)` may return: SiteData, Examples, or a pair (x, y) of tensors or arrays."""
        return data if isinstance(data, SiteData) else cls(train=Examples.of(data))


class Fleet(Protocol):
    """The sites as the coordinator sees them; the only way to reach one."""

    def parties(self) -> Sequence[PartyId]:
        """The registered sites, connected or not, in a fixed order."""
        ...

    def submit(self, request: Request) -> None:
        """Hand over a request. A site gets its requests in order and one at a time."""
        ...

    def submit_many(self, requests: Requests, together: int) -> None:
        """Hand over requests, each `together` of which, in their order, may be handled in one go (ManyProgram).

        Such a part is answered by one Replies. The division does not depend on the number of processes or on their
        speed. With 1, or in a fleet whose sites are far from each other, each is answered by its own Reply.
        """
        ...

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        """What comes next, in order of arrival; None after `timeout_s` seconds, or at once if nothing is outstanding.

        Without a timeout it waits until a reply comes. Raises whatever bug a program's `handle` raised.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Withdraw a request, or by the id of Requests all parts of it; what still comes of it is dropped.

        Unknown ids are ignored.
        """
        ...


class Program(Protocol[S]):
    """Both halves of a protocol in one place."""

    def init(self) -> S: ...

    def finished(self, state: S) -> str | None:
        """Why the run is over, in a few words; None while it goes on."""
        ...

    def step(self, state: S, fleet: Fleet) -> tuple[S, Report]:
        """One round at the coordinator: a new state, and what happened."""
        ...

    def handle(self, request: Request, site: Site) -> Reply:
        """One request at a site."""
        ...


class ManyProgram(Program[S], Protocol[S]):
    """A program that can handle the same request at many sites in one go."""

    def handle_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        """As `handle` of each site (to rounding: 1e-5 in float32); `sites` are in the order of the requests.

        A site that fails is an entry of `errors`, so that the others are not lost.
        """
        ...


class FrozenProgram(Program[S], Protocol[S]):
    """A program whose model has weights that do not travel."""

    def frozen(self) -> str | None:
        """Digest of what every party has to have already, alike; None if there is nothing of the kind."""
        ...


def run(program: Program[S], fleet: Fleet, state: S | None = None) -> Iterator[tuple[S, Report]]:
    """Run `program` on `fleet` until it is finished; yields the state and the report after every round.

    Continues from `state` where one is given: the pair that it yields is all that a resume needs. From then on the
    process keeps memory that was freed (see `core/heap.py`): every round takes the same blocks again.
    """
    keep_freed_memory()
    current = program.init() if state is None else state
    while program.finished(current) is None:
        current, report = program.step(current, fleet)
        yield current, report
