"""Who said what: signatures that outlast a connection.

TLS shows each end of a stream who the other one is, and nothing to anybody later. So the coordinator signs what it
broadcasts, and a site what it replies, with the keys of their certificates; each checks the other's and keeps it. A
signature is over a statement: SHA-256 over a tag and the parts of what is said, each with its length before it, so that
no two sayings make one statement; of a message with tensors, its BLAKE3 is a part. Keys are on P-256 (ECDSA with
SHA-256), or RSA (PSS with SHA-256) where an organisation has its own authority.
"""

import hashlib
import ipaddress
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    Subject,
    VerificationError,
)

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.messages import Reply
from fedelta.fleet import certificate_forms as forms


def _issues(_policy: object, _certificate: object, found: x509.BasicConstraints) -> None:
    if not found.ca:
        raise ValueError("what should have issued it is no authority")


# No more than TLS asks for: an organisation's own authority may leave out what the web's have to state.
_LAX = ExtensionPolicy.permit_all()
_ABOVE = _LAX.require_present(x509.BasicConstraints, Criticality.AGNOSTIC, _issues)
_OWN = _LAX.require_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
_ECDSA = ec.ECDSA(SHA256())
_PSS = padding.PSS(padding.MGF1(SHA256()), padding.PSS.DIGEST_LENGTH)


class Signer:
    """Signs with a private key, in PEM. Raises BadInput for a key that is of no kind that is known here."""

    def __init__(self, key: bytes) -> None:
        found = load_pem_private_key(key, password=None)
        if not isinstance(found, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise BadInput(f"a {type(found).__name__} signs nothing here; use a certificate with a P-256 or RSA key")
        self._key = found

    def __call__(self, statement: bytes) -> bytes:
        if isinstance(self._key, rsa.RSAPrivateKey):
            return self._key.sign(statement, _PSS, SHA256())
        return self._key.sign(statement, _ECDSA)


@lru_cache(maxsize=64)  # the sites of a process check one signature of a broadcast
def check(certificate: bytes, statement: bytes, signature: bytes) -> None:
    """Raises BadTensors unless the owner of a certificate (DER) has signed the statement."""
    key = _key(certificate)
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, statement, _ECDSA)
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, statement, _PSS, SHA256())
        else:
            raise BadTensors(f"the other side's certificate has a {type(key).__name__}, which signs nothing here")
    except InvalidSignature:
        raise BadTensors("a signature is not of what was sent, or not by the owner of the certificate") from None


@lru_cache(maxsize=1024)  # a coordinator has those of all sites that are here
def _key(certificate: bytes) -> object:
    return x509.load_der_x509_certificate(certificate).public_key()


def broadcast(run: str, op: str, job: str, round: int, attempt: int, shared: bytes) -> bytes:
    """The statement that all sites are sent a broadcast with the digest `shared` (32 bytes) in a round of a run."""
    return statement(b"fedelta broadcast", *texts(run, op, job, str(round), str(attempt)), shared)


def reply(request: bytes, said: Reply, body: bytes) -> bytes:
    """The statement that a reply with a body of this digest, or a failure, answers the request with that digest."""
    failed = () if said.error is None else texts(said.error)
    return statement(b"fedelta reply", request, *texts(said.answers, str(said.round)), body, *failed)


def statement(*parts: bytes) -> bytes:
    """SHA-256 over the parts, each with its length before it."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.digest()


def coordinator(chain: bytes, roots: bytes, host: str) -> bytes:
    """The certificate (DER) of the coordinator that is reached at `host`, of a chain in PEM that it has shown.

    What TLS has checked, checked once more, since gRPC does not tell what the other side has shown. Raises BadTensors
    unless one of `roots` (PEM) stands behind it.
    """
    try:
        first, *others = x509.load_pem_x509_certificates(chain)
        store = Store(x509.load_pem_x509_certificates(roots))
        policy = PolicyBuilder().store(store).extension_policies(ca_policy=_ABOVE, ee_policy=_OWN)
        policy.build_server_verifier(_subject(host)).verify(first, others)
    except (*forms.DAMAGED, VerificationError) as error:
        raise BadTensors(f"the coordinator shows no certificate for {host} by which it could sign: {error}") from None
    return first.public_bytes(Encoding.DER)


def _subject(host: str) -> Subject:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def texts(*found: str) -> list[bytes]:
    return [text.encode("utf-8", "surrogatepass") for text in found]
