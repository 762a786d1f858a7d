"""From replies to updates: what arrives is decoded, checked, passed through the stages in reverse, and accepted."""

from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from fedelta.aggregation.rule import Rule
from fedelta.algorithms.soundness import Parts
from fedelta.algorithms.tally import Tally, bodies, parted
from fedelta.core.errors import BadTensors, RoundLost, TooFewSites
from fedelta.core.messages import MOST, PartyId, Replies, Reply, Update
from fedelta.core.parameters import Layout
from fedelta.core.program import Sight
from fedelta.privacy.example_level import ROWS


def arriving(
    federation: Parts,
    replies: Generator[Reply | Replies],
    layout: Callable[[PartyId], Layout],
    rule: Rule,
    tally: Tally,
    round: int,
) -> Iterator[tuple[Sequence[PartyId], Update]]:
    """The updates as they come, each with the sites that it is of; `tally` takes note of the rest.

    Once there are enough, what is outstanding is withdrawn. Raises TooFewSites after the last one if too few were
    accepted, RoundLost if nothing else can come of the round.
    """
    for reply in replies:
        for senders, body in bodies(reply, tally.absent):
            public, tensors = parted(body) if federation.collect.shows is Sight.SUM else ({}, body)
            try:
                update = federation.encoding.decode(tensors, layout(senders[0]))
                rows = _checked(federation, update, len(senders))
            except BadTensors as error:
                tally.refuse(senders, f"its update is malformed: {error}")
                continue
            each = public[ROWS].tolist() if ROWS in public else [rows] * len(senders)
            tally.arrived |= zip(senders, map(int, each), strict=True)
            for stage in reversed(federation.stages):
                update = stage.on_arrival(update)
            refusal = rule.refuse(update)
            if refusal is not None:
                tally.refuse(senders, refusal)
                continue
            tally.accept(senders, update.count)
            yield senders, update
        if federation.enough is not None and tally.accepted >= federation.enough:
            replies.close()
            tally.late("enough sites had answered before it did")
            break
    noised = federation.privacy is not None and federation.privacy.central
    if tally.accepted < federation.min_sites and federation.collect.shows is Sight.SUM:
        raise RoundLost(f"the sum of the sites cannot be used ({tally.reasons(tally.absent)})")
    if tally.accepted < federation.min_sites and not noised:
        raise TooFewSites(tally.shortage(round, federation.min_sites))


def _checked(federation: Parts, update: Update, senders: int) -> float:
    """The rows of an update, 1 where they are not counted. Raises BadTensors for one that could not be added."""
    privacy, algorithm = federation.privacy, federation.algorithm
    dtype = torch.float32 if privacy is None or privacy.whole is None else torch.float64
    if update.values.vector.dtype != dtype:
        raise BadTensors(f"its values are {update.values.vector.dtype}, not {dtype}")
    if update.kind != algorithm.kind:
        raise BadTensors(f"it is a {update.kind}, not a {algorithm.kind}")
    if update.count != senders:
        raise BadTensors(f"it claims to be of {update.count} sites")
    needed = algorithm.task.objective.sums if privacy is None else privacy.numbers
    missing = set(needed) - update.sums.keys()
    if missing:
        raise BadTensors(f"it lacks the sums {', '.join(sorted(missing))}")
    rows = 1.0 if privacy is None or privacy.central else update.sums.get(ROWS, 1.0)
    if not (1 <= rows <= senders * MOST and rows == int(rows)):  # also catches NaN
        raise BadTensors(f"it says that it is of {rows:g} rows")
    return rows
