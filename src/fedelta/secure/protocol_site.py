"""The site's half of a secure sum (Bonawitz et al., CCS 2017, figure 4; Bell et al., CCS 2020, section 4).

The coordinator is not trusted, and neither are other sites: whatever is sent here is checked before this site goes on.
The steps, each taken once and in this order: `keys`, `shares`, `masked`, `survivors`, `reveal`. Names of quantities are
those of the papers: b is the seed of a site's own mask, s_ij the key of the mask of a pair, U2 the sites that shared
their secrets ("alive"), U3 those whose masked input came ("survivors"), t the threshold.

What this half guarantees, if at most a third of the sites asked are corrupt, as many as the shape allows for, and a
registry of identities is given: this site's input leaves under masks that come off a sum with many others, and not off
itself. Which check serves what is said at each method.
Limits: a site may lie about its own input; bytes that Python has freed are not overwritten; without a registry the
guarantee holds against a coordinator that follows the protocol, and not against one that invents sites.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn, TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from fedelta.core.codec import short
from fedelta.core.errors import FedeltaError, TooFewSites
from fedelta.core.messages import Tensors
from fedelta.secure.agreement import (
    Premises,
    Registry,
    ShapeRule,
    agree,
    alive_text,
    check_keys,
    commitment,
    keys_text,
    list_digest,
    mask_key,
    seal,
    signed,
    survivors_text,
    unseal,
)
from fedelta.secure.graph import Shape
from fedelta.secure.masks import add_mask
from fedelta.secure.messages import (
    KEY_BYTES,
    SEALED_BYTES,
    SIGNATURE,
    SIGNATURE_BYTES,
    Arrays,
    Listed,
    PublicKeys,
    expect,
    form_of,
    indices,
    indices_of,
    members_of,
    octets,
    rows,
)
from fedelta.secure.shamir import SHARE_BYTES, split

# What a site keeps between two steps; its class says which step comes next. No repr shows what is in it.


@dataclass(frozen=True, repr=False, slots=True)
class _New:
    step = "keys"


@dataclass(frozen=True, repr=False, slots=True)
class _Keyed:
    encryption: X25519PrivateKey
    masking: X25519PrivateKey
    public: PublicKeys
    step = "shares"


@dataclass(frozen=True, repr=False, slots=True)
class _Dealt:
    own: _Keyed
    listed: Listed
    digest: bytes
    index: int  # of this site in the list
    threshold: int
    agreed: dict[int, bytes]  # outgoing neighbour -> the secret agreed on with it, for encryption
    seed: bytes  # b
    step = "masked"


@dataclass(frozen=True, repr=False, slots=True)
class _Masked:
    listed: Listed
    digest: bytes
    index: int
    alive: frozenset[int]  # U2
    held: dict[int, tuple[bytes, bytes]]  # incoming neighbour -> its shares of b and of its masking key
    asked: bytes
    step = "survivors"


@dataclass(frozen=True, repr=False, slots=True)
class _Signed:
    before: _Masked
    survivors: frozenset[int]  # U3
    step = "reveal"


@dataclass(frozen=True, repr=False, slots=True)
class _Over:
    step = None


_State = _New | _Keyed | _Dealt | _Masked | _Signed | _Over
_S = TypeVar("_S", _New, _Keyed, _Dealt, _Masked, _Signed)


class SiteSum:
    """One site's part in one sum. It lies in memory only: it cannot be pickled or copied, and shows no secrets.

    `context` is what this sum has and no other (job, round, op, attempt), `cohort` the number of sites asked, `shape`
    the rule for the graph, `least` the fewest sites whose sum it helps to show. `identity` signs; with `registry`
    (name -> public key) each identity must be the one that is registered. Every method raises FedeltaError, in one
    sentence, for what is out of order, malformed (BadTensors), of too few sites (TooFewSites) or could serve to unmask
    a site. A step that was refused ends the sum, and the secrets are dropped with it; a call out of order changes
    nothing.
    """

    def __init__(
        self,
        *,
        name: str,
        context: bytes,
        cohort: int,
        shape: ShapeRule,
        identity: Ed25519PrivateKey,
        registry: Registry | None = None,
        least: int = 2,
    ) -> None:
        self._premises = Premises(context=context, cohort=cohort, shape=shape, least=least)
        self._name, self._identity, self._registry = name, identity, registry
        self._state: _State = _New()

    def __repr__(self) -> str:
        return f"SiteSum(name={self._name!r}, next={self._state.step!r})"

    def __getstate__(self) -> NoReturn:
        raise TypeError("the secrets of a secure sum are neither stored nor copied nor sent to another process")

    def keys(self) -> dict[str, Tensor]:
        """Step 1: two fresh X25519 public keys, the identity, and its signature over them and the context.

        Two key pairs, because the masking key of a site that drops out is made known, and shares must stay encrypted.
        """
        self._begin(_New)
        encryption, masking = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        pairs = X25519PrivateKey.from_private_bytes(encryption), X25519PrivateKey.from_private_bytes(masking)
        publics = [pair.public_key().public_bytes_raw() for pair in pairs]
        public = PublicKeys(
            encryption=publics[0],
            masking=publics[1],
            identity=self._identity.public_key().public_bytes_raw(),
            signature=self._identity.sign(keys_text(self._premises.context, self._name, *publics)),
        )
        self._state = _Keyed(*pairs, public)
        return public.to_tensors()

    def shares(self, listed: Tensors) -> dict[str, Tensor]:
        """Step 2: from the list of all keys to this site's encrypted shares for neighbours that it draws itself.

        The neighbours are drawn after the keys are on the list, which each site's signature of the survivors covers:
        so a coordinator cannot choose them, nor fit its own sites to them.
        """
        own = self._begin(_Keyed)
        found = Listed.from_tensors(listed, self._premises.cohort)
        shape = self._premises.shape_of(len(found))
        index = self._check_list(found, own.public)
        digest = list_digest(self._premises, shape, found)
        neighbours = _drawn(index, len(found), shape)
        agreed = {j: agree(own.encryption, found.keys[j].encryption, found.names[j]) for j in neighbours}
        seed = secrets.token_bytes(KEY_BYTES)
        points = [j + 1 for j in neighbours]  # the value at 0 is the secret
        seed_shares = split(seed, points, shape.threshold)
        key_shares = split(own.masking.private_bytes_raw(), points, shape.threshold)
        sealed = [
            seal(agreed[j], digest, index, j, both)
            for j, both in zip(neighbours, zip(seed_shares, key_shares, strict=True), strict=True)
        ]
        self._state = _Dealt(own, found, digest, index, shape.threshold, agreed, seed)
        return {
            "neighbours": indices(neighbours),
            "shares": octets(b"".join(sealed), len(sealed), SEALED_BYTES),
            "commitment": octets(commitment(digest, index, seed), KEY_BYTES),
        }

    def masked(self, told: Tensors, vectors: Arrays, asked: bytes = b"") -> dict[str, Tensor]:
        """Step 3: `vectors` (int16, int32 or int64, one dimension; not changed) under masks, by the same names.

        `asked` is a digest of what the vectors are the answer to, the same for all sites.

        The own mask keeps this input hidden also if its pairwise masks become known, because it was thought to have
        dropped out. All shares are opened first: a site that cannot help others must not count as a survivor. The
        signature says which sites this one was told are alive, hence with whom it has masks, and what it was asked:
        see `reveal`.
        """
        before = self._begin(_Dealt)
        form_of(vectors)
        expect(told, ["alive", "from", "shares"])
        alive = members_of(told, "alive", len(before.listed))
        senders = indices_of(told, "from", len(before.listed))
        sealed = rows(told, "shares", len(senders), SEALED_BYTES)
        self._check_alive(before, alive, senders)
        held = {i: _opened(before, i, box) for i, box in zip(senders, sealed, strict=True)}
        hidden = {name: np.array(vectors[name], order="C") for name in sorted(vectors)}
        _mask(before, (set(before.agreed) | set(held)) & alive, hidden)
        self._state = _Masked(before.listed, before.digest, before.index, alive, held, asked)
        signature = self._identity.sign(alive_text(before.digest, alive, len(before.listed), asked))
        masked = {name: torch.from_numpy(vector) for name, vector in hidden.items()}
        return {SIGNATURE: octets(signature, SIGNATURE_BYTES), **masked}

    def survivors(self, told: Tensors) -> dict[str, Tensor]:
        """Step 4: the signature of this site under the set of survivors, which it gives for one set only.

        Honest sites that reveal have then been told the same set: two quorums share more than a third of the sites.
        """
        before = self._begin(_Masked)
        expect(told, ["survivors"])
        survivors = members_of(told, "survivors", len(before.listed))
        if not survivors <= before.alive:
            raise FedeltaError(f"{self._name} was told of survivors that had not been alive; this sum is given up")
        if before.index not in survivors:
            raise FedeltaError(
                f"{self._name} is not among the survivors that it was told of, and takes no further part"
            )
        self._premises.check_quorum(len(survivors), "survive")
        signature = self._identity.sign(survivors_text(before.digest, survivors, len(before.listed)))
        self._state = _Signed(before, survivors)
        return {"signature": octets(signature, SIGNATURE_BYTES)}

    def reveal(self, told: Tensors) -> dict[str, Tensor]:
        """Step 5: for each incoming neighbour one share, in ascending order of their indices.

        Of its b if it survived, of its masking key if it did not, and never of both: with both it would be unmasked.
        A survivor must have signed that it was told of the same sites alive as this one: or else it could have been
        kept from masking with honest ones, which would then take its last mask off. And that it was asked the same: or
        else all others could have been sent a model with which they learn nothing, so that the sum is its update
        (Pasquini et al., CCS 2022).
        """
        state = self._begin(_Signed)
        before = state.before
        expect(told, ["signers", "signatures", "alive"])
        signers = indices_of(told, "signers", len(before.listed))
        signatures = rows(told, "signatures", len(signers), SIGNATURE_BYTES)
        self._check_agreement(state, dict(zip(signers, signatures, strict=True)))
        masked_with = sorted(state.survivors & before.held.keys())
        alive = rows(told, "alive", len(masked_with), SIGNATURE_BYTES)
        self._check_alike(before, dict(zip(masked_with, alive, strict=True)))
        chosen = [before.held[i][0 if i in state.survivors else 1] for i in sorted(before.held)]
        self._state = _Over()
        return {"shares": octets(b"".join(chosen), len(chosen), SHARE_BYTES)}

    def _begin(self, kind: type[_S]) -> _S:
        """Take what the step before has left, so that no step is done twice, and nothing is left if this one fails."""
        state = self._state
        if not isinstance(state, kind):
            after = "the sum is over" if state.step is None else f"the next step is {state.step!r}"
            raise FedeltaError(
                f"{self._name} was asked for {kind.step!r} of a secure sum out of order, where {after}; "
                "each step is done once, so begin a new sum"
            )
        self._state = _Over()
        return state

    def _check_list(self, listed: Listed, own: PublicKeys) -> int:
        """This site's index. A list could hide that one party plays many, or that this site's keys were replaced."""
        everything = [key for keys in listed.keys for key in (keys.encryption, keys.masking, keys.identity)]
        if len(set(listed.names)) < len(listed) or len(set(everything)) < len(everything):
            raise FedeltaError(
                "a name or a public key is twice on the list of a secure sum; somebody plays several sites"
            )
        if (self._name, own) not in zip(listed.names, listed.keys, strict=True):
            raise FedeltaError(f"{self._name} is not on the list of a secure sum with the keys that it sent")
        for name, keys in zip(listed.names, listed.keys, strict=True):
            check_keys(name, keys, self._premises.context, self._registry)
        return listed.names.index(self._name)

    def _check_alive(self, before: _Dealt, alive: frozenset[int], senders: list[int]) -> None:
        """This site masks only with those that it is told are alive, and others may be told of more.

        Its input has left before survivors are agreed on. So a quorum, and t of the neighbours that it drew, are what
        keeps it from masking with corrupt sites alone, or with such as are then taken for dropped out (graph.py).
        """
        self._premises.check_quorum(len(alive), "shared their secrets")
        if before.index not in alive or before.index in senders or not alive.issuperset(senders):
            raise FedeltaError(f"{self._name} was told of shares that do not fit the set of sites that sent theirs")
        reached = len(alive & before.agreed.keys())
        if reached < before.threshold:
            raise TooFewSites(
                f"{reached} of the neighbours of {self._name} are left, and {before.threshold} are needed to take "
                "its masks off a sum; begin a new one"
            )

    def _check_agreement(self, state: _Signed, signatures: Mapping[int, bytes]) -> None:
        """A quorum signed the very set that this site did: nobody honest was told another one and reveals by it."""
        listed = state.before.listed
        if not state.survivors.issuperset(signatures):
            raise FedeltaError(f"{self._name} was sent signatures of sites that are not among the survivors")
        text = survivors_text(state.before.digest, state.survivors, len(listed))
        genuine = (i for i, signature in signatures.items() if signed(listed.keys[i].identity, signature, text))
        valid = len(
            list(islice(genuine, self._premises.quorum))
        )  # a quorum is enough, and each takes a while to verify
        if valid < self._premises.quorum:
            raise FedeltaError(
                f"{valid} sites have signed the survivors that {self._name} was told of, where {self._premises.quorum} "
                "must, so it reveals nothing"
            )

    def _check_alike(self, before: _Masked, signatures: Mapping[int, bytes]) -> None:
        """The neighbours to be unmasked have masked with all whom this site knows to be alive, for the same task."""
        text = alive_text(before.digest, before.alive, len(before.listed), before.asked)
        for i, signature in signatures.items():
            if not signed(before.listed.keys[i].identity, signature, text):
                raise FedeltaError(
                    f"{short(before.listed.names[i])} has not signed that it was told of the same sites, and asked "
                    f"the same, as {self._name}, so {self._name} reveals nothing"
                )


def _drawn(index: int, sites: int, shape: Shape) -> list[int]:
    """Outgoing neighbours: uniformly from the others, without replacement, by the operating system's generator."""
    others = [j for j in range(sites) if j != index]
    return sorted(secrets.SystemRandom().sample(others, shape.neighbours))


def _opened(state: _Dealt, sender: int, sealed: bytes) -> tuple[bytes, bytes]:
    """The shares that `sender` made for this site."""
    name = state.listed.names[sender]
    agreed = state.agreed.get(sender) or agree(state.own.encryption, state.listed.keys[sender].encryption, name)
    shares = unseal(agreed, state.digest, sender, state.index, sealed)
    if shares is None:
        raise FedeltaError(f"the shares from {short(name)} were not made for this site, or were altered on their way")
    return shares


def _mask(state: _Dealt, neighbours: set[int], vectors: Arrays) -> None:
    """Add, in place, PRG(b) and for each neighbour j PRG(s_ij), with the sign that cancels it at j."""
    arrays = list(vectors.values())
    add_mask(arrays, state.seed, 1)
    for j in sorted(neighbours):
        agreed = agree(state.own.masking, state.listed.keys[j].masking, state.listed.names[j])
        add_mask(arrays, mask_key(agreed, state.digest, state.index, j), 1 if state.index < j else -1)
