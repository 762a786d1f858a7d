"""What all guarantees have in common: how much noise, or how much may be spent."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.messages import Tensors
from fedelta.core.release import Accountant, Budget, Relation, Release, Unit
from fedelta.privacy.accounting import epsilon, noise_multiplier
from fedelta.privacy.events import Event, gaussian
from fedelta.privacy.matrix_noise import NoiseState

ROUNDS = "privacy/rounds"  # in the broadcast, where sites add the noise: for how many rounds it has to do


class Guarantee(Protocol):
    """The settings that every guarantee has; exactly one of `epsilon` and `noise` may be left out."""

    @property
    def unit(self) -> Unit: ...

    @property
    def epsilon(self) -> float | None:
        """What the run may spend in all; it ends when the next round would spend more. None: no limit."""
        ...

    @property
    def delta(self) -> float: ...

    @property
    def noise(self) -> float | None:
        """The noise multiplier: standard deviation over sensitivity. None: as much as `epsilon` asks for."""
        ...

    @property
    def accountant(self) -> Accountant: ...

    @property
    def start_share(self) -> float:
        """In (0, 1): how much of epsilon a closed-form start may spend, where rounds of training follow."""
        ...


def told_number(told: Tensors, name: str) -> int:
    """A whole number of the broadcast. Raises BadTensors if it is none."""
    found = told.get(name)
    if found is None or found.dtype != torch.int64 or found.ndim:
        raise BadTensors(f"the request has to say {name!r}, as one whole number")
    return int(found)


def check(guarantee: Guarantee) -> None:
    """Raises BadInput for settings that are out of range."""
    name = type(guarantee).__name__
    if guarantee.epsilon is None and guarantee.noise is None:
        raise BadInput(f"{name} needs an epsilon, from which the noise follows, or the noise multiplier itself")
    if guarantee.noise is not None and not 0 < guarantee.noise < math.inf:
        raise BadInput(f"{name}.noise must be > 0 and finite, got {guarantee.noise}")
    if guarantee.epsilon is not None and not 0 < guarantee.epsilon < math.inf:
        raise BadInput(f"{name}.epsilon must be > 0 and finite, got {guarantee.epsilon}")
    if not 0 < guarantee.delta < 1:
        raise BadInput(f"{name}.delta must be above 0 and below 1, got {guarantee.delta}")
    if not 0 < guarantee.start_share < 1:
        raise BadInput(f"{name}.start_share must be above 0 and below 1, got {guarantee.start_share}")


def budget(guarantee: Guarantee) -> Budget | None:
    """What may be spent; None if there is no limit."""
    if guarantee.epsilon is None:
        return None
    return Budget(epsilon=guarantee.epsilon, delta=guarantee.delta, accountant=guarantee.accountant)


@dataclass(frozen=True, kw_only=True)
class PrivacyState:
    """What a run has to remember for its guarantee, in its checkpoint."""

    sites: int = 0  # registered when the run began; 0: it has not begun
    names: str = ""  # a digest of theirs
    rounds: int = 0  # for which the noise was made
    noise: float = 0.0  # the multiplier of a round, where all sites have the same
    start: bool = False  # whether there is a round zero
    start_noise: float = 0.0  # its multiplier
    norm: float = 0.0  # the present L2 bound
    cohort: int = 0  # sites that a round asks, where the noise is made for so many
    turn: int = 0  # rounds that have come about: which of the public rotations is next, where there are such
    recorded: int = 0  # releases in the ledger when this state was made
    prefix: str = ""  # a digest of them
    correlated: NoiseState | None = None  # of earlier rounds, where noise is correlated with theirs


def start_multiplier(guarantee: Guarantee, relation: Relation, rounds: int, before: Sequence[Release]) -> float:
    """The noise multiplier of round zero, which is one Gaussian mechanism.

    It gets the share `start_share` of what `before` leaves of epsilon; all of it where no round follows.
    """
    limit = budget(guarantee)
    if guarantee.noise is not None or limit is None:
        assert guarantee.noise is not None
        return guarantee.noise
    spent = epsilon(before, delta=limit.delta, accountant=limit.accountant, unit=guarantee.unit)
    share = guarantee.start_share if rounds else 1.0
    part = replace(limit, epsilon=spent + share * (limit.epsilon - spent)) if spent < limit.epsilon else limit
    return noise_multiplier(gaussian, relation, part, unit=guarantee.unit, before=before)


def solved(
    guarantee: Guarantee,
    event: Callable[[float], Event],
    relation: Relation,
    count: int,
    before: Sequence[Release],
    start: bool,
) -> tuple[float, float]:
    """The noise multipliers of a round and of round zero, with which `count` rounds keep the budget after `before`.

    Without a `start` that of round zero is 0. Raises BadInput where no noise is enough, BudgetSpent where nothing is
    left.
    """
    limit = budget(guarantee)
    if guarantee.noise is not None or limit is None:
        assert guarantee.noise is not None
        return guarantee.noise, guarantee.noise if start else 0.0
    first = start_multiplier(guarantee, relation, count, before) if start else 0.0
    if not count:
        return first, first
    zeroth = [Release(event=gaussian(first), unit=guarantee.unit, relation=relation)] if start else []
    noise = noise_multiplier(event, relation, limit, unit=guarantee.unit, count=count, before=[*before, *zeroth])
    return noise, first
