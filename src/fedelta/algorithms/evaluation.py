"""What sites measure on the rows that they hold back, added up."""

import math
from collections.abc import Iterator, Mapping

from fedelta.aggregation.mean import NUMBER_BOUND
from fedelta.algorithms.tally import Tally, bodies
from fedelta.core.codec import short
from fedelta.core.errors import BadTensors, TooFewSites
from fedelta.core.messages import Replies, Reply, Tensors, Update
from fedelta.core.parameters import Layout
from fedelta.core.program import Sight
from fedelta.learning.objectives import Objective

NO_VALUES = Layout.of({})  # an evaluation is an update that consists of numbers alone


def added(replies: Iterator[Reply | Replies], objective: Objective, tally: Tally, shows: Sight) -> dict[str, float]:
    """The sums of an objective over all sites; `tally` takes note of each, where it is seen, and of who gave none."""
    sums: dict[str, list[float]] = {}
    try:
        for reply in replies:
            for senders, body in bodies(reply, tally.unmeasured):
                try:
                    found = _of(body, objective)
                except BadTensors as error:
                    tally.unmeasured |= dict.fromkeys(senders, str(error))
                    continue
                if shows is Sight.EACH and found:
                    metrics = objective.summarise(found)
                    tally.per_site[senders[0]] = {f"validation_{name}": value for name, value in metrics.items()}
                for name, value in found.items():
                    sums.setdefault(name, []).append(value)
    except TooFewSites as error:  # no sum could be had
        tally.unmeasured |= dict.fromkeys(tally.cohort, str(error))
    # fsum is exact, so the order of arrivals does not show
    return {name: math.fsum(values) for name, values in sums.items()}


def _of(body: Tensors, objective: Objective) -> Mapping[str, float]:
    """The sums of an evaluation, empty from a site that holds nothing back. Raises BadTensors if there are none."""
    sums = Update.from_tensors(body, NO_VALUES).sums
    if sums and sums.keys() != set(objective.sums):
        raise BadTensors(f"its evaluation has the sums {short(sorted(sums))}")
    if not all(abs(value) <= NUMBER_BOUND for value in sums.values()):
        raise BadTensors("its evaluation gave a number that is not finite, or cannot be added")
    return sums
