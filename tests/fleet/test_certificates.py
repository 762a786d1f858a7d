"""The certificate authority, checked by two others: cryptography's verifier, and OpenSSL in Python's TLS."""

import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput, FedeltaWarning
from fedelta.fleet import certificate_forms as forms
from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.own_files import Party, new_request
from fedelta.secure.aggregation import identities

HOSTS = ("localhost", "coordinator.example.org", "127.0.0.1", "::1")
KEY = ec.generate_private_key(ec.SECP256R1())
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca")


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# The chain, by cryptography's verifier


def verify_server(authority: CertificateAuthority, leaf: x509.Certificate, host: str, now: datetime) -> None:
    try:
        subject: x509.verification.Subject = x509.IPAddress(ip_address(host))
    except ValueError:
        subject = x509.DNSName(host)
    policy = PolicyBuilder().store(Store([authority.certificate])).time(now)
    policy.build_server_verifier(subject).verify(leaf, [])


def verify_client(authority: CertificateAuthority, leaf: x509.Certificate, now: datetime) -> None:
    """The Web's rules, but for the alternative names, which a site has none of."""
    ours = ExtensionPolicy.webpki_defaults_ee().may_be_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
    policy = PolicyBuilder().store(Store([authority.certificate])).time(now)
    policy = policy.extension_policies(ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=ours)
    policy.build_client_verifier().verify(leaf, [])


def test_certificates_hold_for_what_they_were_issued_for_alone(tmp_path: Path, authority: CertificateAuthority) -> None:
    authority.issue("c", tmp_path / "c", hosts=HOSTS)
    authority.issue("Zürich", tmp_path / "z")
    authority.answer(new_request("Genève 2", tmp_path / "own"), tmp_path / "g")
    other = CertificateAuthority.create(tmp_path / "other", name=authority.name)
    coordinator, *sites = (certificate(tmp_path / name) for name in ("c", "z", "g"))
    now, then = datetime.now(UTC), datetime.now(UTC) + timedelta(days=91)

    for host in HOSTS:
        verify_server(authority, coordinator, host, now)
    for site in sites:
        verify_client(authority, site, now)

    wrong: list[Callable[[], None]] = [
        lambda: verify_server(authority, coordinator, "example.org", now),
        lambda: verify_server(authority, coordinator, "127.0.0.2", now),
        lambda: verify_server(authority, coordinator, HOSTS[0], then),
        lambda: verify_server(other, coordinator, HOSTS[0], now),
        lambda: verify_client(authority, coordinator, now),
        lambda: verify_client(authority, sites[0], then),
        lambda: verify_client(other, sites[0], now),
        lambda: verify_server(authority, sites[0], "Zürich".encode("idna").decode(), now),
    ]
    for attempt in wrong:
        with pytest.raises(VerificationError):
            attempt()


def test_a_site_can_issue_nothing(tmp_path: Path, authority: CertificateAuthority) -> None:
    authority.issue("a", tmp_path / "a")
    key = forms.read_key((tmp_path / "a" / "private.key").read_bytes(), "")
    forged = forms.new_certificate(certificate(tmp_path / "a"), key, "b", KEY.public_key(), (), forms.lasting(None, 10))
    policy = PolicyBuilder().store(Store([authority.certificate])).build_client_verifier()
    with pytest.raises(VerificationError):
        policy.verify(forged, [certificate(tmp_path / "a")])


def test_the_form_of_certificates(tmp_path: Path, authority: CertificateAuthority) -> None:
    basic = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    found = [authority.issue(str(number), tmp_path / str(number)) for number in range(8)]
    assert len({one.serial for one in found}) == len(found)
    assert any(int(one.serial, 16) >> 150 for one in found)  # but for a chance of 2^-72
    leaf = certificate(tmp_path / "0")
    assert leaf.signature_hash_algorithm is not None
    assert leaf.signature_hash_algorithm.name == "sha256"
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert timedelta(days=90) < found[0].end - datetime.now(UTC) + timedelta(minutes=1) < timedelta(days=90, minutes=2)
    assert found[0] == authority.issued()[0]
    with pytest.raises(BadInput, match="its authority is until"):
        authority.issue("late", tmp_path / "late", days=3651)
    for days in (0, 10**9):
        with pytest.raises(BadInput, match="days must be from 1"):
            authority.issue("late", tmp_path / "late", days=days)


# TLS


def talk(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> None:
    """A handshake and a byte each way over a loopback socket. Raises the error of who refuses the other."""
    errors: list[OSError] = []

    def serve() -> None:
        try:
            accepted, _ = listener.accept()
            with accepted, server.wrap_socket(accepted, server_side=True) as line:
                line.sendall(line.recv(1))
        except OSError as error:
            errors.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(120)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=120) as plain,
                client.wrap_socket(plain, server_hostname=host) as line,
            ):
                line.sendall(b"x")
                assert line.recv(1) == b"x" or errors
        except OSError as error:
            errors.append(error)
        finally:
            thread.join()
    for error in sorted(errors, key=lambda error: not isinstance(error, ssl.SSLCertVerificationError)):
        raise error  # the other side's is that the line was cut


def contexts(server: Path, client: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    pair = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, own in zip(pair, (server, client), strict=True):
        context.load_cert_chain(own / "certificate.pem", own / "private.key")
        context.load_verify_locations(own / "ca.pem")
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.verify_mode = ssl.CERT_REQUIRED
    return pair


def test_mutual_tls(tmp_path: Path, authority: CertificateAuthority) -> None:
    other = CertificateAuthority.create(tmp_path / "other")
    authority.issue("c", tmp_path / "c", hosts=HOSTS)
    authority.issue("old c", tmp_path / "old c", hosts=HOSTS, start=LONG_AGO)
    other.issue("c", tmp_path / "other c", hosts=HOSTS)
    authority.issue("ä", tmp_path / "a")
    authority.issue("old", tmp_path / "old", start=LONG_AGO)
    authority.issue("early", tmp_path / "early", start=datetime.now(UTC) + timedelta(days=9))
    other.issue("ä", tmp_path / "other a")
    for name in ("other c", "other a"):  # it trusts the right one, and is not trusted by it
        (tmp_path / name / "ca.pem").write_bytes((tmp_path / "ca" / "ca.pem").read_bytes())

    for host in ("localhost", "127.0.0.1"):
        talk(*contexts(tmp_path / "c", tmp_path / "a"), host)

    refused = {
        ("c", "other a", "localhost"): "unable to get local issuer|signature failure|self.signed",
        ("other c", "a", "localhost"): "unable to get local issuer|signature failure|self.signed",
        ("c", "old", "localhost"): "expired",
        ("old c", "a", "localhost"): "expired",
        ("c", "early", "localhost"): "not yet valid",
        ("c", "c", "localhost"): "(unsuitable|unsupported) certificate purpose",
        ("a", "a", "localhost"): "(unsuitable|unsupported) certificate purpose",
        ("c", "a", "elsewhere.org"): "Hostname mismatch",
    }
    for (server, client, host), why in refused.items():
        with pytest.raises(ssl.SSLCertVerificationError, match=why):
            talk(*contexts(tmp_path / server, tmp_path / client), host)


def test_openssl_reads_the_list_of_revoked_certificates(tmp_path: Path, authority: CertificateAuthority) -> None:
    authority.issue("c", tmp_path / "c", hosts=HOSTS)
    for name in ("a", "b"):
        authority.issue(name, tmp_path / name)

    def join(name: str) -> None:
        server, client = contexts(tmp_path / "c", tmp_path / name)
        server.load_verify_locations(tmp_path / "ca" / "revoked.crl")
        server.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        talk(server, client)

    join("a")
    authority.revoke("a")
    join("b")
    with pytest.raises(ssl.SSLError, match="certificate revoked"):
        join("a")


# Names and hosts


@given(st.one_of(st.text(max_size=70), st.text("aä/\\.-\t\x7f \u202eé\u0301", max_size=12)))
def test_a_name_is_a_common_name_and_a_file_name_or_refused(text: str) -> None:
    try:
        name = forms.checked_name(text)
    except BadInput:
        return
    assert forms.checked_name(name) == name
    assert forms.read_request(forms.new_request(name, KEY), "")[0] == name
    assert Path("folder", name).parent == Path("folder")
    assert Path(f"{name}.pub").stem == name
    assert (name.isprintable(), name.strip()) == (True, name)
    assert not name.startswith((".", "-"))
    assert 0 < len(name.encode()) <= 64


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../a",
        "a/b",
        "a\\b",
        "-a",
        ".a",
        " a",
        "a ",
        "a\n",
        "a\0b",
        "a\u202eb",
        "a\u200bb",
        "ä" * 33,
    ],
)
def test_names_that_are_refused(tmp_path: Path, authority: CertificateAuthority, name: str) -> None:
    with pytest.raises(BadInput, match="the name") as error:
        authority.issue(name, tmp_path / "out")
    assert str(error.value).isprintable()
    with pytest.raises(BadInput, match="the name"):
        new_request(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a", "hospital-a", "Universitätsspital Zürich", "東京病院", "a.b", "ä" * 32, "*"])
def test_names_that_are_taken(tmp_path: Path, authority: CertificateAuthority, name: str) -> None:
    assert authority.issue(name, tmp_path / name).name == name
    assert identities(tmp_path / name).keys() == {name}
    assert Party.read(tmp_path / name, "site").name == name


def test_two_ways_to_write_a_name_are_one(tmp_path: Path, authority: CertificateAuthority) -> None:
    assert authority.issue("Zu\u0308rich", tmp_path / "z").name == "Z\u00fcrich"
    with pytest.raises(BadInput, match="has a certificate until"):
        authority.issue("Z\u00fcrich", tmp_path / "y")
    with pytest.raises(BadInput, match="small and capital letters alone"):
        authority.issue("Z\u00dcRICH", tmp_path / "y")


@pytest.mark.parametrize(
    "host", ["", "a:50051", "a b", "*.org", "-a", "a-", "a..b", "256.1.1.1", "ä.ch", "a" * 64, "a_b"]
)
def test_hosts_that_are_refused(tmp_path: Path, authority: CertificateAuthority, host: str) -> None:
    with pytest.raises(BadInput, match="neither a host name nor an address"):
        authority.issue("c", tmp_path / "c", hosts=["localhost", host])
    assert not (tmp_path / "c").exists()


# Files


def test_private_files_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        authority = CertificateAuthority.create(tmp_path / "ca")
        authority.issue("a", tmp_path / "a")
        new_request("b", tmp_path / "b")
        authority.revoke("a")
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    secret = {name for name, mode in modes.items() if mode == 0o600}
    assert secret == {"ca/ca.key", "a/private.key", "a/identity.key", "b/private.key", "b/identity.key"}
    assert {modes[name] for name in ("a", "b", "ca")} == {0o700}
    assert (modes["ca/ca.pem"], modes["ca/revoked.crl"], modes["a/a.pub"]) == (0o644, 0o644, 0o644)

    (tmp_path / "ca" / "ca.key").chmod(0o640)
    with pytest.raises(BadInput, match="others may read"):
        CertificateAuthority.open(tmp_path / "ca")


def test_nothing_is_overwritten_and_nothing_is_left_of_what_failed(
    tmp_path: Path, authority: CertificateAuthority
) -> None:
    authority.issue("a", tmp_path / "a")
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "file").touch()
    failing: list[tuple[str, Callable[[], object]]] = [
        ("is there already; an authority is made once", lambda: CertificateAuthority.create(tmp_path / "ca")),
        ("is there already", lambda: authority.issue("b", tmp_path / "a")),
        ("is there already", lambda: authority.issue("b", tmp_path / "file")),
        ("cannot be made", lambda: authority.issue("b", tmp_path / "no" / "b")),
        ("is there already", lambda: new_request("b", tmp_path / "a")),
        ("cannot be made", lambda: CertificateAuthority.create(tmp_path / "no" / "ca")),
        ("has a certificate until", lambda: authority.issue("a", tmp_path / "b")),
        ("leave --renew out", lambda: authority.issue("b", tmp_path / "b", renew=True)),
        ("is a site, and not a coordinator", lambda: authority.issue("a", tmp_path / "b", renew=True, hosts=HOSTS)),
        ("cannot be read", lambda: authority.answer(tmp_path / "none.csr", tmp_path / "b")),
        ("no certificate authority", lambda: CertificateAuthority.open(tmp_path / "a")),
        ("no certificate has", lambda: authority.revoke("b")),
    ]
    for why, attempt in failing:
        with pytest.raises(BadInput, match=why):
            attempt()
    assert {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size
    } == content


def test_a_certificate_that_was_not_handed_over_was_not_issued(tmp_path: Path, authority: CertificateAuthority) -> None:
    before = tree(tmp_path)
    made = authority._made("a", KEY.public_key(), (), False, forms.lasting(None, 9))
    with pytest.raises(BadInput, match="cannot be made"), authority._handed_over(made, tmp_path / "a"):
        (tmp_path / "a" / "of somebody else").mkdir(parents=True)  # after it was seen that nothing is there
    assert tree(tmp_path) - before == {"a", "a/of somebody else"}


def test_of_two_at_once_one_gets_the_name(tmp_path: Path, authority: CertificateAuthority) -> None:
    gate, refused = threading.Barrier(4), []

    def issue(number: int) -> None:
        gate.wait()
        try:
            CertificateAuthority.open(tmp_path / "ca").issue("a", tmp_path / str(number))
        except BadInput as error:
            refused.append(str(error))

    threads = [threading.Thread(target=issue, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(authority.issued()) == 1
    assert ["has a certificate until" in why for why in refused] == [True] * 3


def test_a_site_that_renews_keeps_its_identity(tmp_path: Path, authority: CertificateAuthority) -> None:
    authority.issue("a", tmp_path / "first")
    authority.issue("a", tmp_path / "second", renew=True)
    assert tree(tmp_path / "first") - tree(tmp_path / "second") == {"identity.key", "a.pub"}
    assert [one.state for one in authority.issued()] == ["valid", "valid"]
    assert len(authority.revoke("a")) == 2
    assert [one.state for one in authority.issued()] == ["revoked", "revoked"]
    authority.issue("a", tmp_path / "third")
    assert (tmp_path / "third" / "a.pub").read_bytes() != (tmp_path / "first" / "a.pub").read_bytes()


def test_a_serial_number_may_be_cut(tmp_path: Path, authority: CertificateAuthority) -> None:
    serials = [authority.issue(name, tmp_path / name).serial for name in ("a", "b", "c")]
    assert authority.revoke(serials[0][:8]) == [serials[0]]
    assert authority.revoke(serials[1].upper()) == [serials[1]]
    with pytest.raises(BadInput, match="revoked already"):
        authority.revoke("b")
    with pytest.raises(BadInput, match="no certificate has"):
        authority.revoke(serials[2][:7])
    (copy,) = (tmp_path / "ca" / "issued").glob("c.*.pem")
    copy.unlink()
    with pytest.raises(BadInput, match="no certificate has"):
        authority.revoke("c")
    assert authority.revoke(serials[2]) == [serials[2]]


# Requests


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return new_request("a", tmp_path / "own")


def test_a_request_is_answered_for_its_name_and_key(
    tmp_path: Path, authority: CertificateAuthority, asked: Path
) -> None:
    with pytest.raises(BadInput, match="is for the name 'a', and not for 'b'"):
        authority.answer(asked, tmp_path / "no", name="b")
    assert authority.answer(asked, tmp_path / "answer", name="a").name == "a"
    assert tree(tmp_path / "answer") == {"certificate.pem", "ca.pem"}
    for name in ("certificate.pem", "ca.pem"):
        (tmp_path / "own" / name).write_bytes((tmp_path / "answer" / name).read_bytes())
    party = Party.read(tmp_path / "own", "site")
    assert (party.name, party.identity) == ("a", tmp_path / "own" / "identity.key")
    authority.revoke("a")
    with pytest.raises(BadInput, match="the key that 'a' asks for was revoked"):
        authority.answer(asked, tmp_path / "again")


def test_a_request_for_somebody_elses_key_is_refused(
    tmp_path: Path, authority: CertificateAuthority, asked: Path
) -> None:
    request = x509.load_pem_x509_csr(asked.read_bytes())
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    own, stolen = request.public_key().public_bytes(*form), KEY.public_key().public_bytes(*form)
    der = request.public_bytes(Encoding.DER)
    for changed in (der.replace(own, stolen), der.replace(b"\x0c\x01a", b"\x0c\x01b")):
        assert changed != der
        asked.write_bytes(x509.load_der_x509_csr(changed).public_bytes(Encoding.PEM))
        with pytest.raises(BadInput, match="not signed with the key that it is for"):
            authority.answer(asked, tmp_path / "out")
    assert authority.issued() == []


def test_what_else_a_request_asks_for_is_not_given(tmp_path: Path, authority: CertificateAuthority) -> None:
    names = [
        x509.NameAttribute(NameOID.COMMON_NAME, "a"),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Coordinators"),
    ]
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name(names))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(KEY, SHA256())
    )
    (tmp_path / "a.csr").write_bytes(greedy.public_bytes(Encoding.PEM))
    authority.answer(tmp_path / "a.csr", tmp_path / "greedy")
    authority.issue("b", tmp_path / "usual")
    greedy_one, usual = certificate(tmp_path / "greedy"), certificate(tmp_path / "usual")
    own = (x509.SubjectKeyIdentifier,)
    assert [e for e in greedy_one.extensions if not isinstance(e.value, own)] == [
        e for e in usual.extensions if not isinstance(e.value, own)
    ]
    assert greedy_one.subject.rfc4514_string() == "CN=a"


def test_requests_that_are_none(tmp_path: Path, authority: CertificateAuthority) -> None:
    def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *names: str) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
        return (
            x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256()).public_bytes(Encoding.PEM)
        )

    whole = request(KEY, "a")
    wrong = {
        b"": "no request in PEM",
        whole[: len(whole) // 2]: "no request in PEM",
        request(ec.generate_private_key(ec.SECP384R1()), "a"): "not on the curve P-256",
        request(rsa.generate_private_key(65537, 2048), "a"): "not on the curve P-256",
        request(KEY): "0 common names",
        request(KEY, "a", "b"): "2 common names",
        request(KEY, "../a"): "path separator",
        bytes(2**24 + 1): "another file",
    }
    for content, why in wrong.items():
        (tmp_path / "x.csr").write_bytes(content)
        with pytest.raises(BadInput, match=why):
            authority.answer(tmp_path / "x.csr")


# What a party reads


def test_a_partys_files_have_to_belong_together(tmp_path: Path, authority: CertificateAuthority) -> None:
    other = CertificateAuthority.create(tmp_path / "other")
    authority.issue("c", tmp_path / "c", hosts=HOSTS)
    authority.issue("a", tmp_path / "a")
    authority.issue("old", tmp_path / "old", start=LONG_AGO)
    assert Party.read(tmp_path / "c", "coordinator").identity is None
    own = Party.read(tmp_path / "a", "site")
    assert own.root == (tmp_path / "ca" / "ca.pem").read_bytes()
    assert "PRIVATE" not in repr(own)
    with pytest.raises(BadInput, match="is not one of a coordinator"):
        Party.read(tmp_path / "a", "coordinator")
    with pytest.raises(BadInput, match="is not one of a site"):
        Party.read(tmp_path / "c", "site")
    with pytest.raises(BadInput, match="has expired on 2020-03-31"):
        Party.read(tmp_path / "old", "site")
    changes = {
        "private.key": ((tmp_path / "c" / "private.key").read_bytes(), "is not the key of"),
        "ca.pem": ((other.folder / "ca.pem").read_bytes(), "was not issued by"),
        "certificate.pem": (b"x", "no certificate in PEM"),
    }
    for name, (content, why) in changes.items():
        file = tmp_path / "a" / name
        right = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(BadInput, match=why):
            Party.read(tmp_path / "a", "site")
        file.write_bytes(right)
    (tmp_path / "a" / "identity.key").chmod(0o644)
    with pytest.warns(FedeltaWarning, match=r"others may read .*identity\.key"):
        Party.read(tmp_path / "a", "site")
    (tmp_path / "a" / "private.key").unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        Party.read(tmp_path / "a", "site")
