"""What a federation is at between two rounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedelta.algorithms.stopping import Best
from fedelta.core.messages import PartyId
from fedelta.privacy.guarantee import PrivacyState

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class FederationState(Generic[S]):
    """All that a resume needs. `bases` has, per site, the round of its last accepted reply."""

    algorithm: S
    round: int = 0
    started: bool = False  # round zero is over, if there is one
    bases: Mapping[PartyId, int] = field(default_factory=dict)
    best: Best = Best()
    stopped: str | None = None
    stop: str = ""  # the condition to which `best` and `stopped` belong: another one starts anew
    privacy: PrivacyState | None = None  # None: there is no guarantee
    lost: int = 0  # rounds in a row that were given up
