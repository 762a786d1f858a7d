"""Who is let in: what a stream begins with, held against certificates, register, experiment and versions."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from ssl import PEM_cert_to_DER_cert
from typing import Any

from fedelta.core.digest import digest
from fedelta.core.errors import BadTensors, FedeltaError, NotNow, Refused
from fedelta.core.messages import PartyId
from fedelta.core.program import Program
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet.answer import frozen
from fedelta.fleet.known_sites import Register
from fedelta.fleet.limits import Limits
from fedelta.fleet.session import Place
from fedelta.fleet.wire import PROTOCOL, clean, frame, grpc, parse, sendable, versions

log = logging.getLogger(__name__)
_HURRY_S = 5.0  # for the greeting of who is not registered, or has opened too many streams; and for a last word
Allowed = Callable[[PartyId, bytes], str | None]


class Admission:
    """For one coordinator; all of it in its event loop. `closed`: nobody is let in any more."""

    def __init__(
        self,
        program: Program[Any],
        places: Mapping[PartyId, Place],
        *,
        tls: bool,
        allowed: Allowed,
        limits: Limits,
        register: Register,
    ) -> None:
        self._experiment, self._model = digest(program), frozen(program)
        self._places, self._tls = places, tls
        self._allowed, self._limits, self._register = allowed, limits, register
        self.closed = False

    async def ask(self, context: Any) -> tuple[Place, Any, bytes] | None:
        """The place of a site, its Hello, and its certificate (DER, empty without TLS); None once it was refused."""
        name, certificate = _peer(context)
        hello = None
        try:
            hello = await self._greeting(context, name, certificate)
            return self._welcomed(hello, name, certificate), hello, certificate
        except (Refused, BadTensors, TimeoutError) as error:
            reason = str(error) or "it sent no greeting"
            who = clean(name or (hello.name if isinstance(hello, frames.Hello) else "") or context.peer())
            log.warning("%s is not let in: %s", who, reason, extra={"event": "refused", "site": who})
            self._register.tell("refused", who, reason)
            await _last_word(context, frames.Refused(reason=sendable(reason), final=is_final(error)))
            return None

    def why_not(self, name: PartyId, certificate: bytes) -> Refused | None:
        """What `allowed` says; where it cannot say anything nobody is let in."""
        try:
            why = self._allowed(name, certificate)
        except NotNow as error:
            return error
        except Exception as error:  # of the operator's own code
            if not isinstance(error, FedeltaError | OSError):
                log.exception("whether %s may join could not be looked up", name)
            return NotNow(f"whether {name} may join could not be looked up: {error}")
        return None if why is None else Refused(why)

    async def _greeting(self, context: Any, name: str | None, certificate: bytes) -> Any:
        """The first frame, None where none comes. Raises BadTensors or TimeoutError."""
        known = None if name is None else self._places.get(name)
        if known is not None and self.why_not(known.name, certificate) is not None:
            known = None  # or whoever has a revoked certificate would open all streams of its name
        wait_s = 0.0 if known is None else known.streams.take(1, time.monotonic())
        strange = wait_s > 0 or (known is None and self._tls)
        async with asyncio.timeout(min(_HURRY_S, self._limits.stall_s) if strange else self._limits.stall_s):
            raw = await context.read()
        hello = None if raw is grpc.aio.EOF else parse(raw)
        if self.closed:
            raise BadTensors("this coordinator is about to end")
        if wait_s > 0:
            raise BadTensors(f"it opens too many streams; come back in {math.ceil(wait_s)} s")
        return hello

    def _welcomed(self, hello: Any, name: str | None, certificate: bytes) -> Place:
        """The place of a site that may join. Raises Refused with the reason why it may not."""
        if not isinstance(hello, frames.Hello):
            raise Refused("a stream begins with a Hello")
        if hello.protocol != PROTOCOL:
            raise Refused(f"this coordinator speaks version {PROTOCOL} of the protocol, and the site {hello.protocol}")
        said = clean(hello.name)
        if self._tls and name != hello.name:
            raise Refused(f"the site calls itself {said!r}, and its certificate is of {clean(name or 'nobody')!r}")
        place = self._places.get(hello.name)
        if place is None:
            raise Refused(f"{said!r} is not a registered site; the coordinator's operator has to add it")
        if place.faults >= self._limits.faults:
            raise Refused(f"{said!r} broke the protocol {place.faults} times in a row: shut out; ask the operator")
        barred = self._register.barred(place.name)
        if barred is not None:
            raise Refused(barred)
        not_allowed = self.why_not(hello.name, certificate)
        if not_allowed is not None:
            raise not_allowed
        if hello.experiment != self._experiment:
            raise Refused(
                f"{said} has another experiment than this coordinator, {self._experiment[:12]}…; install the same "
                "experiment file at both"
            )
        if hello.model != self._model:
            raise Refused(
                f"the weights that do not travel are {clean(hello.model)[:12] or 'none'}… at {said}, and at the "
                f"coordinator {self._model[:12] or 'none'}…; install the same pre-trained model at both"
            )
        for library, here in versions().items():
            there = clean(hello.versions.get(library, here))  # whoever names none answers for its own bits
            if there != here:
                raise Refused(f"{said} has {library} {there} and the coordinator {here}; install the same version")
        return place


def is_final(error: Exception) -> bool:
    """Whether a site that was refused for this need not come back."""
    return isinstance(error, Refused) and not isinstance(error, NotNow)


async def _last_word(context: Any, said: Any) -> None:
    """To whoever is not let in; one that does not take it must not keep its stream."""
    try:
        async with asyncio.timeout(_HURRY_S):
            await context.write(frame(said))
    except TimeoutError:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, said.reason)


def _peer(context: Any) -> tuple[str | None, bytes]:
    """The common name and the certificate (DER) that the other side has proved to have; none without TLS."""
    said = context.auth_context()
    names, certificates = list(said.get("x509_common_name", ())), list(said.get("x509_pem_cert", ()))
    if len(names) != 1 or len(certificates) != 1:
        return None, b""
    return names[0].decode("utf-8", "replace"), PEM_cert_to_DER_cert(certificates[0].decode())
