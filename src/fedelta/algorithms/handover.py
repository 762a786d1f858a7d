"""The end of a run: every site is handed what it needs for its final model, and nothing of it leaves for that.

The global model goes out as it is: it is no more than the sum of what was released. Where a part of the model stays at
each site, that site gets what it would get for a next round, and adds the part that it remembers. Either way it ends
with the bits that a simulation saves. A reply is empty, so that no collect and no guarantee has a part in it.

Limits: of a model whose base moves (FLoRA, FedEx-LoRA) the moved weights go out whole, since a site may have lost those
that it had. Who tunes a model that never leaves its owner (OffsiteTuning) has no other model to hand out; a site that
cannot build that one is left without, with the reason.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.state import FederationState
from fedelta.core.exchange import exchange
from fedelta.core.messages import PartyId, Reply, Requests, Tensors
from fedelta.core.program import HAND_OVER, Fleet


def requests(algorithm: Algorithm[Any], state: FederationState[Any], to: Sequence[PartyId]) -> Requests:
    """What hands these sites the models that they have after `state`."""
    shared: Tensors = {"parameters": algorithm.parameters(state.algorithm).vector}
    own: dict[PartyId, Tensors] = {}
    if algorithm.personal:
        shared, own = algorithm.broadcast(state.algorithm, {party: state.bases.get(party, -1) for party in to})
    attempt = secrets.randbits(62)  # or a site would answer from memory that it has kept what may be gone by now
    return Requests(
        to=to, op=HAND_OVER, round=state.round, attempt=attempt, bases=state.bases, shared=shared, bodies=own
    )


def hand_over(algorithm: Algorithm[Any], state: FederationState[Any], fleet: Fleet) -> dict[PartyId, str]:
    """Hand every site its model; those that have not kept it, with the reason, in the order of the fleet."""
    parties, without = fleet.parties(), dict[PartyId, str]()
    for reply in exchange(fleet, requests(algorithm, state, parties)):
        if isinstance(reply, Reply) and reply.error is not None:  # each is asked, and answers, for itself
            without[reply.sender] = reply.error
    return {party: without[party] for party in parties if party in without}
