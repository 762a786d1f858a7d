"""What a site's policy has to know of a federation (fleet/policy.py), found in this party's own copy of it.

Limits: tensors and sizes are those of the first round; an algorithm may send others in later ones (RoLoRA alternates,
FedSB begins with whole weights). The door counts the bytes of every reply, whatever is said here.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from fedelta.algorithms import round_zero
from fedelta.algorithms.evaluation import NO_VALUES
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.forecast_encrypted import encrypted_bytes
from fedelta.algorithms.forecast_sums import masked_bytes, summed
from fedelta.algorithms.parts import Collect, Float32
from fedelta.algorithms.rehearsal import Piece
from fedelta.core import codec
from fedelta.core.digest import digest
from fedelta.core.messages import PartyId, Update
from fedelta.core.parameters import Layout, Parameters
from fedelta.fleet.policy import Facts, Way, Work
from fedelta.learning.pretrained import Pretrained
from fedelta.privacy.example_level import ROWS
from fedelta.secure.aggregation import SecureAggregation
from fedelta.secure.homomorphic import HomomorphicEncryption
from fedelta.secure.protocol_coordinator import STEPS

_LEAST_MESSAGE = 64 * 2**20


def facts(federation: Federation[Any], site: PartyId, sites: Sequence[PartyId] = ()) -> Facts:
    """Of `federation`, as `site` takes part in it; `sites` are all that do, or none where this site does not know.

    Builds the model; raises what `Federation.init` does, and BadInput where so many sites have no secure sum.
    """
    layout = federation.algorithm.layout(federation.init().algorithm, site)
    work: set[Work] = {"train"}
    if federation.validate_at_sites:
        work.add("evaluate")
    if federation.start is not None:
        work.add("statistics")
    collect, privacy, model = federation.collect, federation.privacy, federation.algorithm.task.model
    masked = isinstance(collect, SecureAggregation)
    update = _update_bytes(federation, layout)
    return Facts(
        experiment=digest(federation),
        work=frozenset(work),
        steps=frozenset(STEPS if masked else ()),
        rounds=federation.rounds,
        training=f"{type(federation.algorithm).__name__}, {federation.algorithm.training}",
        tuning=repr(model.tuning) if isinstance(model, Pretrained) else "as the experiment's model says",
        tensors=tuple(entry.name for entry in layout.entries),
        shapes=tuple(entry.shape for entry in layout.entries),
        parameters=layout.size,
        update_bytes=update,
        round_bytes=_round_bytes(federation, update, sites),
        collect=_way(federation),
        identities=isinstance(collect, SecureAggregation) and collect.identities is not None,
        least=collect.least,
        unit=None if privacy is None else privacy.unit,
        epsilon=math.inf if privacy is None or privacy.epsilon is None else privacy.epsilon,
        delta=1.0 if privacy is None else privacy.delta,
        noise=None if privacy is None else "coordinator" if privacy.central else "site",
        secret=federation.entropy == "system",
    )


def largest_message(federation: Federation[Any], site: PartyId, given_mib: int | None = None) -> int:
    """Bytes that a message may have: `given_mib`, or eight times what a model takes in float64, and 64 MiB at least.

    A model is all that is trained, or moves with it; the sums of features for a closed-form start count where they are
    more. It counts as the collect makes it: integers under masks, or ciphertexts. Limits: this is what the algorithms
    here send many times over, and no bound of what others may, or of the stacked factors of thousands of sites.
    """
    if given_mib is not None:
        return given_mib * 2**20
    algorithm, state = federation.algorithm, federation.init().algorithm
    numbers = max(algorithm.parameters(state).layout.size, algorithm.layout(state, site).size)
    if federation.start is not None:
        module = algorithm.task.flat(federation.seed, replace(federation.plan, device="cpu")).module
        numbers = max(numbers, round_zero.sums_layout(algorithm.task, module).size)
    model = Piece(name=algorithm.kind, dtype="float64", shape=(numbers,))
    return max(_LEAST_MESSAGE, 8 * _bytes(federation, [model], (), None))


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
    privacy = federation.privacy
    public: Sequence[str] = (ROWS,) if privacy is not None and ROWS in privacy.numbers else ()
    whole = None if privacy is None else privacy.whole
    return _bytes(federation, _pieces(federation, layout), public, whole)


def _round_bytes(federation: Federation[Any], update: int | None, sites: Sequence[PartyId]) -> int | None:
    """Of all messages of a site that is asked for all that there is in a round, together with all others."""
    collect = federation.collect
    masked = isinstance(collect, SecureAggregation)
    if update is None or (masked and not sites):
        return None
    found = update + _steps_bytes(collect, _largest(federation, sites))
    if federation.validate_at_sites:
        sums = dict.fromkeys(federation.algorithm.task.objective.sums, 0.0)
        told = Update(values=Parameters.zeros(NO_VALUES), sums=sums).to_tensors()
        pieces = [
            Piece(name=name, dtype=str(one.dtype).removeprefix("torch."), shape=tuple(one.shape))
            for name, one in told.items()
        ]
        found += _bytes(federation, pieces, (), None) + _steps_bytes(collect, sites)
    return found


def _largest(federation: Federation[Any], sites: Sequence[PartyId]) -> Sequence[PartyId]:
    """The largest cohort of all rounds; all sites where they are drawn in secret."""
    if not sites or federation.entropy == "system":
        return sites
    rounds = range(1, federation.rounds + 1)
    return max((federation.sampling(sites, number, federation.seed) for number in rounds), key=len, default=sites)


def _steps_bytes(collect: Collect, sites: Sequence[PartyId]) -> int:
    """Of a site's messages around its answer, where the answers of these sites are added up; an empty one is none."""
    return summed(collect, sites, (), ()).each_up - codec.size({}) if isinstance(collect, SecureAggregation) else 0


def _bytes(
    federation: Federation[Any], pieces: Sequence[Piece], public: Sequence[str], whole: Literal[16, 32] | None
) -> int:
    """Of an answer that has these tensors before a collect hides them; the sums `public` it does not."""
    match federation.collect:
        case SecureAggregation() as collect:
            return masked_bytes(collect, pieces, public, whole)
        case HomomorphicEncryption() as collect:
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
