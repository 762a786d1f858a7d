"""Signatures of broadcasts and replies, by the certificates that parties have."""

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.messages import Reply
from fedelta.fleet import signatures
from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.own_files import Party

STATEMENT = bytes(range(32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("parties")
    authority = CertificateAuthority.create(found / "ca")
    authority.issue("coordinator", found / "coordinator", hosts=["localhost", "127.0.0.1", "::1"])
    authority.issue("north", found / "north")
    authority.issue("south", found / "south")
    return found


def der(party: Party) -> bytes:
    return x509.load_pem_x509_certificate(party.chain).public_bytes(Encoding.DER)


def rsa_party() -> tuple[bytes, bytes]:
    """Key and certificate of an organisation whose authority uses RSA."""
    key = rsa.generate_private_key(65537, 2048)
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "west")]), datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 5, now, now + timedelta(days=1)).sign(key, SHA256())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), made.public_bytes(Encoding.DER)


def signed_by(party: Party) -> bytes:
    """A certificate for localhost, signed with a key of no authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer, now = x509.load_pem_x509_certificate(party.chain).subject, datetime.now(UTC) - timedelta(minutes=1)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    made = x509.CertificateBuilder(issuer, name, key.public_key(), 7, now, now + timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    return made.sign(load_pem_private_key(party.key, None), SHA256()).public_bytes(Encoding.PEM)  # type: ignore[arg-type]


def test_only_the_owner_of_a_certificate_signs_and_only_what_was_said(folder: Path) -> None:
    north, south = (Party.read(folder / name, "site") for name in ("north", "south"))
    for key, certificate in ((north.key, der(north)), rsa_party()):
        signature = signatures.Signer(key)(STATEMENT)
        signatures.check(certificate, STATEMENT, signature)
        others = [(der(south), STATEMENT, signature), (certificate, STATEMENT[::-1], signature)]
        for wrong in (b"", signature[:-1], signature + b"0", bytes(len(signature))):
            others.append((certificate, STATEMENT, wrong))
        for other in others:
            with pytest.raises(BadTensors, match="not of what was sent, or not by the owner"):
                signatures.check(*other)


def test_a_key_that_tls_takes_but_nothing_is_signed_with_is_refused() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(BadInput, match="P-256 or RSA"):
        signatures.Signer(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@given(st.lists(st.lists(st.binary(max_size=4), max_size=4), min_size=2, max_size=2))
def test_different_sayings_make_different_statements(sayings: list[list[bytes]]) -> None:
    first, second = (signatures.statement(b"tag", *parts) for parts in sayings)
    assert (first == second) == (sayings[0] == sayings[1])


def test_every_part_of_a_saying_is_in_its_statement() -> None:
    said = ("run", "train", "job", 3, 1, STATEMENT)
    known = {signatures.broadcast(*said)}
    for place, other in enumerate(("other", "evaluate", "other", 4, 2, bytes(32))):
        changed = [*said]
        changed[place] = other
        known.add(signatures.broadcast(*changed))  # type: ignore[arg-type]
    assert len(known) == 1 + len(said)
    reply = Reply(sender="north", answers="a/3/train", round=3)
    failure = Reply(sender="north", answers="a/3/train", round=3, error="no rows")
    others = [Reply(sender="north", answers="b", round=3), Reply(sender="north", answers="a/3/train", round=4), failure]
    replies = {signatures.reply(STATEMENT, one, bytes(32)) for one in (reply, *others)}
    replies |= {signatures.reply(bytes(32), reply, bytes(32)), signatures.reply(STATEMENT, reply, STATEMENT)}
    assert len(replies) == 6
    assert signatures.broadcast(*said) not in replies


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "[::1]"])
def test_the_coordinator_at_a_host_is_the_one_with_a_certificate_for_it(folder: Path, host: str) -> None:
    party = Party.read(folder / "coordinator", "coordinator")
    assert signatures.coordinator(party.chain, party.root, host) == der(party)


def test_no_other_party_is_taken_for_the_coordinator(folder: Path) -> None:
    party, site = Party.read(folder / "coordinator", "coordinator"), Party.read(folder / "north", "site")
    CertificateAuthority.create(folder / "another").issue("coordinator", folder / "false", hosts=["localhost"])
    false = Party.read(folder / "false", "coordinator")
    for chain, host in ((party.chain, "example.org"), (site.chain, "localhost"), (false.chain, "localhost")):
        with pytest.raises(BadTensors, match=f"no certificate for {host}"):
            signatures.coordinator(chain, party.root, host)
    own = site.chain + party.root  # of somebody whose certificate issues nothing
    with pytest.raises(BadTensors, match="no certificate for localhost"):
        signatures.coordinator(signed_by(site) + own, party.root, "localhost")
    whole = signatures.coordinator(party.chain, party.root, "localhost")
    version = base64.encodebytes(whole.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020101")))  # 3 becomes 2
    other = b"-----BEGIN CERTIFICATE-----\n" + version + b"-----END CERTIFICATE-----\n"
    for damaged in (b"", b"no certificate", party.chain[:200], other):
        with pytest.raises(BadTensors, match="no certificate for localhost"):
            signatures.coordinator(damaged, party.root, "localhost")
