"""How a site answers a request, in whatever process it lives; every fleet uses this.

An absent party is data: an error that a user can mend, a file that is not there and a lack of memory become a reply
that says so. A bug is an exception: it passes through.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.messages import Meta, PartyId, Reply, Request, Tensors
from fedelta.core.program import Program, Site, SiteData
from fedelta.fleet.blocks import check_dense

_NO_CPU_MEMORY = "DefaultCPUAllocator: "  # PyTorch has no class for it; its message does not change with the language


def answer(program: Program[Any], request: Request, site: Site) -> Reply:
    """The reply of `site` to `request`; a FedeltaError, OSError or lack of memory in `handle` becomes a failure.

    Raises RuntimeError if `handle` answered another request, or with what cannot be sent, or wrote into the tensors
    that it was given: they belong to the whole cohort. Writes that PyTorch does not count (through `.data` or
    `.numpy()`) are not seen.
    """
    before = _versions(request)
    try:
        reply = program.handle(request, site)
    except FedeltaError as error:
        reply = Reply.failure(request, str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        reply = Reply.failure(request, f"out of memory ({error})" if str(error) else "out of memory")
    except OSError as error:
        reply = Reply.failure(request, f"{type(error).__name__}: {error}")
    except RuntimeError as error:
        if _NO_CPU_MEMORY not in str(error):
            raise
        reply = Reply.failure(request, f"out of memory ({str(error).partition(_NO_CPU_MEMORY)[2].splitlines()[0]})")
    if _versions(request) != before:
        raise RuntimeError(f"the program wrote into the tensors of request {request.id}; clone them before writing")
    if reply.answers != request.id:
        raise RuntimeError(f"the program answered request {request.id} with a reply to {reply.answers}")
    try:
        check_message(reply.body, reply.meta)
    except BadInput as error:
        raise RuntimeError(f"the reply to request {request.id} cannot be sent: {error}") from error
    return reply


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


def _versions(request: Request) -> list[int]:
    """PyTorch's count of the writes into each tensor of a request; inference tensors have none and are left out."""
    tensors = (*request.shared.values(), *request.body.values())
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


class Sites:
    """The sites of one process, each made on its first request and kept.

    `load(name)` is the experiment's `site` function. Its result is kept once it has succeeded; a failure is raised anew
    at every attempt to read the data.
    """

    def __init__(self, load: Callable[[str], object]) -> None:
        self._load = load
        self._sites: dict[PartyId, Site] = {}
        self._attempts: dict[PartyId, tuple[str, int, int]] = {}

    def of(self, request: Request) -> Site:
        """The site that `request` is for; its scratch is emptied when a new attempt begins."""
        name = request.to
        if name not in self._sites:
            self._sites[name] = Site(id=name, data=_once(self._load, name))
        attempt = (request.job, request.round, request.attempt)
        if self._attempts.get(name) != attempt:
            self._sites[name].scratch.clear()
            self._attempts[name] = attempt
        return self._sites[name]


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


def unknown_site(name: PartyId, names: Sequence[PartyId]) -> BadInput:
    """The error for a request to a site that the fleet does not have."""
    known = ", ".join(repr(known) for known in names[:5]) + (", …" if len(names) > 5 else "")
    return BadInput(f"there is no site {name!r} among the {len(names)} of this fleet ({known}); add it to sites()")


def twice(request_id: str) -> BadInput:
    """The error for a request whose id is still outstanding."""
    return BadInput(f"request {request_id} is already outstanding; give a second try another `attempt`")
