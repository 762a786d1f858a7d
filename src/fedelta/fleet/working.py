"""What a site does for a request, in the thread that works: ask its owner's guards, answer, keep, take down."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from fedelta.core.errors import BadInput
from fedelta.core.messages import Reply, Request
from fedelta.core.program import Program
from fedelta.core.threads import intra_op_threads
from fedelta.fleet.answer import Sites, answer
from fedelta.fleet.kept import Kept, Stored
from fedelta.fleet.wire import Outgoing

log = logging.getLogger(__name__)


class Guards(Protocol):
    """What stands between the coordinator and the site's data; it is asked in the thread that works."""

    def refuse(self, request: Request) -> str | None:
        """Why the site does not work on a request; None if it does."""
        ...

    def leaving(self, request: Request, reply: Reply) -> None:
        """Take down a reply, durably, before it leaves, which it does not where this raises.

        The message of BadInput leaves in its place; of any other error nothing does but that there was one.
        """
        ...


class Work:
    """The work of one site; the arguments are those of Member. `kept` outlasts the process."""

    def __init__(
        self,
        program: Program[Any],
        site: Callable[[str], object],
        kept: Kept,
        *,
        keep: Callable[[nn.Module, int], object] | None,
        guards: Guards | None,
        threads: int,
    ) -> None:
        self._program, self._load = program, site
        self._kept, self._keep = kept, keep
        self._guards, self._threads = guards, threads
        self._sites: Sites | None = None

    def enter(self) -> None:
        """Begin anew with what is kept of the run that was entered."""
        self._sites = Sites(self._load, self._kept.memory, self._keep)

    def stored(self, said: bytes, request: Request) -> Stored:
        """The reply to a request, which has been taken down and may leave."""
        reply = self._answer(request)
        try:
            message = Outgoing(reply.body, reply.meta)
            if self._guards is not None:
                self._guards.leaving(request, reply)
            if reply.error is None:  # after it was taken down: what is stored is sent without asking again
                self._kept.store(said, reply, request.job)
        except Exception as error:
            known, meant = _known_of("kept back", request), isinstance(error, BadInput)
            log.warning("the reply to %s: %s", request.id, error, exc_info=not meant, extra=known)
            why = str(error) if meant else "what would have left could not be taken down or kept"
            reply, message = Reply.failure(request, why), Outgoing({})
        return Stored(reply.answers, reply.round, request.job, reply.error, message)

    def _answer(self, request: Request) -> Reply:
        try:
            why = None if self._guards is None else self._guards.refuse(request)
            if why is not None:
                log.warning("request %s is refused: %s", request.id, why, extra=_known_of("refused", request))
                return Reply.failure(request, why)
            assert self._sites is not None
            site = self._sites.of(request)
            self._kept.recall(site)
            try:
                with intra_op_threads(self._threads):
                    return answer(self._program, request, site)
            finally:
                self._kept.take_down(site)
        except BaseException as error:  # of the program: whoever asked is told, and the site stays
            log.exception("request %s failed", request.id, extra=_known_of("failed", request))
            return Reply.failure(request, f"a bug at the site ({type(error).__name__}); its log has the traceback")


def _known_of(event: str, request: Request) -> dict[str, object]:
    """For a log that is read by programs."""
    return {"event": event, "site": request.to, "job": request.job, "round": request.round, "op": request.op}
