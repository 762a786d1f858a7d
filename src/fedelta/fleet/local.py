"""A fleet in this process: every site is handled by `next_reply` itself, one after the other.

The fleet to debug with, and the reference for the others. Limits: a timeout cannot interrupt a site that is at work.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fedelta.core.errors import BadInput
from fedelta.core.messages import PartyId, Reply, Request, Tensors
from fedelta.core.program import Program
from fedelta.core.threads import intra_op_threads
from fedelta.fleet.answer import Sites, answer, check_message, checked_names, twice, unknown_site


class Local:
    """Sites in this process.

    `threads` is the number of intra-op threads of PyTorch while a site works, so that the bits of training do not
    depend on the machine's number of cores; the coordinator's own number is restored afterwards. A site sees the very
    tensors of the request and must not write into them.
    """

    def __init__(
        self,
        program: Program[Any],
        site: Callable[[str], object],
        names: Sequence[PartyId],
        *,
        threads: int = 1,
    ) -> None:
        if threads < 1:
            raise BadInput(f"Local.threads must be >= 1, got {threads}")
        self._program = program
        self._sites = Sites(site)
        self._names = checked_names(names)
        self._known = frozenset(self._names)
        self._threads = threads
        self._queue: dict[str, Request] = {}
        self._shared: Tensors | None = None

    def parties(self) -> Sequence[PartyId]:
        return self._names

    def submit(self, request: Request) -> None:
        """Queue a request. Raises BadInput for an unknown site, an outstanding id, or what cannot be sent."""
        if request.to not in self._known:
            raise unknown_site(request.to, self._names)
        if request.id in self._queue:
            raise twice(request.id)
        check_message(request.body, request.meta)
        if request.shared is not self._shared:  # one object for the whole cohort: checked once
            check_message(request.shared)
            self._shared = request.shared
        self._queue[request.id] = request

    def next_reply(self, timeout_s: float | None = None) -> Reply | None:
        """Handle the request that came first; None if there is none. Raises whatever bug `handle` raised."""
        if not self._queue:
            return None
        request = self._queue.pop(next(iter(self._queue)))
        if not self._queue:
            self._shared = None
        with intra_op_threads(self._threads):
            return answer(self._program, request, self._sites.of(request))

    def cancel(self, request_id: str) -> None:
        self._queue.pop(request_id, None)
