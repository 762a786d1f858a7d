"""Who is refused, and why; and that the list is read again, and nothing worse is taken in its place."""

import logging
from base64 import encodebytes
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core.errors import BadInput, NotNow
from fedelta.fleet import certificate_forms as forms
from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.own_files import Party, new_request
from fedelta.fleet.revocations import Revocations

NOW = datetime.now(UTC)


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    authority = CertificateAuthority.create(tmp_path / "ca")
    for name in ("a", "ä"):
        authority.issue(name, tmp_path / name)
    return authority


@pytest.fixture
def revocations(authority: CertificateAuthority) -> Revocations:
    return Revocations(authority.folder / "revoked.crl")


def der(folder: Path) -> bytes:
    return x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes()).public_bytes(Encoding.DER)


def test_who_was_revoked_is_refused_at_once_and_others_are_not(
    tmp_path: Path, authority: CertificateAuthority, revocations: Revocations
) -> None:
    a, b = der(tmp_path / "a"), der(tmp_path / "ä")
    assert (revocations.refused("a", a), revocations.refused("ä", b)) == (None, None)
    authority.revoke("a", now=NOW)
    assert f"is revoked since {NOW:%Y-%m-%d %H:%M} UTC" in str(revocations.refused("a", a))
    assert revocations.refused("ä", b) is None
    authority.renew_list()
    authority.revoke("ä")
    assert "revoked" in str(revocations.refused("a", a))
    assert "revoked" in str(revocations.refused("ä", b))
    authority.issue("a", tmp_path / "again")
    assert revocations.refused("a", der(tmp_path / "again")) is None


def test_the_other_reasons(tmp_path: Path, authority: CertificateAuthority, revocations: Revocations) -> None:
    twin = CertificateAuthority.create(tmp_path / "twin", name=authority.name)
    twin.issue("a", tmp_path / "false")
    authority.issue("c", tmp_path / "c", hosts=["localhost"])
    authority.issue("old", tmp_path / "old", start=datetime(2020, 1, 1, tzinfo=UTC))
    authority.issue("early", tmp_path / "early", start=NOW + timedelta(days=3))
    a = der(tmp_path / "a")
    assert a.count(b"\x0c\x01a") == 1
    forged = a.replace(b"\x0c\x01a", b"\x0c\x01b")
    assert revocations.refused("b", a) == "the certificate is of 'a', and not of 'b'"
    for name, certificate in (("a", der(tmp_path / "false")), ("b", forged), ("a", b""), ("a", a[:-1])):
        assert "was not issued by" in str(revocations.refused(name, certificate))
    assert revocations.refused("c", der(tmp_path / "c")) == "the certificate is not one of a site"
    own = authority.certificate.public_bytes(Encoding.DER)
    assert revocations.refused(authority.name, own) == "the certificate is not one of a site"
    assert "has expired on 2020-03-31" in str(revocations.refused("old", der(tmp_path / "old")))
    with pytest.raises(NotNow, match="is not valid before"):
        revocations.refused("early", der(tmp_path / "early"))
    assert revocations.refused("a", a, NOW + timedelta(days=29)) is None
    with pytest.raises(NotNow, match="fedelta ca renew-list"):
        revocations.refused("a", a, NOW + timedelta(days=31))
    assert "the certificate of 'a' has expired" in str(revocations.refused("a", a, NOW + timedelta(days=91)))


def test_a_list_that_has_expired_lets_nobody_in_until_it_is_renewed(
    tmp_path: Path, authority: CertificateAuthority, revocations: Revocations
) -> None:
    a = der(tmp_path / "a")
    authority.renew_list(days=1, now=NOW - timedelta(days=2))
    with pytest.raises(NotNow, match="list of revoked certificates has expired"):
        revocations.refused("a", a)
    assert revocations.until < NOW
    authority.renew_list()
    assert revocations.refused("a", a) is None
    assert revocations.until > NOW


def test_a_worse_list_does_not_take_the_place_of_a_good_one(
    tmp_path: Path, authority: CertificateAuthority, revocations: Revocations, caplog: pytest.LogCaptureFixture
) -> None:
    file, a = authority.folder / "revoked.crl", der(tmp_path / "a")
    old = file.read_bytes()
    authority.revoke("a")
    assert "revoked" in str(revocations.refused("a", a))
    good = file.read_bytes()
    twin = CertificateAuthority.create(tmp_path / "twin", name=authority.name)
    for _ in range(5):
        twin.renew_list()
    flipped = x509.load_pem_x509_crl(good).public_bytes(Encoding.DER)
    flipped = flipped[:-1] + bytes([flipped[-1] ^ 1])
    worse = {
        old: "is older than the list",
        b"": "is no list",
        good[: len(good) // 2]: "is no list",
        (twin.folder / "revoked.crl").read_bytes(): "is not signed by",
        flipped: "is not signed by|is no list",
    }
    for content, why in worse.items():
        file.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert "revoked since" in str(revocations.refused("a", a))
                assert revocations.refused("ä", der(tmp_path / "ä")) is None
        (told,) = caplog.messages
        assert any(part in told for part in why.split("|")), told
        if content != old:  # without the memory of the good one
            with pytest.raises(BadInput, match=why):
                Revocations(file)
    file.unlink()
    assert "revoked since" in str(revocations.refused("a", a))
    file.write_bytes(x509.load_pem_x509_crl(good).public_bytes(Encoding.DER))
    assert "revoked since" in str(Revocations(file, authority.folder / "ca.pem").refused("a", a))


def test_files_that_are_missing(tmp_path: Path, authority: CertificateAuthority) -> None:
    with pytest.raises(BadInput, match=r"there is no list of revoked certificates .*none.crl"):
        Revocations(authority.folder / "none.crl")
    lonely = tmp_path / "alone" / "revoked.crl"
    lonely.parent.mkdir()
    lonely.write_bytes((authority.folder / "revoked.crl").read_bytes())
    with pytest.raises(BadInput, match=r"there is no .*alone/ca.pem; put the authority's certificate beside"):
        Revocations(lonely)
    with pytest.raises(BadInput, match="is no certificate in PEM"):
        Revocations(authority.folder / "revoked.crl", authority.folder / "revoked.crl")


def test_an_authority_of_ones_own(tmp_path: Path) -> None:
    """With RSA keys, a list in DER, and names of more than one part."""
    key, site_key = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    named = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Hospital A")]
    root = x509.Name([*named, x509.NameAttribute(NameOID.COMMON_NAME, "root")])
    subject = x509.Name([*named, x509.NameAttribute(NameOID.COMMON_NAME, "a")])
    builder = x509.CertificateBuilder().issuer_name(root).not_valid_before(NOW - timedelta(1))
    builder = builder.not_valid_after(NOW + timedelta(9))
    clients = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    leaf = builder.subject_name(subject).public_key(site_key.public_key()).serial_number(7)
    leaf = leaf.add_extension(clients, False)
    authority = builder.subject_name(root).public_key(key.public_key()).serial_number(1).sign(key, SHA256())
    site = leaf.sign(key, SHA256()).public_bytes(Encoding.DER)
    (tmp_path / "root.pem").write_bytes(authority.public_bytes(Encoding.PEM))

    def write(serial: int, *, partial: bool = False) -> None:
        gone = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
        listed = x509.CertificateRevocationListBuilder().issuer_name(root).add_revoked_certificate(gone)
        listed = listed.last_update(NOW).next_update(NOW + timedelta(9))
        if partial:
            listed = listed.add_extension(x509.DeltaCRLIndicator(1), critical=True)
        (tmp_path / "list.crl").write_bytes(listed.sign(key, SHA256()).public_bytes(Encoding.DER))

    write(8)
    revocations = Revocations(tmp_path / "list.crl", tmp_path / "root.pem")
    assert revocations.refused("a", site) is None
    write(7)
    assert "revoked since" in str(revocations.refused("a", site))
    write(8, partial=True)
    assert "revoked since" in str(revocations.refused("a", site))
    with pytest.raises(BadInput, match="of a part of the certificates"):
        Revocations(tmp_path / "list.crl", tmp_path / "root.pem")


@pytest.mark.filterwarnings("ignore::UserWarning")  # cryptography's, of what is damaged
def test_nothing_that_is_damaged_is_taken(tmp_path: Path) -> None:
    authority = CertificateAuthority.create(tmp_path / "ca")
    request = new_request("a", tmp_path / "own")
    authority.answer(request, tmp_path / "a")
    revocations = Revocations(tmp_path / "ca" / "revoked.crl")
    whole = {
        "certificate": der(tmp_path / "a"),
        "request": x509.load_pem_x509_csr(request.read_bytes()).public_bytes(Encoding.DER),
        "list": authority.revoked().public_bytes(Encoding.DER),
    }

    @settings(deadline=None)
    @given(st.data())
    def damage(data: st.DataObject) -> None:
        what = data.draw(st.sampled_from(sorted(whole)))
        content = bytearray(whole[what])
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if bytes(content) == whole[what]:
            return
        if what == "certificate":
            assert revocations.refused("a", bytes(content)) is not None
        elif what == "list":
            with pytest.raises(BadInput):
                forms.read_list(bytes(content), authority.certificate, "it")
        else:
            pem = b"-----BEGIN CERTIFICATE REQUEST-----\n%s-----END CERTIFICATE REQUEST-----\n"
            with pytest.raises(BadInput):
                forms.read_request(pem % encodebytes(bytes(content)), "it")

    damage()


def test_a_site_that_is_revoked_while_it_is_connected_has_to_leave(
    authority: CertificateAuthority, revocations: Revocations, tmp_path: Path
) -> None:
    pytest.importorskip("grpc")
    from fedelta.fleet.limits import Limits
    from fedelta.fleet.wire import Credentials
    from fleet_program import Play, load
    from remote_sites import PATIENCE_S, coordinator, site, until

    def credentials(name: str, purpose: Literal["site", "coordinator"]) -> Credentials:
        party = Party.read(tmp_path / name, purpose)
        return Credentials(root=party.root, chain=party.chain, key=party.key)

    authority.issue("c", tmp_path / "c", hosts=["127.0.0.1"])
    own, limits = credentials("c", "coordinator"), Limits(check_s=0.1)
    names = ("a", "ä")
    with (
        coordinator(Play(), names, credentials=own, allowed=revocations.refused, limits=limits) as fleet,
        site(Play(), load, "a", fleet.port, credentials=credentials("a", "site")),
        site(Play(), load, "ä", fleet.port, credentials=credentials("ä", "site")) as revoked,
    ):
        assert fleet.wait_for(2, PATIENCE_S)
        authority.revoke("ä")
        assert "the certificate of 'ä' is revoked since" in str(revoked.result())
        with site(Play(), load, "ä", fleet.port, credentials=credentials("ä", "site")) as again:
            assert "the certificate of 'ä' is revoked since" in str(again.result())
        until(lambda: list(fleet.connected()) == ["a"])
