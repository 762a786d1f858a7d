"""What crosses the border of a site: requests, replies, and the update that a reply carries.

Only tensors and plain metadata; no code, no pickle.
"""

import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedelta.core.errors import BadTensors
from fedelta.core.parameters import Layout, Parameters

PartyId = str
Tensors = Mapping[str, Tensor]
Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
Meta = Mapping[str, Plain]
Kind = Literal["difference", "value"]
MOST = 2**31  # examples at a site: what a site says of itself beyond that cannot be
PUBLIC = "public/"  # in the body of a sum: before the name of a number that is given for each of its senders


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """From the coordinator to a site.

    `shared` is one object for the whole cohort, so that a fleet encodes it once; `body` is this site's own.
    """

    to: PartyId
    op: str  # what the program's `handle` is to do: "train", "evaluate", …
    round: int
    job: str = ""
    attempt: int = 0
    base: int = -1  # round of this site's last accepted reply; its memory starts from there
    shared: Tensors = field(default_factory=dict)
    body: Tensors = field(default_factory=dict)
    meta: Meta = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.job}/{self.round}/{self.op}/{self.attempt}/{self.to}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """The same request to each of many sites. The single ones are made when they are asked for.

    A program that can handle many sites in one go (`handle_many`) is given the whole, or a slice of it.
    """

    to: Sequence[PartyId]
    op: str
    round: int
    job: str = ""
    attempt: int = 0
    bases: Mapping[PartyId, int] = field(default_factory=dict)  # as Request.base, -1 for who is not in it
    shared: Tensors = field(default_factory=dict)
    bodies: Mapping[PartyId, Tensors] = field(default_factory=dict)  # as Request.body, empty for who is not in it

    @property
    def id(self) -> str:
        """Of all of them, for Fleet.cancel; no single request has it."""
        return f"{self.job}/{self.round}/{self.op}/{self.attempt}"

    def id_to(self, party: PartyId) -> str:
        """The id of the single request to `party`."""
        return f"{self.id}/{party}"

    def __len__(self) -> int:
        return len(self.to)

    def __iter__(self) -> Iterator[Request]:
        for to in self.to:
            yield Request(
                to=to,
                op=self.op,
                round=self.round,
                job=self.job,
                attempt=self.attempt,
                base=self.bases.get(to, -1),
                shared=self.shared,
                body=self.bodies.get(to, {}),
            )

    def part(self, where: slice) -> "Requests":
        """Those to `self.to[where]`, with what belongs to them; the id stays."""
        to = self.to[where]
        bases = {party: self.bases[party] for party in to if party in self.bases}
        bodies = {party: self.bodies[party] for party in to if party in self.bodies}
        return replace(self, to=to, bases=bases, bodies=bodies)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """From a site to the coordinator. A failure is data: `error` is one sentence, and the body is empty."""

    sender: PartyId
    answers: str  # the request's id
    round: int
    body: Tensors = field(default_factory=dict)
    meta: Meta = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def to_request(cls, request: Request, body: Tensors) -> "Reply":
        return cls(sender=request.to, answers=request.id, round=request.round, body=body)

    @classmethod
    def failure(cls, request: Request, error: str) -> "Reply":
        return cls(sender=request.to, answers=request.id, round=request.round, error=error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Replies:
    """What came of a part of `Requests` that was handled in one go: one body for all who answered."""

    senders: Sequence[PartyId]  # whose answers are in the body
    answers: str  # the id of the requests
    round: int
    body: Tensors = field(default_factory=dict)
    errors: Mapping[PartyId, str] = field(default_factory=dict)  # a failed site -> one sentence

    @classmethod
    def failure(cls, requests: Requests, error: str) -> "Replies":
        """All of them failed for the same reason."""
        return cls(senders=(), answers=requests.id, round=requests.round, errors=dict.fromkeys(requests.to, error))


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one site, or a sum over sites, contributes to a round.

    Every number about a site (its weight, its losses) is part of the update, so that it is masked, noised or withheld
    together with the values.
    """

    values: Parameters
    kind: Kind = "difference"  # of the values: from the broadcast, or absolute
    weight: float = 1.0  # >= 0
    sums: Mapping[str, float] = field(default_factory=dict)  # whatever is added over sites: losses, correct predictions
    count: int = 1  # number of sites in it

    def to_tensors(self) -> dict[str, Tensor]:
        """The update as named tensors: the vector under the name of its kind, and one float64 scalar per number."""
        numbers = {"weight": self.weight, "count": float(self.count)}
        numbers |= {f"sum/{name}": value for name, value in self.sums.items()}
        scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        return {self.kind: self.values.vector, **scalars}

    @classmethod
    def from_tensors(cls, tensors: Tensors, layout: Layout) -> "Update":
        """Read what `to_tensors` wrote. Raises BadTensors if names, shapes or dtypes are not of that form."""
        kinds: list[Kind] = [kind for kind in ("difference", "value") if kind in tensors]
        if len(kinds) != 1:
            raise BadTensors(f"an update has one of 'difference' and 'value', got {reprlib.repr(sorted(tensors))}")
        numbers: dict[str, float] = {}
        for name, tensor in tensors.items():
            if name == kinds[0]:
                continue
            if tensor.ndim != 0 or tensor.dtype != torch.float64:
                raise BadTensors(f"number {reprlib.repr(name)} of an update is not a float64 scalar")
            numbers[name] = tensor.item()
        try:
            weight, count = numbers.pop("weight"), numbers.pop("count")
        except KeyError as error:
            raise BadTensors(f"an update without {error}") from None
        if not 0 <= weight < float("inf") or not 1 <= count < 2**53 or count != int(count):
            raise BadTensors(f"an update with weight {weight} and count {count}")
        if any(not name.startswith("sum/") for name in numbers):
            raise BadTensors(f"unknown numbers in an update: {reprlib.repr(sorted(numbers))}")
        sums = {name.removeprefix("sum/"): value for name, value in numbers.items()}
        values = Parameters(layout, tensors[kinds[0]])
        return cls(values=values, kind=kinds[0], weight=weight, sums=sums, count=int(count))


@dataclass(frozen=True, kw_only=True, slots=True)
class Updates:
    """The updates of several sites side by side: row i of everything is that of `senders[i]`."""

    senders: Sequence[PartyId]
    layout: Layout
    values: Tensor  # [sites, layout.size]
    weights: Tensor  # float64 [sites], >= 0
    kind: Kind = "difference"
    sums: Mapping[str, Tensor] = field(default_factory=dict)  # float64 [sites] each
    magnitude: float | None = None  # a bound on every |value|, where somebody has looked: saves others a pass

    def __len__(self) -> int:
        return len(self.senders)

    def __iter__(self) -> Iterator[Update]:
        """One after the other, as views."""
        for row, (values, weight) in enumerate(zip(self.values, self.weights.tolist(), strict=True)):
            yield Update(
                values=Parameters(self.layout, values),
                kind=self.kind,
                weight=weight,
                sums={name: numbers[row].item() for name, numbers in self.sums.items()},
            )

    @classmethod
    def cat(cls, parts: "Sequence[Updates]", layout: Layout) -> "Updates":
        """All rows of parts that have the same kind and sums, one after the other."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls(senders=(), layout=layout, values=torch.empty(0, layout.size), weights=torch.empty(0))
        return cls(
            senders=[sender for part in parts for sender in part.senders],
            layout=layout,
            values=torch.cat([part.values for part in parts]),
            weights=torch.cat([part.weights for part in parts]),
            kind=parts[0].kind,
            sums={name: torch.cat([part.sums[name] for part in parts]) for name in parts[0].sums},
        )

    def without(self, rows: Collection[int]) -> "Updates":
        """All but these rows."""
        if not rows:
            return self
        kept = [row for row in range(len(self)) if row not in rows]
        where = torch.tensor(kept, dtype=torch.int64)
        return replace(
            self,
            senders=[self.senders[row] for row in kept],
            values=self.values[where.to(self.values.device)],
            weights=self.weights[where],
            sums={name: numbers[where] for name, numbers in self.sums.items()},
        )
