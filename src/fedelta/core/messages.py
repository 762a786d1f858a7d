"""What crosses the border of a site: requests, replies, and the update that a reply carries.

Only tensors and plain metadata; no code, no pickle.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
            raise BadTensors(f"an update has one of 'difference' and 'value', got {sorted(tensors)}")
        numbers: dict[str, float] = {}
        for name, tensor in tensors.items():
            if name == kinds[0]:
                continue
            if tensor.ndim != 0 or tensor.dtype != torch.float64:
                raise BadTensors(f"number {name!r} of an update is not a float64 scalar")
            numbers[name] = tensor.item()
        try:
            weight, count = numbers.pop("weight"), numbers.pop("count")
        except KeyError as error:
            raise BadTensors(f"an update without {error}") from None
        if not 0 <= weight < float("inf") or not 1 <= count < 2**53 or count != int(count):
            raise BadTensors(f"an update with weight {weight} and count {count}")
        if any(not name.startswith("sum/") for name in numbers):
            raise BadTensors(f"unknown numbers in an update: {sorted(numbers)}")
        sums = {name.removeprefix("sum/"): value for name, value in numbers.items()}
        values = Parameters(layout, tensors[kinds[0]])
        return cls(values=values, kind=kinds[0], weight=weight, sums=sums, count=int(count))
