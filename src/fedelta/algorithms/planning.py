"""The execution plan of a federation, settled by a short timed trial on data of its own sites."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from fedelta.algorithms.federation import Federation
from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.examples import Examples
from fedelta.core.messages import PartyId
from fedelta.core.program import Sight, SiteData
from fedelta.learning.trial import settle

S = TypeVar("S")
_TRIED = 256  # sites whose data a trial may use


def planned(
    federation: Federation[S], site: Callable[[str], object], names: Sequence[PartyId], *, workers: int = 1
) -> tuple[Federation[S], str]:
    """`federation` with all that its plan leaves open chosen, and one sentence that says what was chosen and why.

    `site` and `names` are those that its fleet gets, `workers` the processes that its sites are to be divided among.
    The choice depends on this machine and moment; write `federation.plan` down to repeat a run to the last bit. Sites
    that have no usable data are left out of the trial.
    """
    task, plan = federation.algorithm.task, federation.plan
    by_example = federation.privacy is not None and federation.privacy.unit == "example"
    alone = by_example or not federation.algorithm.at_once or federation.collect.shows is Sight.SUM
    if alone and plan.cohort is None:
        plan = replace(plan, cohort=1)

    def usable() -> list[Examples]:
        found = []
        for name in islice(names, _TRIED):
            with suppress(FedeltaError, OSError):
                given: object = site(name)
                data = SiteData.of(given).train  # type: ignore[arg-type]
                task.check(data)
                if not len(data):
                    raise BadInput("no examples")
                found.append(data)
        return found

    at_once = len(federation.sampling(names, 1, federation.seed))
    trial = settle(
        plan,
        task,
        federation.algorithm.training,
        [] if plan.settled else usable(),
        federation.seed,
        at_most=-(-at_once // max(1, workers)),
    )
    return replace(federation, plan=trial.plan), trial.said
