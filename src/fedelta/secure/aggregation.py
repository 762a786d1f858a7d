"""Secure aggregation as a collect: the coordinator learns the mean of those who answered, and nothing else of any site.

The protocol is that of protocol_site.py; here are its messages as requests and replies, and real numbers as integers.
Before the request of a round come `keys`, `shares` and `masked` (who is there, and the shares for this site); its
answer is the masked update; after it come `survivors` and `reveal`. With n sites there are 6 messages each way.

Integers: weight × value is rounded to the grid of core/grid.py. In 64 bits that is the grid of the exact mean, so that
the mean has the very bits of one in the clear. In 32 bits half the bytes leave a site, and with n sites, W the sum of
their weights and r = resolution(n), an element of the mean is off by at most n r / (2 W), and by one rounding to
float32. float64 values (the statistics of a closed-form start) take two 64-bit integers each, numbers three.

Limits: what a site puts into a sum, nobody can check but the site itself: whoever lies can move the mean by as much as
`bound` × `weight_bound` / W, or make it useless. A site that fails says why, which is a word about itself. What has
left a site is remembered as long as its process lives.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from torch import Tensor

from fedelta.core import keys
from fedelta.core.codec import short
from fedelta.core.content import Contents
from fedelta.core.errors import BadInput, BadTensors, RoundLost, TooFewSites
from fedelta.core.exchange import exchange
from fedelta.core.grid import Terms
from fedelta.core.messages import MOST, PUBLIC, PartyId, Replies, Reply, Request, Requests, Tensors
from fedelta.core.program import Fleet, Sight, Site
from fedelta.secure.graph import COMPLETE, Shape, count, quorum, shape
from fedelta.secure.protocol_coordinator import STEPS, Asked, CoordinatorSum
from fedelta.secure.protocol_site import SiteSum
from fedelta.secure.ring import Form, Ring

_GIVEN = "given"  # in place of keys: the last round on which this site has worked
_FORM = "form"  # beside a masked update: of what
_NONE = torch.empty(0)


@dataclass(frozen=True, kw_only=True)
class SecureAggregation:
    """How updates are summed, and what the sites insist on.

    `least` is the fewest sites whose sum may be shown; in any case more than two thirds of those that are asked must be
    in it. `bits` are those of the integers in which updates are added; `bound` and `weight_bound` are the bounds for
    32 bits (64 take those of the rule). Of the sites that are asked, the share `colluding` may work together with the
    coordinator, and the share `dropouts` may be lost at any step. `identities` has the Ed25519 public key of each site,
    as hex (see the function of that name): without it the guarantee is against a coordinator that keeps to the
    protocol, and with it against any.
    """

    shows: ClassVar[Sight] = Sight.SUM
    whole: ClassVar[bool] = True
    least: int = 3  # of two, each knows the other's update once it knows the sum
    bits: Literal[32, 64] = 64
    bound: float = 4.0  # on every |value| of a difference
    weight_bound: float = 2.0**10  # on a site's weight: how many examples it has, mostly
    colluding: float = 0.1
    dropouts: float = 0.2
    identities: Mapping[PartyId, str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.least < 3:
            raise BadInput(f"SecureAggregation.least must be at least 3, got {self.least}: a sum of two tells both")
        if self.bits not in (32, 64):
            raise BadInput(f"SecureAggregation.bits must be 32 or 64, got {self.bits}")
        try:
            _ = self._ring, self._registry
        except BadInput as error:
            raise BadInput(f"SecureAggregation: {error}") from None
        for name in ("colluding", "dropouts"):
            if not 0 <= getattr(self, name) < 1 / 3:
                raise BadInput(f"SecureAggregation.{name} must be from 0 to less than 1/3, got {getattr(self, name)}")

    def resolution(self, cohort: int, terms: Terms = Terms()) -> float:
        """What weight × value of a float32 vector is a multiple of; `terms` are those of the rule."""
        return self._ring.resolution(terms, cohort)

    @property
    def registered(self) -> int | None:
        return None if self.identities is None else len(self.identities)

    def honest(self, cohort: int) -> int:
        """Those of a quorum, or, with identities and neighbours that are drawn, of the smallest group (graph.py)."""
        known = max(1, colluding := count("colluding", self.colluding, cohort))
        complete = cohort <= COMPLETE or self._shape(cohort, cohort).neighbours == cohort - 1
        if self.identities is None or complete:
            return min(cohort, max(quorum(cohort), self.least)) - known
        return cohort // 3 + 1 - (known - colluding)

    def gather(self, fleet: Fleet, requests: Requests, together: int, terms: Terms) -> Iterator[Reply | Replies]:
        """One Replies with the mean of those that it names; the others are among its errors.

        Raises TooFewSites if too few take part from the start, RoundLost if no sum can be had any more, or if there was
        one for this round before.
        """
        if len(requests) < self.least:
            raise TooFewSites(
                f"{len(requests)} sites were asked, and a sum of fewer than {self.least} tells too much; ask more"
            )
        yield _Round(self, fleet, requests, terms).mean()

    def handle(self, request: Request, site: Site, outgoing: Callable[[], Tensors], terms: Terms) -> Reply:
        session = _session(site, request, request.op)
        _check_body(request)
        if terms.asked not in (None, session.cohort):
            raise BadInput(f"its noise is for a sum over {terms.asked} sites, and {session.cohort} were asked")
        if session.asked:
            raise BadInput(f"{site.id} has been asked for its update of this round, and works on it once")
        session.asked = True
        # before anything is computed: whether it fails is an answer, too
        site.given[request.op] = max(request.round, site.given.get(request.op, -1))
        update = outgoing()
        form = Form.of(update)
        integers = self._ring.integers(update, form, terms, session.cohort)
        masked = session.own.masked(session.told, integers, self._contents.of(request.shared))
        public = {PUBLIC + name: update[f"sum/{name}"] for name in sorted(terms.public)}
        return Reply.to_request(request, {**masked, _FORM: form.to_tensor(), **public})

    def answer(self, request: Request, site: Site) -> Reply:
        op, _, step = request.op.rpartition("/")
        if not op or step not in STEPS:
            raise BadInput(f"this program knows no {request.op!r} request")
        if step == "keys":
            return Reply.to_request(request, self._begun(request, op, site))
        session = _session(site, request, op)
        told = {**request.shared, **request.body}
        if step == "masked":  # what it says is used when the update is there
            session.told = told
            return Reply.to_request(request, {})
        steps: Mapping[str, Callable[[Tensors], Tensors]] = {
            "shares": session.own.shares,
            "survivors": session.own.survivors,
            "reveal": session.own.reveal,
        }
        return Reply.to_request(request, steps[step](told))

    def _begun(self, request: Request, op: str, site: Site) -> Tensors:
        """This site's keys, unless it has worked on this round already.

        Two sums of which only one has some site in it would tell that site's update.
        """
        last = site.given.get(op, -1)
        if request.round <= last:
            return {_GIVEN: torch.tensor(last)}
        told = request.shared.get("cohort", _NONE)
        cohort = int(told) if told.dtype == torch.int64 and not told.ndim else 0
        if cohort < self.least:
            raise BadInput(f"a sum of {cohort} sites says too much of each; {self.least} must be asked")
        own = site.data().identity
        if own is None and self.identities is not None:
            raise BadInput(f"{site.id} has no identity key, and all sites know each other by theirs; see new_key")
        session = _Session(
            context=_context(request, op),
            cohort=cohort,
            own=SiteSum(
                name=site.id,
                context=_context(request, op),
                cohort=cohort,
                shape=lambda listed: self._shape(cohort, listed),
                identity=Ed25519PrivateKey.generate() if own is None else keys.private_key(own),
                registry=self._registry,
                least=self.least,
            ),
        )
        site.scratch[_key(op)] = session
        return session.own.keys()

    @cached_property
    def _ring(self) -> Ring:
        narrow = Terms(bound=self.bound, weight_bound=self.weight_bound)
        return Ring(bits=self.bits, own=narrow if self.bits == 32 else None)

    @cached_property
    def _registry(self) -> Mapping[PartyId, Ed25519PublicKey] | None:
        if self.identities is None:
            return None
        return {name: _public(name, text) for name, text in self.identities.items()}

    @cached_property
    def _contents(self) -> Contents:
        return Contents()

    def _shape(self, cohort: int, listed: int) -> Shape:
        return shape(cohort, self.colluding, self.dropouts, listed=listed)


@dataclass(kw_only=True)
class _Session:
    """A site's part in one sum, in its scratch."""

    own: SiteSum
    context: bytes
    cohort: int
    asked: bool = False
    told: Tensors = field(default_factory=dict)  # what `masked` needs


def _session(site: Site, request: Request, op: str) -> _Session:
    session = site.scratch.get(_key(op))
    if not isinstance(session, _Session) or session.context != _context(request, op):
        raise BadInput(
            f"{site.id} knows of no secure sum {op!r}: it has been restarted since, or was not asked for keys"
        )
    return session


def _check_body(request: Request) -> None:
    """What all get is signed for; what one site gets in its place may be a smaller part of it, and nothing else."""
    for name, tensor in request.body.items():
        if name in request.shared and tensor.shape == request.shared[name].shape:
            raise BadInput(f"{request.to} was sent {name!r} apart from all others, and takes no part in their sum")


def _counts(number: Tensor) -> bool:
    """Whether it is a number of rows."""
    if number.ndim or number.dtype != torch.float64:
        return False
    return 1 <= number.item() <= MOST and number.item() == int(number.item())


def _key(op: str) -> str:
    return f"secure/{op}"


def _context(requests: Request | Requests, op: str) -> bytes:
    """What no other sum has."""
    return json.dumps([requests.job, requests.round, op, requests.attempt]).encode()


def _public(name: PartyId, text: str) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except ValueError:
        raise BadInput(f"the identity of {name!r} is no Ed25519 public key of 64 hex digits: {short(text)}") from None


def identities(folder: Path | str) -> dict[PartyId, str]:
    """The public keys in a folder of PEM files SITE.pub, for `SecureAggregation.identities`.

    Raises BadInput if there are none, or if one cannot be read.
    """
    files = sorted(Path(folder).glob("*.pub"))
    if not files:
        raise BadInput(f"{folder} has no public key SITE.pub of any site; make them with new_key")
    return {file.stem: keys.public_key(file).public_bytes_raw().hex() for file in files}


class _Round:
    """One sum, at the coordinator."""

    def __init__(self, collect: SecureAggregation, fleet: Fleet, requests: Requests, terms: Terms) -> None:
        self.collect, self.fleet, self.requests, self.terms = collect, fleet, requests, terms
        self.cohort = len(requests)
        self.absent: dict[PartyId, str] = {}
        self.public: dict[PartyId, Tensors] = {}
        self.forms: dict[str, Form] = {}
        self.final = False  # whether the round may not be asked for again
        self.sum = CoordinatorSum(
            context=_context(requests, requests.op),
            cohort=self.cohort,
            shape=lambda listed: collect._shape(self.cohort, listed),
            names=requests.to,
            registry=collect._registry,
            least=collect.least,
            asked=collect._contents.of(requests.shared),
        )

    def mean(self) -> Replies:
        try:
            self._keys()
            self._step(self.sum.ask())
            self._masked(self.sum.ask())
            self._step(self.sum.ask())
            self._step(self.sum.ask())
            sums, survivors = self.sum.total()
        except TooFewSites as error:
            raise (RoundLost if self.final else TooFewSites)(str(error), self.absent) from None
        requests, form = self.requests, self.forms[self.sum.label]
        gone = [party for party in requests.to if party not in set(survivors)]
        errors = {party: self.absent.get(party, "its masked update is of another form than most") for party in gone}
        try:
            body = self.collect._ring.mean(sums, form, self.terms, self.cohort)
        except BadTensors as error:
            raise RoundLost(f"the sum of {len(survivors)} sites cannot be used: {error}", errors) from None
        for name in self.terms.public:
            body[PUBLIC + name] = torch.stack([self.public[party][PUBLIC + name] for party in survivors])
        return Replies(senders=survivors, answers=requests.id, round=requests.round, body=body, errors=errors)

    def _keys(self) -> None:
        asked = self.sum.ask()
        for reply in self._replies(replace(asked, shared={"cohort": torch.tensor(self.cohort)})):
            if _GIVEN in reply.body:
                self.absent[reply.sender] = "it has worked on this round already, and does so once"
                self.final = True
            else:
                self._take(reply.sender, reply.body)

    def _masked(self, asked: Asked) -> None:
        """What each site has to know, then the request itself, and the masked updates as they come."""
        there = {reply.sender for reply in self._replies(asked)}
        requests = self.requests
        to = [party for party in requests.to if party in there]
        bodies = {party: body for party, body in requests.bodies.items() if party in there}
        for reply in exchange(self.fleet, replace(requests, to=to, bodies=bodies)):
            assert isinstance(reply, Reply)
            if reply.error is not None:
                self.absent[reply.sender] = reply.error
                continue
            self.final = True
            try:
                integers, form = self._checked(reply)
            except BadTensors as error:
                self.absent[reply.sender] = f"its masked update is malformed: {error}"
                continue
            self.forms[form.text] = form
            self._take(reply.sender, integers, form.text)

    def _checked(self, reply: Reply) -> tuple[Tensors, Form]:
        """The integers of a masked update, and what they are of."""
        form = Form.from_tensors(reply.body, _FORM)
        public = {PUBLIC + name: reply.body.get(PUBLIC + name, _NONE) for name in self.terms.public}
        if not all(map(_counts, public.values())):
            raise BadTensors(f"of the numbers {sorted(self.terms.public)} one is none, or not a whole one from 1 on")
        self.public[reply.sender] = public
        return {name: tensor for name, tensor in reply.body.items() if name != _FORM and name not in public}, form

    def _step(self, asked: Asked) -> None:
        for reply in self._replies(asked):
            self._take(reply.sender, reply.body)

    def _replies(self, asked: Asked) -> Iterator[Reply]:
        requests = self.requests
        own = Requests(
            to=list(asked.bodies),
            op=f"{requests.op}/{asked.step}",
            round=requests.round,
            job=requests.job,
            attempt=requests.attempt,
            shared=asked.shared,
            bodies={party: body for party, body in asked.bodies.items() if body},
        )
        for reply in exchange(self.fleet, own):
            assert isinstance(reply, Reply)
            if reply.error is None:
                yield reply
            else:
                self.absent.setdefault(reply.sender, reply.error)

    def _take(self, sender: PartyId, body: Tensors, label: str = "") -> None:
        try:
            self.sum.take(sender, body, label)
        except BadTensors as error:
            self.absent.setdefault(sender, str(error))
