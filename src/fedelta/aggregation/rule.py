"""What a rule is: how the updates of a round become one."""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from fedelta.core.messages import Update, Updates
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


@runtime_checkable
class ManyRule(Rule, Protocol):
    """A rule that can begin its work where many sites trained at once: one update goes on instead of all of them."""

    def refuse_many(self, updates: Updates) -> Mapping[int, str]:
        """As `refuse` for each row; those that cannot be taken, with the reason."""
        ...

    def combine(self, updates: Updates) -> Update:
        """One update that stands for all these, with their number as its `count`; none of them is refused."""
        ...
