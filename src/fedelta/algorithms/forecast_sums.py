"""The bytes of secure sums, told before one is made.

The messages are those of secure/messages.py and secure/aggregation.py, built here as tensors of the same
shapes, and weighed as a run weighs them. Up to 64 sites they are exact, also where sites are known to fail. Among more,
each draws whom it shares with, so that the lists of who drew a site differ in length: all together they are exact but
for the digits of these lengths, a few bytes a site, and, where sites fail, for how many had drawn them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedelta.algorithms.rehearsal import Piece
from fedelta.core import codec
from fedelta.core.errors import BadInput
from fedelta.core.grid import Terms
from fedelta.core.messages import PUBLIC, PartyId, Tensors
from fedelta.secure.aggregation import SecureAggregation
from fedelta.secure.graph import COMPLETE, Shape, count, quorum, shape
from fedelta.secure.messages import KEY_BYTES, SEALED_BYTES, SIGNATURE, SIGNATURE_BYTES, Listed, PublicKeys
from fedelta.secure.ring import Form, lengths
from fedelta.secure.shamir import SHARE_BYTES

_KEYS = PublicKeys(
    encryption=bytes(KEY_BYTES), masking=bytes(KEY_BYTES), identity=bytes(KEY_BYTES), signature=bytes(SIGNATURE_BYTES)
)
EXCHANGES = 6  # a request and its answer each: keys, shares, what to mask with, the update, survivors, what they reveal


@dataclass(frozen=True, kw_only=True)
class Bearing:
    """What a sum over `sites` that are asked can bear."""

    sites: int
    shape: Shape
    quorum: int  # of the sites that must be in the sum
    colluding: int  # sites that may work together with the coordinator
    dropouts: int  # sites that may be lost at any step
    least: int  # of honest sites in what a coordinator can ever learn of updates, whatever it does

    @classmethod
    def of(cls, collect: SecureAggregation, sites: int) -> "Bearing":
        """Raises BadInput where there is no such sum."""
        found = shape(sites, collect.colluding, collect.dropouts)
        colluding = count("colluding", collect.colluding, sites)
        certain = sites <= COMPLETE or found.neighbours == sites - 1
        return cls(
            sites=sites,
            shape=found,
            quorum=_quorum(collect, sites),
            colluding=colluding,
            dropouts=count("dropouts", collect.dropouts, sites),
            least=_quorum(collect, sites) - colluding if certain else sites // 3 + 1,  # secure/graph.py
        )


@dataclass(frozen=True, kw_only=True)
class Summed:
    """What goes on around one request to sites whose answers are added up."""

    to: Sequence[PartyId]  # who gets the request itself
    bytes_down: int = 0  # of all other messages, over all sites
    bytes_up: int = 0
    each_down: int = 0  # of these, what a site gets that takes part to the end
    each_up: int = 0
    lost: str | None = None  # why nothing comes of the sum


@dataclass(kw_only=True)
class _Scale:
    """Messages as they are weighed: how many sites get one, of how many bytes, and how many answer."""

    down: int = 0
    up: int = 0
    each: list[int] = field(default_factory=lambda: [0, 0])

    def step(self, asked: int, told: Tensors, answering: int, answer: Tensors) -> None:
        sizes = codec.size(told), codec.size(answer)
        self.down += asked * sizes[0]
        self.up += answering * sizes[1]
        self.each = [total + size for total, size in zip(self.each, sizes, strict=True)]

    def summed(self, to: Sequence[PartyId], lost: str | None = None) -> Summed:
        down, up = self.each
        return Summed(to=to, bytes_down=self.down, bytes_up=self.up, each_down=down, each_up=up, lost=lost)


def summed(
    collect: SecureAggregation, asked: Sequence[PartyId], silent: Collection[PartyId], failing: Collection[PartyId]
) -> Summed:
    """The messages of one sum over the sites `asked`.

    `silent` are those that never answer, `failing` those that fail once they get the request itself. Raises BadInput
    where so many sites cannot be asked at all.
    """
    scale = _Scale()
    listed = [name for name in asked if name not in silent]
    needed, there = _quorum(collect, len(asked)), len(listed)
    scale.step(len(asked), {"cohort": torch.tensor(0)}, there, _KEYS.to_tensors())
    found = _shape(collect, len(asked), there)
    if found is None:
        return scale.summed([], f"{there} of {len(asked)} sites can take part in a secure sum, which are too few")
    drawn = min(found.neighbours, there - 1)
    answer = {"neighbours": _blank(torch.int64, drawn), "shares": _octets(drawn, SEALED_BYTES)}
    scale.step(there, _listed(listed), there, {**answer, "commitment": _octets(KEY_BYTES)})
    told = {"from": _blank(torch.int64, drawn), "shares": _octets(drawn, SEALED_BYTES), "alive": _octets(there)}
    scale.step(there, told, there, {})
    able = sum(name not in failing for name in listed)
    if able < needed or (drawn == there - 1 and able - 1 < found.threshold):
        return scale.summed(listed, f"{able} of {len(asked)} sites can answer, and a secure sum needs {needed}")
    scale.step(able, {"survivors": _octets(there)}, able, {"signature": _octets(SIGNATURE_BYTES)})
    alike = round(drawn * (able - 1) / (there - 1))  # survivors among those that drew a site
    told = {"signers": _blank(torch.int64, able), "signatures": _octets(able, SIGNATURE_BYTES)}
    told["alive"] = _octets(alike, SIGNATURE_BYTES)
    scale.step(able, told, able, {"shares": _octets(drawn, SHARE_BYTES)})
    return scale.summed(listed)


def masked_bytes(
    collect: SecureAggregation, update: Sequence[Piece], public: Collection[str], whole: Literal[16, 32] | None
) -> int:
    """Of an answer under masks, where it consists of `update` in the clear; the sums `public` travel besides.

    `whole` are the bits of its integers where it consists of whole numbers already.
    """
    form = Form.of({piece.name: _blank(getattr(torch, piece.dtype), *piece.shape) for piece in update})
    sizes = lengths(form, Terms(whole=whole))
    values = {16: torch.int16, 32: torch.int32, 64: torch.int64}[whole or collect.bits]
    body = {
        "values": _blank(values, sizes["values"]),
        "halves": _blank(torch.int64, sizes["halves"]),
        "numbers": _blank(torch.int64, sizes["numbers"]),
        "form": form.to_tensor(),
        SIGNATURE: _octets(SIGNATURE_BYTES),
    }
    return codec.size(body | {PUBLIC + name: _blank(torch.float64) for name in public})


def _shape(collect: SecureAggregation, asked: int, listed: int) -> Shape | None:
    """None where too few are listed. Raises BadInput where even all of them would be."""
    if listed < _quorum(collect, asked):
        return None
    try:
        found = shape(asked, collect.colluding, collect.dropouts, listed=listed)
    except BadInput:
        if listed == asked:
            raise
        return None
    return found if listed - 1 >= found.threshold else None


def _quorum(collect: SecureAggregation, asked: int) -> int:
    return max(quorum(asked), collect.least)


def _listed(names: Sequence[PartyId]) -> Tensors:
    return Listed(names=tuple(names), keys=(_KEYS,) * len(names)).to_tensors()


def _octets(*shape: int) -> Tensor:
    return _blank(torch.uint8, *shape)


def _blank(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)  # one number of memory, whatever the shape
