"""What a site's policy has to know of a federation (fleet/policy.py), found in this party's own copy of it.

Limits: tensors and sizes are those of the first round; an algorithm may send others in later ones (RoLoRA alternates,
FedSB begins with whole weights). The door counts the bytes of every reply, whatever is said here.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from fedelta.algorithms.federation import Federation
from fedelta.algorithms.forecast_encrypted import encrypted_bytes
from fedelta.algorithms.forecast_sums import masked_bytes
from fedelta.algorithms.parts import Float32
from fedelta.algorithms.rehearsal import Piece
from fedelta.core import codec
from fedelta.core.digest import digest
from fedelta.core.messages import PartyId
from fedelta.core.parameters import Layout
from fedelta.fleet.policy import Facts, Way, Work
from fedelta.learning.pretrained import Pretrained
from fedelta.privacy.example_level import ROWS
from fedelta.secure.aggregation import SecureAggregation
from fedelta.secure.homomorphic import HomomorphicEncryption
from fedelta.secure.protocol_coordinator import STEPS


def facts(federation: Federation[Any], site: PartyId) -> Facts:
    """Of `federation`, as `site` takes part in it. Builds the model; raises what `Federation.init` does."""
    layout = federation.algorithm.layout(federation.init().algorithm, site)
    work: set[Work] = {"train"}
    if federation.validate_at_sites:
        work.add("evaluate")
    if federation.start is not None:
        work.add("statistics")
    collect, privacy, model = federation.collect, federation.privacy, federation.algorithm.task.model
    masked = isinstance(collect, SecureAggregation)
    return Facts(
        experiment=digest(federation),
        work=frozenset(work),
        steps=frozenset(STEPS if masked else ()),
        rounds=federation.rounds,
        training=f"{type(federation.algorithm).__name__}, {federation.algorithm.training}",
        tuning=repr(model.tuning) if isinstance(model, Pretrained) else "as the experiment's model says",
        tensors=tuple(entry.name for entry in layout.entries),
        parameters=layout.size,
        update_bytes=_update_bytes(federation, layout),
        collect=_way(federation),
        identities=isinstance(collect, SecureAggregation) and collect.identities is not None,
        least=collect.least,
        unit=None if privacy is None else privacy.unit,
        epsilon=math.inf if privacy is None or privacy.epsilon is None else privacy.epsilon,
        delta=1.0 if privacy is None else privacy.delta,
        noise=None if privacy is None else "coordinator" if privacy.central else "site",
        secret=federation.entropy == "system",
    )


def _way(federation: Federation[Any]) -> Way:
    """Of a collect that is not known here, nothing is taken for granted."""
    match federation.collect:
        case SecureAggregation():
            return "masks"
        case HomomorphicEncryption():
            return "encryption"
    return "clear"


def _update_bytes(federation: Federation[Any], layout: Layout) -> int | None:
    """Of the reply to "train"; None where the experiment transforms updates in its own way."""
    if federation.stages or federation.encoding != Float32():
        return None
    pieces = _pieces(federation, layout)
    privacy, collect = federation.privacy, federation.collect
    public: Sequence[str] = (ROWS,) if privacy is not None and ROWS in privacy.numbers else ()
    match collect:
        case SecureAggregation():
            return masked_bytes(collect, pieces, public, None if privacy is None else privacy.whole)
        case HomomorphicEncryption():
            return encrypted_bytes(collect, pieces, public)
    return codec.size({piece.name: _blank(piece) for piece in pieces})


def _pieces(federation: Federation[Any], layout: Layout) -> list[Piece]:
    """The tensors of an update, before a collect hides them."""
    algorithm, privacy = federation.algorithm, federation.privacy
    dtype = "float64" if privacy is not None and privacy.whole is not None else "float32"
    if privacy is None:
        sums = [*algorithm.task.objective.sums, "steps"]
    else:
        sums = [*privacy.numbers, *(["steps"] if privacy.unit == "example" else [])]
    numbers = ["weight", "count", *(f"sum/{name}" for name in sums)]
    return [
        Piece(name=algorithm.kind, dtype=dtype, shape=(layout.size,)),
        *(Piece(name=name, dtype="float64", shape=()) for name in numbers),
    ]


def _blank(piece: Piece) -> torch.Tensor:
    return torch.zeros((), dtype=getattr(torch, piece.dtype)).expand(piece.shape)  # one number of memory
