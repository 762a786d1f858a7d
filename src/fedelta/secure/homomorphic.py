"""Homomorphic encryption as a collect: sites encrypt, the coordinator adds ciphertexts, a key party opens the sum.

One request and one answer a site, as in the clear: there are no masks, so nothing has to be mended when a site drops
out, and the sum is over those whose answers came. In exchange there is a third party that has to be trusted
(key_party.py). Encryption and its parameters are those of ckks.py, real numbers become whole ones in digits.py.

An element of the mean of n float32 vectors, W the sum of their weights and r = `resolution`, is off by at most
n r / (2 W), and by one rounding to float32; noise and encryption add nothing to that (ckks.py), so that a run has the
same result each time. float64 vectors keep 80 bits of the rule's bounds, sums of numbers are exact to 2^-61 a site.

Limits: it protects from a coordinator that keeps to the protocol, and from whoever comes to see what reaches it, as
long as all sites keep to it, too. A coordinator that does not can have the ciphertext of a single site opened; secure
aggregation with identities withstands that. One site that adds something to its ciphertext that is no update can read
the secret key off the models that follow: at once, if the key party did not refuse sums that are not near whole
numbers, and over many rounds in spite of that (key_party.py). With the key it can read each update of which it gets
the ciphertext: from a line that is not encrypted, or from the coordinator. A well-formed ciphertext that is none of
this key loses its round for all: nobody can tell whose it was. Whoever lies in what it encrypts can move the mean, as
anywhere.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedelta.core.errors import BadInput, BadTensors, RoundLost, TooFewSites
from fedelta.core.exchange import exchange
from fedelta.core.extras import require
from fedelta.core.grid import Terms
from fedelta.core.messages import MOST, PUBLIC, PartyId, Replies, Reply, Request, Requests, Tensors
from fedelta.core.program import Fleet, Sight, Site
from fedelta.secure import ckks
from fedelta.secure.ckks import Precision, PublicKey, Total
from fedelta.secure.digits import Digits
from fedelta.secure.key_party import KeyParty, Opener, Statement
from fedelta.secure.ring import Form

_GIVEN = "given"  # in place of an update: the last round on which this site has worked
FORM, CIPHERTEXTS = "form", "ciphertexts"
_OWN = "_own"
_NONE = torch.empty(0)


@dataclass(frozen=True, kw_only=True)
class HomomorphicEncryption:
    """How updates are encrypted, and who opens their sum.

    `public` is the public key of the key party (or the file of it, see new_keys), part of the experiment that each site
    has read: one that came from the coordinator could be the coordinator's own. `opener` is the key party as the
    coordinator reaches it; sites need none. With neither, this is a simulation: the coordinator's process has a key
    party of its own, and new keys with each object: dataclasses.replace makes other ones, copy and deepcopy give the
    object itself. `most` sites at most are added up, and `least` at least; the fewer `most`, the finer. `bound` and
    `weight_bound` are the bounds for float32 vectors, where the rule has no tighter ones.
    """

    shows: ClassVar[Sight] = Sight.SUM
    whole: ClassVar[bool] = False
    registered: ClassVar[None] = None
    least: int = 3
    most: int = 128
    bound: float = 4.0  # on every |value| of a difference
    weight_bound: float = 2.0**10  # on a site's weight: how many examples it has, mostly
    public: bytes | Path | str | None = field(default=None, repr=False)
    opener: Opener | None = field(default=None, repr=False, metadata={"digest": False})

    def __post_init__(self) -> None:
        if not 3 <= self.least <= self.most:
            raise BadInput(
                f"HomomorphicEncryption.least must be from 3 (a sum of two tells both) to most={self.most}, got "
                f"{self.least}"
            )
        try:
            _ = self._narrow, self.precision
        except BadInput as error:
            raise BadInput(f"HomomorphicEncryption: {error}") from None
        if self.public is None:
            if self.opener is not None:
                raise BadInput("HomomorphicEncryption.opener needs the public key that goes with it; give public")
            if find_spec(ckks.LIBRARY) is not None:  # before workers start, which have to have it
                _ = self._simulated
        elif not isinstance(self.public, bytes):
            try:
                object.__setattr__(self, "public", Path(self.public).read_bytes())
            except OSError as error:
                raise BadInput(f"the public key {self.public} cannot be read: {error.strerror}") from None

    @property
    def precision(self) -> Precision:
        return Precision(most=self.most)

    def resolution(self, terms: Terms = Terms()) -> float:
        """What weight × value of a float32 vector is rounded to a multiple of; `terms` are those of the rule."""
        return self.digits(terms).resolution

    def error(self, sites: int, weight: float, terms: Terms = Terms()) -> float:
        """By how much an element of the mean of `sites` float32 vectors, of summed `weight`, is off at most."""
        return sites * self.resolution(terms) / (2 * weight)

    def honest(self, cohort: int) -> int:
        """Those of the smallest sum that is opened: sites that collude with the coordinator are not allowed for."""
        return self.least

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the public key, in hexadecimal, for people to compare."""
        return hashlib.sha256(self._key_bytes).hexdigest()

    def digits(self, terms: Terms) -> Digits:
        """How updates become whole numbers."""
        own = self._narrow
        narrow = Terms(bound=min(own.bound, terms.bound), weight_bound=min(own.weight_bound, terms.weight_bound))
        return Digits(bits=self.precision.bits, narrow=narrow, wide=terms)

    def gather(self, fleet: Fleet, requests: Requests, together: int, terms: Terms) -> Iterator[Reply | Replies]:
        """One Replies with the mean of those that it names; the others are among its errors.

        Raises TooFewSites if nothing came of too many, RoundLost if no sum can be had any more.
        """
        if self._opener is None:
            raise BadInput("HomomorphicEncryption has a public key and no opener; give the key party as the opener")
        _ = self._key  # if it cannot be used, no site need be asked
        if len(requests) > self.most:
            raise BadInput(f"{len(requests)} sites were asked, and {self} adds up {self.most}; raise most")
        if len(requests) < self.least:
            raise TooFewSites(
                f"{len(requests)} sites were asked, and a sum of fewer than {self.least} tells too much; ask more"
            )
        yield _Round(self, self._opener, requests, terms).mean(fleet)

    def handle(self, request: Request, site: Site, outgoing: Callable[[], Tensors], terms: Terms) -> Reply:
        """The update, encrypted, once for a round: two sums of which one has some site in it would tell its update."""
        last = site.given.get(request.op, -1)
        if request.round <= last:
            return Reply.to_request(request, {_GIVEN: torch.tensor(last)})
        if terms.whole is not None or terms.asked is not None:
            raise BadInput(f"{self} makes no sum of whole numbers; use SecureAggregation()")
        site.given[request.op] = request.round  # before anything is computed: whether it fails is an answer, too
        update = outgoing()
        form = Form.of(update)
        rows = self._key.encrypted(self.digits(terms).whole(update, form))
        public = {PUBLIC + name: update[f"sum/{name}"] for name in sorted(terms.public)}
        return Reply.to_request(request, {CIPHERTEXTS: torch.from_numpy(rows), FORM: form.to_tensor(), **public})

    def answer(self, request: Request, site: Site) -> Reply:
        raise BadInput(f"this program knows no {request.op!r} request")

    @cached_property
    def _narrow(self) -> Terms:
        return Terms(bound=self.bound, weight_bound=self.weight_bound)

    @property
    def _simulated(self) -> KeyParty:
        """The key party of a simulation, made when it is first asked for."""
        if _OWN not in self.__dict__:
            require(ckks.EXTRA, ckks.LIBRARY)
            object.__setattr__(self, _OWN, KeyParty(most=self.most, least=self.least, once=False))
        own: KeyParty = self.__dict__[_OWN]
        return own

    @property
    def _opener(self) -> Opener | None:
        return self._simulated if self.public is None else self.opener

    @property
    def _key_bytes(self) -> bytes:
        if self.public is None:
            return self._simulated.public
        assert isinstance(self.public, bytes)
        return self.public

    @cached_property
    def _key(self) -> PublicKey:
        require(ckks.EXTRA, ckks.LIBRARY)
        key = PublicKey.read(self._key_bytes)
        if key.precision != self.precision:
            raise BadInput(
                f"the public key is for sums over at most {key.precision.most} sites, and {self} is not; give most="
                f"{key.precision.most}"
            )
        return key

    def __copy__(self) -> "HomomorphicEncryption":
        return self  # it does not change, and of a key party there are no copies

    def __deepcopy__(self, memo: dict[int, Any]) -> "HomomorphicEncryption":
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the key party: what travels to other processes has the public key alone."""
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**state, "public": self._key_bytes, "opener": None}


class _Round:
    """One sum, at the coordinator."""

    def __init__(self, collect: HomomorphicEncryption, opener: Opener, requests: Requests, terms: Terms) -> None:
        self.collect, self.opener, self.requests, self.terms = collect, opener, requests, terms
        self.digits = collect.digits(terms)
        self.absent: dict[PartyId, str] = {}
        self.public: dict[PartyId, Tensors] = {}
        self.forms: dict[str, Form] = {}
        self.totals: dict[str, Total] = {}  # by form: one, as a rule
        self.senders: dict[str, list[PartyId]] = {}
        self.final = False  # whether the round may not be asked for again

    def mean(self, fleet: Fleet) -> Replies:
        for reply in exchange(fleet, self.requests):
            assert isinstance(reply, Reply)
            if reply.error is not None:
                self.absent[reply.sender] = reply.error
                continue
            self.final = True
            try:
                self._take(reply)
            except BadTensors as error:
                self.absent[reply.sender] = f"its encrypted update is malformed: {error}"
            del reply  # or it would stay in memory while the next one arrives
        text = max(self.totals, key=lambda text: len(self.senders[text]), default="")
        senders = self.senders.get(text, [])
        gone = [party for party in self.requests.to if party not in set(senders)]
        errors = {party: self.absent.get(party, "its encrypted update is of another form than most") for party in gone}
        if len(senders) < self.collect.least:
            raise (RoundLost if self.final else TooFewSites)(
                f"{len(senders)} of {len(self.requests)} sites sent updates that can be added up, and a sum of fewer "
                f"than {self.collect.least} is not opened",
                errors,
            )
        body = self._opened(text, senders, errors)
        for name in self.terms.public:
            body[PUBLIC + name] = torch.stack([self.public[party][PUBLIC + name] for party in senders])
        requests = self.requests
        return Replies(senders=senders, answers=requests.id, round=requests.round, body=body, errors=errors)

    def _take(self, reply: Reply) -> None:
        """Add what a site has sent. Raises BadTensors if it is malformed."""
        if _GIVEN in reply.body:
            self.absent[reply.sender] = "it has worked on this round already, and does so once"
            return
        public = {PUBLIC + name: reply.body.get(PUBLIC + name, _NONE) for name in self.terms.public}
        if not all(map(_counts, public.values())):
            raise BadTensors(f"of the numbers {sorted(self.terms.public)} one is none, or not a whole one from 1 on")
        if reply.body.keys() != {CIPHERTEXTS, FORM, *public}:
            raise BadTensors("it does not consist of ciphertexts and what they are of")
        form = Form.from_tensors(reply.body, FORM)
        rows, expected = reply.body[CIPHERTEXTS], ckks.ciphertexts(self.digits.length(form))
        if rows.dtype != torch.uint8 or rows.shape != (expected, ckks.WIDTH):
            raise BadTensors(
                f"its ciphertexts are {rows.dtype} of shape {list(rows.shape)}, not uint8 of {[expected, ckks.WIDTH]}"
            )
        total = self.totals.get(form.text) or Total()
        total.add(rows.detach().cpu().numpy())
        self.forms[form.text], self.totals[form.text] = form, total
        self.senders.setdefault(form.text, []).append(reply.sender)
        self.public[reply.sender] = public

    def _opened(self, text: str, senders: list[PartyId], errors: dict[PartyId, str]) -> dict[str, Tensor]:
        """The encoded mean. Raises RoundLost if there is none."""
        requests, form = self.requests, self.forms[text]
        statement = Statement(
            job=requests.job, round=requests.round, op=requests.op, attempt=requests.attempt, sites=len(senders)
        )
        rows = torch.from_numpy(self.totals[text].rows())
        try:
            found = self.opener.opened(statement, rows)
            if found.dtype != torch.int64 or found.shape != (len(rows), ckks.PER):
                raise BadTensors(f"the key party gave {found.dtype} of shape {list(found.shape)}")
            sums = found.numpy().reshape(-1)
            largest = len(senders) * 2**self.collect.precision.bits
            if np.any(np.abs(sums) > largest):
                raise BadTensors(
                    "a number in it is beyond what such sites can add up to; the keys may not belong together"
                )
            return self.digits.mean(sums, form)
        except BadInput as error:
            raise RoundLost(f"the sum of {len(senders)} sites cannot be used: {error}", errors) from None


def _counts(number: Tensor) -> bool:
    """Whether it is a number of rows."""
    if number.ndim or number.dtype != torch.float64:
        return False
    return 1 <= number.item() <= MOST and number.item() == int(number.item())
