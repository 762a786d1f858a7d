"""Requests to many sites, and what comes of them: one step of any protocol."""

from collections.abc import Iterator

from fedelta.core.messages import PartyId, Replies, Reply, Requests
from fedelta.core.program import Fleet


def exchange(fleet: Fleet, requests: Requests, together: int = 1) -> Iterator[Reply | Replies]:
    """Send the requests; yield what answers them, in order of arrival, until every site has answered or failed.

    `together` as in Fleet.submit_many. Where the iterator is closed before its end, what is outstanding is withdrawn.
    """
    waiting = set(requests.to)
    fleet.submit_many(requests, together)
    try:
        while waiting:
            reply = fleet.next_reply()
            if reply is None:
                raise RuntimeError(f"the fleet has nothing outstanding, and {len(waiting)} replies are missing")
            answered = _answered(reply, requests) & waiting
            if answered:
                waiting -= answered
                yield reply
    finally:  # an interrupted round can be asked for again
        if waiting:
            fleet.cancel(requests.id)
            for party in waiting:
                fleet.cancel(requests.id_to(party))


def _answered(reply: Reply | Replies, requests: Requests) -> set[PartyId]:
    """The parties of `requests` that a reply speaks for."""
    if isinstance(reply, Replies):
        return {*reply.senders, *reply.errors} if reply.answers == requests.id else set()
    return {reply.sender} if reply.answers == requests.id_to(reply.sender) else set()
