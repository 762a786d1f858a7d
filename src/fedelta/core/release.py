"""What a mechanism lets out about protected data: an entry of a privacy ledger, and what a ledger is.

An event is a `DpEvent` of dp-accounting in plain form (`privacy/events.py`), so that a report and a ledger can hold it
and no other room needs that library.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from fedelta.core.errors import BadInput
from fedelta.core.messages import PartyId, Plain

Unit = Literal["site", "example"]  # what a guarantee hides: all rows of a site, or one row
# Which data sets are neighbours, under dp-accounting's names: with one unit more or fewer, with another one in its
# place, or with one that counts as nothing in its place (zero-out: the number of units is then public).
Relation = Literal["add_or_remove_one", "replace_one", "replace_special"]

Accountant = Literal["pld", "rdp"]  # privacy loss distributions, or Renyi differential privacy


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """One output of a mechanism."""

    event: Mapping[str, Plain]
    unit: Unit
    relation: Relation
    of: PartyId | None = None  # the one site whose data are in it; None: those of all sites
    job: str = ""  # which experiment it was for: its digest
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much may be learned about a unit: epsilon > 0 and 0 < delta < 1, as `accountant` computes them."""

    epsilon: float
    delta: float
    accountant: Accountant = "pld"

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise BadInput(f"Budget.epsilon must be > 0 and finite, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise BadInput(f"Budget.delta must be above 0 and below 1, got {self.delta}")
        if self.accountant not in get_args(Accountant):
            raise BadInput(f"Budget.accountant is 'pld' or 'rdp', got {self.accountant!r}")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What may be released about some data."""

    budget: Budget
    unit: Unit
    of: PartyId | None = None  # None: for every site


class Ledger(Protocol):
    """The releases about some data. It only grows."""

    def releases(self) -> Sequence[Release]:
        """All of them, in the order in which they were recorded."""
        ...

    def record(self, *releases: Release, within: Limit | None = None) -> None:
        """Add some, together; they are durable when this returns, so call it before what is released leaves.

        Raises BudgetSpent, and adds nothing, if that would pass `within`, or a limit that the owner of the data has
        set. Nobody else adds anything between the look and the addition.
        """
        ...
