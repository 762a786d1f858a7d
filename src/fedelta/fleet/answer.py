"""How a site answers a request, in whatever process it lives; every fleet uses this.

An absent party is data: an error that a user can mend, a file that is not there and a lack of memory become a reply
that says so. A bug is an exception: it passes through.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.memory import Memory
from fedelta.core.messages import Meta, PartyId, Replies, Reply, Request, Requests, Tensors
from fedelta.core.program import FrozenProgram, ManyProgram, Program, Site, SiteData
from fedelta.core.withheld import NO_CPU_MEMORY, out_of_memory
from fedelta.fleet.blocks import check_dense

_ABSENT = (FedeltaError, OSError, MemoryError, RuntimeError)  # of the last one, only a lack of memory


def answer(program: Program[Any], request: Request, site: Site) -> Reply:
    """The reply of `site` to `request`; a FedeltaError, OSError or lack of memory in `handle` becomes a failure.

    Raises RuntimeError if `handle` answered another request, or with what cannot be sent, or wrote into the tensors
    that it was given: they belong to the whole cohort. Writes that PyTorch does not count (through `.data` or
    `.numpy()`) are not seen.
    """
    before = _versions(request.shared, request.body)
    try:
        reply = program.handle(request, site)
    except _ABSENT as error:
        reply = Reply.failure(request, _why_absent(error))
    if _versions(request.shared, request.body) != before:
        raise RuntimeError(f"the program wrote into the tensors of request {request.id}; clone them before writing")
    if reply.answers != request.id:
        raise RuntimeError(f"the program answered request {request.id} with a reply to {reply.answers}")
    try:
        check_message(reply.body, reply.meta)
    except BadInput as error:
        raise RuntimeError(f"the reply to request {request.id} cannot be sent: {error}") from error
    return reply


def answer_many(program: Program[Any], requests: Requests, sites: Sequence[Site]) -> Replies:
    """As `answer`, of many sites in one go: what fails in `handle_many` as a whole is a failure of every site.

    Raises RuntimeError also if the replies are not of exactly the sites that were asked, each once.
    """
    before = _versions(requests.shared, *requests.bodies.values())
    try:
        replies = cast(ManyProgram[Any], program).handle_many(requests, sites)
    except _ABSENT as error:
        replies = Replies.failure(requests, _why_absent(error))
    if _versions(requests.shared, *requests.bodies.values()) != before:
        raise RuntimeError(f"the program wrote into the tensors of requests {requests.id}; clone them before writing")
    if replies.answers != requests.id:
        raise RuntimeError(f"the program answered requests {requests.id} with replies to {replies.answers}")
    answered = {*replies.senders, *replies.errors}
    if len(replies.senders) + len(replies.errors) != len(answered) or answered != set(requests.to):
        raise RuntimeError(f"the replies to requests {requests.id} are not of the sites that were asked, each once")
    try:
        check_message(replies.body)
    except BadInput as error:
        raise RuntimeError(f"the replies to requests {requests.id} cannot be sent: {error}") from error
    return replies


def frozen(program: Program[Any]) -> str:
    """Digest of the weights that every party has to have already, as FrozenProgram says it; empty if there are none."""
    found = getattr(program, "frozen", None)
    return "" if found is None else cast(FrozenProgram[Any], program).frozen() or ""


def _why_absent(error: Exception) -> str:
    """One sentence about what a user can mend; anything else is raised again."""
    if isinstance(error, FedeltaError):
        return str(error)
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    if not out_of_memory(error):
        raise error
    said = str(error).rpartition(NO_CPU_MEMORY)[2].splitlines()
    return f"out of memory ({said[0]})" if said else "out of memory"


def check_message(tensors: Tensors, meta: Meta | None = None) -> None:
    """Raises BadTensors for a tensor that is not dense, and BadInput for metadata that are not plain JSON."""
    for name, tensor in tensors.items():
        check_dense(name, tensor)
    try:
        plain = not meta or json.loads(json.dumps(dict(meta), allow_nan=False)) == meta
    except (TypeError, ValueError, RecursionError):
        plain = False
    if not plain:  # also a tuple or a key 1, which JSON turns into a list and a "1"
        raise BadInput(f"the metadata {meta!s:.80} are not plain JSON; send numbers that are finite, text and lists")


def _versions(*mappings: Tensors) -> list[int]:
    """PyTorch's count of the writes into each tensor; inference tensors have none and are left out."""
    tensors = itertools.chain.from_iterable(mapping.values() for mapping in mappings)
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


class Sites:
    """The sites of one process, each made on its first request and kept.

    `load(name)` is the experiment's `site` function. Its result is kept once it has succeeded; a failure is raised anew
    at every attempt to read the data. `spill` is the folder where the sites' memory is kept, one folder per site; None:
    in this process. `keep` is each site's own (Site.keep).
    """

    def __init__(
        self,
        load: Callable[[str], object],
        spill: Path | None = None,
        keep: Callable[[nn.Module, int], object] | None = None,
    ) -> None:
        self._load = load
        self._spill = spill
        self._keep = keep
        self._sites: dict[PartyId, Site] = {}
        self._attempts: dict[PartyId, tuple[str, int, int]] = {}

    def of(self, request: Request) -> Site:
        """The site that `request` is for; its scratch is emptied when a new attempt begins."""
        return self._at(request.to, (request.job, request.round, request.attempt))

    def many(self, requests: Requests) -> list[Site]:
        """As `of` each of them."""
        attempt = (requests.job, requests.round, requests.attempt)
        return [self._at(name, attempt) for name in requests.to]

    def forget(self, names: Collection[PartyId]) -> None:
        """Empty the scratch of these sites: their next request is a new attempt, whatever it says."""
        for name in names:
            if self._attempts.pop(name, None) is not None:
                self._sites[name].scratch.clear()

    def _at(self, name: PartyId, attempt: tuple[str, int, int]) -> Site:
        site = self._sites.get(name)
        if site is None:
            memory = Memory() if self._spill is None else Memory(self._spill / _folder_name(name))
            site = self._sites[name] = Site(id=name, data=_once(self._load, name), memory=memory, keep=self._keep)
        if self._attempts.get(name) != attempt:
            site.scratch.clear()
            self._attempts[name] = attempt
        return site


def _folder_name(name: PartyId) -> str:
    """Of a site; any text may be a name, also one that no file can have."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _once(load: Callable[[str], object], name: str) -> Callable[[], SiteData]:
    loaded: list[SiteData] = []

    def data() -> SiteData:
        if not loaded:
            given: Any = load(name)  # SiteData.of checks the type
            loaded.append(SiteData.of(given))
        return loaded[0]

    return data


def checked_names(names: Sequence[PartyId]) -> tuple[PartyId, ...]:
    """The names of a fleet's sites. Raises BadInput if there are none, or one twice."""
    if not names:
        raise BadInput("a fleet needs at least one site; let sites() return their names")
    doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubled:
        raise BadInput(f"site {doubled[0]!r} is named twice; let sites() return distinct names")
    return tuple(names)


def check_spill(spill: Path | None, fleet: str) -> None:
    """Raises BadInput unless the folder for what sites keep is there, or none is given."""
    if spill is not None and not spill.is_dir():
        raise BadInput(f"{fleet}.spill must be a folder, and {str(spill)!r} is none; create it")


def unknown_site(name: PartyId, names: Sequence[PartyId]) -> BadInput:
    """The error for a request to a site that the fleet does not have."""
    known = ", ".join(repr(known) for known in names[:5]) + (", …" if len(names) > 5 else "")
    return BadInput(f"there is no site {name!r} among the {len(names)} of this fleet ({known}); add it to sites()")


def twice(request_id: str) -> BadInput:
    """The error for a request whose id is still outstanding."""
    return BadInput(f"request {request_id} is already outstanding; give a second try another `attempt`")


def parts(requests: Requests, together: int, known: Collection[PartyId]) -> list[Requests]:
    """`requests` in parts of `together` sites; `known` are the sites of the fleet, in their order.

    Raises BadInput for an unknown site, a site that is named twice, or what cannot be sent.
    """
    if together < 1:
        raise BadInput(f"together must be >= 1, got {together}")
    for name in requests.to:
        if name not in known:
            raise unknown_site(name, tuple(known))
    if len(set(requests.to)) < len(requests.to):
        raise BadInput(f"a site is named twice in requests {requests.id}; ask each site once")
    for body in requests.bodies.values():
        check_message(body)
    starts = range(0, len(requests), together)
    return [requests.part(slice(start, start + together)) for start in starts]
