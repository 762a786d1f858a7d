"""What the two halves of a secure sum compute alike: premises, signatures, the list's digest, agreed keys, commitments.

Primitives are those of `cryptography`: Ed25519 signs, X25519 agrees on keys, HKDF with SHA-256 derives them,
AES-256-GCM encrypts shares, SHA-256 commits to seeds. Every byte string that is signed or hashed, or that a key is
derived for, says what it is for and where its parts end. From the list on it has the digest of the list in it, hence
the context, the premises and all public keys: nothing that is made for one sum is good for another, nor for two
versions of one.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedelta.core.codec import short
from fedelta.core.errors import BadInput, FedeltaError, TooFewSites
from fedelta.secure.graph import Shape, quorum
from fedelta.secure.messages import Listed, PublicKeys, flags
from fedelta.secure.shamir import SHARE_BYTES

Registry = Mapping[str, Ed25519PublicKey]
ShapeRule = Callable[[int], Shape]  # how many sites are on the list -> whom each of them draws

_DOMAIN = b"fedelta secure sum 1"
_NONCE = bytes(12)  # each key encrypts one message: it is for one sum, one sender and one receiver


@dataclass(frozen=True, kw_only=True)
class Premises:
    """What all parties of a sum know of it before it begins."""

    context: bytes  # binds job, round, op and attempt; not empty, and never used for a second sum
    cohort: int  # sites that were asked, at least 2
    shape: ShapeRule
    least: int = 2  # sites in a sum: what a site insists on by itself, as the cohort is the coordinator's word

    def __post_init__(self) -> None:
        if not self.context:
            raise BadInput("a secure sum needs a context that no other sum has, got an empty one")
        fewest = max(2, self.least)
        if self.cohort < fewest:
            raise BadInput(f"a secure sum is of {fewest} sites at least, got a cohort of {self.cohort}; ask more sites")

    @property
    def quorum(self) -> int:
        """How many sites must be in the sum, and must have signed that they are."""
        return max(quorum(self.cohort), self.least)

    def shape_of(self, listed: int) -> Shape:
        """The shape of a list, with no more neighbours than there are others. Raises TooFewSites where none will do."""
        self.check_quorum(listed, "sent keys")
        try:
            shape = self.shape(listed)
        except BadInput as error:
            if listed == self.cohort:  # then it is the rule that is wrong, and not that sites are missing
                raise
            raise TooFewSites(f"{listed} of {self.cohort} sites sent keys, which are too few: {error}") from None
        if listed - 1 < shape.threshold:
            raise TooFewSites(
                f"each of {listed} sites has fewer than {shape.threshold} others to share its secrets with; "
                "ask more sites"
            )
        return Shape(min(shape.neighbours, listed - 1), shape.threshold)

    def check_quorum(self, count: int, what: str) -> None:
        """Raise TooFewSites for fewer than a quorum: the sum of a few would show too much of each."""
        if count < self.quorum:
            raise TooFewSites(
                f"{count} of {self.cohort} sites {what}, and a secure sum needs {self.quorum}; begin a new one"
            )


def keys_text(context: bytes, name: str, encryption: bytes, masking: bytes) -> bytes:
    """What a site signs when it sends its keys."""
    return _bound("keys", context, name.encode(), encryption, masking)


def alive_text(digest: bytes, alive: Collection[int], sites: int, asked: bytes) -> bytes:
    """What a site signs when it masks: who has shared secrets, of this list, and what it was asked to work on."""
    return _bound("alive", digest, flags(alive, sites), asked)


def survivors_text(digest: bytes, survivors: Collection[int], sites: int) -> bytes:
    """What a site signs once in a sum: this set of survivors, of this list."""
    return _bound("survivors", digest, flags(survivors, sites))


@lru_cache(maxsize=2**13)  # all sites of a simulation look at the same signatures, which is most of its work
def signed(identity: bytes, signature: bytes, text: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_keys(name: str, keys: PublicKeys, context: bytes, registry: Registry | None) -> None:
    """Raise FedeltaError unless these keys are the own words of the site that is registered under `name`.

    Without a registry anybody may use any name: that protects against a coordinator that is curious, and not against
    one that invents sites.
    """
    if registry is not None and (known := registry.get(name)) is None:
        raise FedeltaError(
            f"{short(name)} is not in the registry of identities; register it at all sites or leave it out"
        )
    if registry is not None and known is not None and known.public_bytes_raw() != keys.identity:
        raise FedeltaError(f"the identity key of {short(name)} is not the one in the registry; it may be an impostor's")
    if not signed(keys.identity, keys.signature, keys_text(context, name, keys.encryption, keys.masking)):
        raise FedeltaError(f"the keys of {short(name)} are not signed by its identity key for this very sum")


def list_digest(premises: Premises, shape: Shape, listed: Listed) -> bytes:
    """SHA-256 over the premises and the list, its order included: equal only for sites that were told the same."""
    numbers = (premises.cohort, shape.neighbours, shape.threshold, len(listed))
    parts = [premises.context, *(number.to_bytes(8) for number in numbers)]
    for name, keys in zip(listed.names, listed.keys, strict=True):
        parts += [name.encode(), keys.encryption, keys.masking, keys.identity]
    return hashlib.sha256(_bound("list", *parts)).digest()


def agree(own: X25519PrivateKey, other: bytes, name: str) -> bytes:
    """The secret that `own` and the public key of site `name` agree on."""
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:  # a point of small order, with which every key would agree on zero
        raise FedeltaError(f"a public key of {short(name)} is none that keys are agreed on with") from None


def mask_key(agreed: bytes, digest: bytes, one: int, other: int) -> bytes:
    """The key of the mask between two sites; the same for both."""
    return _derived(agreed, _bound("mask", digest, min(one, other).to_bytes(8), max(one, other).to_bytes(8)))


def seal(agreed: bytes, digest: bytes, sender: int, receiver: int, shares: tuple[bytes, bytes]) -> bytes:
    """Both shares, of the self-mask seed and of the masking key, for the eyes of one neighbour."""
    about = _bound("shares", digest, sender.to_bytes(8), receiver.to_bytes(8))
    return AESGCM(_derived(agreed, about)).encrypt(_NONCE, b"".join(shares), about)


def unseal(agreed: bytes, digest: bytes, sender: int, receiver: int, sealed: bytes) -> tuple[bytes, bytes] | None:
    """What `seal` was given, or None if it did not make this for this receiver in this sum."""
    about = _bound("shares", digest, sender.to_bytes(8), receiver.to_bytes(8))
    try:
        both = AESGCM(_derived(agreed, about)).decrypt(_NONCE, sealed, about)
    except InvalidTag:
        return None
    return both[:SHARE_BYTES], both[SHARE_BYTES:]


def commitment(digest: bytes, owner: int, seed: bytes) -> bytes:
    """Binds a site to its self-mask seed, and hides it, since the seed is drawn from 2^256."""
    return hashlib.sha256(_bound("seed", digest, owner.to_bytes(8), seed)).digest()


def _bound(purpose: str, *parts: bytes) -> bytes:
    """One byte string for one purpose and one list of parts; no two lists give the same."""
    return b"".join(len(part).to_bytes(8) + part for part in (_DOMAIN, purpose.encode(), *parts))


def _derived(agreed: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(agreed)
