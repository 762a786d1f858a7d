"""The coordinator's half of a secure sum. What the steps are for: protocol_site.py.

It adds masked inputs as they come, in any order, into one accumulator for each vector, and takes the masks off at the
end: b of every survivor, and the pairwise masks of every site that shared its secrets and then dropped out. Each secret
is put together from t shares and checked, against the site's commitment or its public key, before it is used; what
comes out is the survivors' sum modulo 2^32 or 2^64, or TooFewSites.

A site drops out where it does not answer, or not as it should; one that is silent after its masked input came is still
in the sum. Limits: a site can put any number into a sum, as its input is hidden, and can make one fail by shares for
others that do not open; of a secret's shares one that is false is found and left out, if there are t others, and more
make the sum fail.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fedelta.core.codec import short
from fedelta.core.errors import BadInput, BadTensors, FedeltaError, TooFewSites
from fedelta.core.messages import Tensors
from fedelta.secure.agreement import (
    Premises,
    Registry,
    ShapeRule,
    agree,
    alive_text,
    check_keys,
    commitment,
    list_digest,
    mask_key,
    signed,
    survivors_text,
)
from fedelta.secure.graph import Shape
from fedelta.secure.masks import add_mask
from fedelta.secure.messages import (
    KEY_BYTES,
    SEALED_BYTES,
    SIGNATURE,
    SIGNATURE_BYTES,
    Listed,
    PublicKeys,
    arrays_of,
    bytes_of,
    expect,
    flags,
    form_of,
    indices,
    indices_of,
    octets,
    rows,
)
from fedelta.secure.shamir import SHARE_BYTES, Interpolation

STEPS = ("keys", "shares", "masked", "survivors", "reveal")
_OVER = "over"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to send for one step: to each name in `bodies` its body, and `shared` to all of them."""

    step: str  # one of STEPS: the method of SiteSum that answers
    shared: Tensors
    bodies: dict[str, Tensors]


@dataclass(frozen=True, kw_only=True)
class _Dealt:
    """What a site sent in step 2."""

    sealed: dict[int, bytes]  # outgoing neighbour -> its encrypted shares
    commitment: bytes


@dataclass
class _Part:
    """Masked vectors of one form."""

    sums: dict[str, NDArray[Any]] = field(default_factory=dict)
    members: set[int] = field(default_factory=set)


class _Graph:
    """Who shared secrets with whom, by indices."""

    def __init__(self, listed: Listed, shape: Shape, digest: bytes) -> None:
        self.listed, self.shape, self.digest = listed, shape, digest
        self.index = {name: index for index, name in enumerate(listed.names)}
        self.dealt: dict[int, _Dealt] = {}
        self.alive: frozenset[int] = frozenset()  # U2
        self.incoming: dict[int, list[int]] = {}  # ascending; of those alive

    def settle(self) -> None:
        """U2: without those that share with fewer than t of it, whose masks could not be taken off."""
        alive = frozenset(self.dealt)
        while cut := {i for i in alive if len(alive & self.dealt[i].sealed.keys()) < self.shape.threshold}:
            alive -= cut
        self.alive = alive
        self.incoming = {j: [] for j in alive}
        for i in sorted(alive):
            for j in alive & self.dealt[i].sealed.keys():
                self.incoming[j].append(i)

    def outgoing(self, index: int) -> frozenset[int]:
        return self.alive & self.dealt[index].sealed.keys()

    def neighbours(self, index: int) -> frozenset[int]:
        return self.outgoing(index).union(self.incoming[index])


class CoordinatorSum:
    """One secure sum over `names`, at most `cohort` many; `context`, `shape` and `asked` as in SiteSum.

    For each step: send what `ask` returns, `take` what comes, in any order, and go on. After the last, `total`. With
    `registry` a site whose identity is another is left out, as the sites would refuse the list. Of
    the masked vectors those are added whose form (names, dtypes, lengths) most have.
    """

    def __init__(
        self,
        *,
        context: bytes,
        cohort: int,
        shape: ShapeRule,
        names: Sequence[str],
        registry: Registry | None = None,
        least: int = 2,
        asked: bytes = b"",
    ) -> None:
        self._premises = Premises(context=context, cohort=cohort, shape=shape, least=least)
        if len(set(names)) < len(names) or len(names) > cohort:
            raise BadInput(
                f"a secure sum is over distinct names, at most the {cohort} that were asked, got {short(list(names))}"
            )
        self._names, self._registry, self._asked = tuple(names), registry, asked
        self._step = ""  # the one that is being answered
        self._waiting: set[str] = set()  # who may still answer it
        self._probe = X25519PrivateKey.generate()  # finds public keys with which nobody can agree on anything
        self._keys: dict[str, PublicKeys] = {}
        self._graph = _Graph(Listed(names=(), keys=()), Shape(1, 1), b"")
        self._parts: dict[tuple[str, object], _Part] = {}  # by label and form
        self.label = ""  # of those that are added
        self._sums: dict[str, NDArray[Any]] = {}
        self._survivors: set[int] = set()  # U3
        self._alike: dict[int, bytes] = {}  # survivor -> its signature of U2
        self._signatures: dict[int, bytes] = {}
        self._revealed: dict[int, dict[int, bytes]] = {}  # holder -> whose secret -> share
        self._interpolations: dict[tuple[int, ...], Interpolation] = {}
        self.false_shares: dict[str, str] = {}  # a site -> whose secret the share that it revealed does not fit

    def __repr__(self) -> str:
        return f"CoordinatorSum(sites={len(self._names)}, step={self._step!r})"

    def ask(self) -> Asked:
        """End the step whose answers were taken, and say what is to be sent for the next one.

        Raises TooFewSites as soon as no sum can come of it: fewer than a quorum are left, or than t that hold shares of
        somebody's secret.
        """
        asking = {
            "": self._ask_keys,
            "keys": self._ask_shares,
            "shares": self._ask_masked,
            "masked": self._ask_survivors,
            "survivors": self._ask_reveal,
        }
        if self._step not in asking:
            raise FedeltaError("a secure sum has no further step; take its total, or begin a new one")
        before, self._step, self._waiting = self._step, _OVER, set()
        asked = asking[before]()
        self._step, self._waiting = asked.step, set(asked.bodies)
        return asked

    def take(self, sender: str, reply: Tensors, label: str = "") -> None:
        """What `sender` answered to the last `ask`. Each site has one answer. Masked vectors of one `label` are added.

        Raises BadTensors for one that is not as it has to be; the site then counts as dropped out. One that was not
        asked for, or is the second, changes nothing else.
        """
        if sender not in self._waiting:
            raise BadTensors(
                f"{short(sender)} was not asked for step {self._step!r} of a secure sum, or has answered it"
            )
        self._waiting.discard(sender)
        taking: dict[str, Callable[[str, Tensors], None]] = {
            "keys": self._take_keys,
            "shares": self._take_shares,
            "masked": partial(self._take_masked, label=label),
            "survivors": self._take_signature,
            "reveal": self._take_revealed,
        }
        taking[self._step](sender, reply)

    def total(self) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """The sum of each vector modulo 2^32 or 2^64, and the names of the sites that are in it, in their order.

        Raises TooFewSites if fewer than t shares came of a secret that is needed, or fewer than t that fit it.
        """
        if self._step != "reveal":
            raise FedeltaError(
                f"a secure sum has its total after its last step, 'reveal', and not after {self._step!r}"
            )
        self._step, self._waiting = _OVER, set()
        self._check_holders(frozenset(self._revealed))
        secrets = {owner: self._secret(owner) for owner in self._owners()}  # all, before any mask is taken off
        self._unmask(secrets)
        return self._sums, [self._graph.listed.names[i] for i in sorted(self._survivors)]

    def _ask_keys(self) -> Asked:
        return Asked(step="keys", shared={}, bodies={name: {} for name in self._names})

    def _take_keys(self, sender: str, reply: Tensors) -> None:
        """Whatever would make honest sites refuse the list is refused here, at the cost of one site and not of all."""
        keys = PublicKeys.from_tensors(reply)
        own = {keys.encryption, keys.masking, keys.identity}
        others = {key for other in self._keys.values() for key in (other.encryption, other.masking, other.identity)}
        if len(own) < 3 or own & others:
            raise BadTensors(f"{short(sender)} sent a public key twice, or one that another site has sent")
        try:
            check_keys(sender, keys, self._premises.context, self._registry)
            agree(self._probe, keys.encryption, sender)
            agree(self._probe, keys.masking, sender)
        except FedeltaError as error:
            raise BadTensors(str(error)) from None
        self._keys[sender] = keys

    def _ask_shares(self) -> Asked:
        names = tuple(name for name in self._names if name in self._keys)
        shape = self._premises.shape_of(len(names))
        listed = Listed(names=names, keys=tuple(self._keys[name] for name in names))
        self._graph = _Graph(listed, shape, list_digest(self._premises, shape, listed))
        return Asked(step="shares", shared=listed.to_tensors(), bodies={name: {} for name in names})

    def _take_shares(self, sender: str, reply: Tensors) -> None:
        expect(reply, ["neighbours", "shares", "commitment"])
        neighbours = indices_of(reply, "neighbours", len(self._graph.listed))
        expected = self._graph.shape.neighbours
        if len(neighbours) != expected or self._graph.index[sender] in neighbours:
            raise BadTensors(f"{short(sender)} shares with {len(neighbours)} sites, where it is {expected} others")
        sealed = rows(reply, "shares", expected, SEALED_BYTES)
        self._graph.dealt[self._graph.index[sender]] = _Dealt(
            sealed=dict(zip(neighbours, sealed, strict=True)), commitment=bytes_of(reply, "commitment", KEY_BYTES)
        )

    def _ask_masked(self) -> Asked:
        graph = self._graph
        graph.settle()
        self._premises.check_quorum(len(graph.alive), "shared their secrets with enough others")
        bodies: dict[str, Tensors] = {}
        for j in sorted(graph.alive):
            senders = graph.incoming[j]
            sealed = b"".join(graph.dealt[i].sealed[j] for i in senders)
            bodies[graph.listed.names[j]] = {
                "from": indices(senders),
                "shares": octets(sealed, len(senders), SEALED_BYTES),
            }
        shared = {"alive": octets(flags(graph.alive, len(graph.listed)), len(graph.listed))}
        return Asked(step="masked", shared=shared, bodies=bodies)

    def _take_masked(self, sender: str, reply: Tensors, label: str) -> None:
        vectors = arrays_of({name: tensor for name, tensor in reply.items() if name != SIGNATURE})
        form = form_of(vectors)
        index = self._graph.index[sender]
        signature = bytes_of(reply, SIGNATURE, SIGNATURE_BYTES) if SIGNATURE in reply else b""
        text = alive_text(self._graph.digest, self._graph.alive, len(self._graph.listed), self._asked)
        if not signed(self._keys[sender].identity, signature, text):
            raise BadTensors(f"{short(sender)} has not signed the set of sites that it was told are alive, or its task")
        self._alike[index] = signature
        part = self._parts.setdefault((label, tuple(sorted(form.items()))), _Part())
        for name, vector in vectors.items():
            if name in part.sums:
                np.add(part.sums[name], vector, out=part.sums[name])  # integers of arrays wrap
            else:
                part.sums[name] = vector.copy()
        part.members.add(index)

    def _ask_survivors(self) -> Asked:
        """U3: whose vectors have the form that most have. A few that send another drop out, and not the others."""
        sites = len(self._graph.listed)
        if self._parts:
            (self.label, _), part = max(self._parts.items(), key=lambda found: len(found[1].members))
            self._sums, self._survivors = part.sums, part.members
        self._premises.check_quorum(len(self._survivors), "sent their masked vectors")
        self._check_holders(frozenset(self._survivors))
        shared = {"survivors": octets(flags(self._survivors, sites), sites)}
        return Asked(step="survivors", shared=shared, bodies=self._to(self._survivors))

    def _take_signature(self, sender: str, reply: Tensors) -> None:
        expect(reply, ["signature"])
        signature = bytes_of(reply, "signature", SIGNATURE_BYTES)
        text = survivors_text(self._graph.digest, self._survivors, len(self._graph.listed))
        if not signed(self._keys[sender].identity, signature, text):
            raise BadTensors(f"{short(sender)} has not signed the set of survivors that it was sent")
        self._signatures[self._graph.index[sender]] = signature

    def _ask_reveal(self) -> Asked:
        self._premises.check_quorum(len(self._signatures), "signed the set of survivors")
        self._check_holders(frozenset(self._signatures))
        signers = sorted(self._signatures)
        signatures = b"".join(self._signatures[i] for i in signers)
        shared = {"signers": indices(signers), "signatures": octets(signatures, len(signers), SIGNATURE_BYTES)}
        bodies: dict[str, Tensors] = {}
        for j in signers:
            alike = [self._alike[i] for i in self._graph.incoming[j] if i in self._survivors]
            bodies[self._graph.listed.names[j]] = {"alive": octets(b"".join(alike), len(alike), SIGNATURE_BYTES)}
        return Asked(step="reveal", shared=shared, bodies=bodies)

    def _take_revealed(self, sender: str, reply: Tensors) -> None:
        expect(reply, ["shares"])
        holder = self._graph.index[sender]
        owners = self._graph.incoming[holder]
        shares = rows(reply, "shares", len(owners), SHARE_BYTES)
        self._revealed[holder] = dict(zip(owners, shares, strict=True))

    def _to(self, members: Iterable[int]) -> dict[str, Tensors]:
        return {self._graph.listed.names[i]: {} for i in sorted(members)}

    def _owners(self) -> list[int]:
        """Whose secret is needed: every survivor's b, and the masking key of those whose masks survivors have added."""
        graph = self._graph
        return [i for i in sorted(graph.alive) if i in self._survivors or graph.neighbours(i) & self._survivors]

    def _check_holders(self, holders: frozenset[int]) -> None:
        """Raise TooFewSites if a secret that is needed has fewer than t holders left."""
        threshold = self._graph.shape.threshold
        for owner in self._owners():
            left = len(self._graph.outgoing(owner) & holders)
            if left < threshold:
                raise TooFewSites(
                    f"{left} sites are left that hold shares of {short(self._graph.listed.names[owner])}, and "
                    f"{threshold} are needed to take its masks off the sum; begin a new one"
                )

    def _secret(self, owner: int) -> bytes:
        """The b of a survivor or the masking key of another, from t shares; one false share among them is found."""
        graph, threshold = self._graph, self._graph.shape.threshold
        shares = {j: self._revealed[j][owner] for j in graph.outgoing(owner) if j in self._revealed}
        names = graph.listed.names
        holders = sorted(shares, key=lambda j: (names[j] in self.false_shares, j))
        for without in (None, *holders[:threshold]):
            chosen = sorted([j for j in holders if j != without][:threshold])
            if len(chosen) == threshold and self._fits(owner, secret := self._combined(chosen, shares)):
                if without is not None:
                    self.false_shares[names[without]] = names[owner]
                return secret
        raise TooFewSites(
            f"no {threshold} of {len(shares)} shares give a secret that {short(names[owner])} has committed itself to: "
            "somebody lies about them; begin a new sum"
        )

    def _combined(self, holders: list[int], shares: dict[int, bytes]) -> bytes:
        """What the shares of `holders` give, b"" if it is no secret at all. Most secrets have the same holders."""
        points = tuple(j + 1 for j in holders)
        if points not in self._interpolations:
            self._interpolations[points] = Interpolation(points)
        try:
            return self._interpolations[points].at_zero([shares[j] for j in holders])
        except BadTensors:
            return b""

    def _fits(self, owner: int, secret: bytes) -> bool:
        if len(secret) != KEY_BYTES:
            return False
        if owner in self._survivors:
            return commitment(self._graph.digest, owner, secret) == self._graph.dealt[owner].commitment
        public = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
        return public == self._graph.listed.keys[owner].masking

    def _unmask(self, secrets: dict[int, bytes]) -> None:
        """Take off PRG(b) of each survivor, and what each survivor j has added for an i that dropped out."""
        graph, keys = self._graph, self._graph.listed.keys
        arrays = [self._sums[name] for name in sorted(self._sums)]
        for i, secret in secrets.items():
            if i in self._survivors:
                add_mask(arrays, secret, -1)
                continue
            private = X25519PrivateKey.from_private_bytes(secret)
            for j in sorted(graph.neighbours(i) & self._survivors):
                key = mask_key(agree(private, keys[j].masking, graph.listed.names[j]), graph.digest, i, j)
                add_mask(arrays, key, -1 if j < i else 1)
