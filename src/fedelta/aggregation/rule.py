"""What a rule is: how the updates of a round become one."""

from collections.abc import Iterable
from typing import Protocol

from fedelta.core.messages import Update
from fedelta.core.program import Sight


class Rule(Protocol):
    """A rule says what it has to see, which updates it cannot take, and makes one update of the others."""

    @property
    def needs(self) -> Sight:
        """Whether the rule compares single updates or works on their sum alone."""
        ...

    def refuse(self, update: Update) -> str | None:
        """One sentence that says why this update cannot be taken; None if it can. A refused site is absent."""
        ...

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        """One update from those that arrive; `cohort` is the number of sites that were asked.

        Raises TooFewSites if nothing can be made of what arrived, and BadInput for an update that `refuse` refuses.
        """
        ...
