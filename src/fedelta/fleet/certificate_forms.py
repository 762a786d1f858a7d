"""The form of certificates, requests and lists of revoked certificates: X.509 (RFC 5280), P-256 and SHA-256.

gRPC's TLS takes no Ed25519 certificates, so keys for TLS are P-256. A site's name is the common name of its
certificate, which is for clients alone; a coordinator's is for servers alone, and has the hosts at which sites reach
it. There are no certificates between an authority's and those it issues. Nothing here touches a file.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedelta.core.errors import BadInput

DAMAGED = (  # what cryptography raises for what is not well formed, or not known to it
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
LONGEST_NAME = 64  # bytes of UTF-8: what a common name may have
_MOST_DAYS = 36500
_SKEW = timedelta(hours=1)  # by which another organisation's clock may be behind
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def checked_name(name: str) -> str:
    """A party's name, in Unicode's composed form (NFC). It is a common name, a file's name and what people read.

    Raises BadInput for one that cannot be all three: empty, of more than 64 bytes, with a path separator, a control
    character or one that is not seen, with a blank at an end, or beginning with "." or "-".
    """
    name = unicodedata.normalize("NFC", name)
    wrong = None
    if not name.isprintable() or not name.strip():
        wrong = "has characters that are not seen" if name.strip() else "is empty"
    elif len(name.encode()) > LONGEST_NAME:
        wrong = f"has {len(name.encode())} bytes in UTF-8, and {LONGEST_NAME} fit into a certificate"
    elif "/" in name or "\\" in name:
        wrong = "has a path separator"
    elif name != name.strip() or name[0] in ".-":
        wrong = "begins or ends with a character that is easily lost or misread"
    if wrong is not None:
        shown = repr(name[:LONGEST_NAME])
        raise BadInput(f"the name {shown} {wrong}; choose one of up to {LONGEST_NAME} letters, digits, '-' and '.'")
    return name


def checked_host(host: str) -> x509.GeneralName:
    """A host name or an IP address. Raises BadInput for anything else."""
    try:
        return x509.IPAddress(ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    labels = host.lower().split(".")
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdecimal():
        raise BadInput(
            f"{host[:253]!r} is neither a host name nor an address; give it without a port, and in ASCII (xn--…)"
        )
    return x509.DNSName(host.lower())


def lasting(start: datetime | None, days: int) -> tuple[datetime, datetime]:
    """From when until when something counts that begins at `start`, or an hour ago; in UTC. Raises BadInput."""
    if not 1 <= days <= _MOST_DAYS:
        raise BadInput(f"days must be from 1 to {_MOST_DAYS}, got {days}")
    begin = (datetime.now(UTC) - _SKEW if start is None else start.astimezone(UTC)).replace(microsecond=0)
    return begin, begin + timedelta(days=days) + (_SKEW if start is None else timedelta())


def serial_text(serial: int) -> str:
    """A serial number of up to 160 bits as 40 hex digits."""
    return f"{serial:040x}"


# What an authority makes


def new_authority(key: EllipticCurvePrivateKey, name: str, period: tuple[datetime, datetime]) -> x509.Certificate:
    """The certificate of an authority, which it signs itself."""
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _filled(own, own, key.public_key(), period)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return builder.sign(key, SHA256())


def new_certificate(
    authority: x509.Certificate,
    authority_key: EllipticCurvePrivateKey,
    name: str,
    key: EllipticCurvePublicKey,
    hosts: Sequence[str],
    period: tuple[datetime, datetime],
) -> x509.Certificate:
    """That of a site, or, with hosts, of a coordinator. Raises BadInput if it would outlast its authority."""
    if period[1] > authority.not_valid_after_utc:
        raise BadInput(
            f"it would be valid until {day(period[1])}, and its authority is until "
            f"{day(authority.not_valid_after_utc)}; give fewer days, or begin a new authority"
        )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, checked_name(name))])
    builder = _filled(subject, authority.subject, key, period)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    above = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(above), critical=False
    )
    if hosts:
        names = x509.SubjectAlternativeName([*dict.fromkeys(map(checked_host, hosts))])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority_key, SHA256())


def new_list(
    authority: x509.Certificate,
    key: EllipticCurvePrivateKey,
    revoked: Mapping[int, datetime],
    number: int,
    period: tuple[datetime, datetime],
) -> x509.CertificateRevocationList:
    """The list of revoked certificates, serial number -> since when; `number` grows with each list."""
    above = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(period[0])
        .next_update(period[1])
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(above), critical=False)
    )
    for serial, since in revoked.items():
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(since.replace(microsecond=0))
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, SHA256())


def new_request(name: str, key: EllipticCurvePrivateKey) -> bytes:
    """A request (PKCS #10) for a certificate of that name, which shows that its sender has the key; PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, checked_name(name))])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256()).public_bytes(Encoding.PEM)


def _filled(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, period: tuple[datetime, datetime]
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())  # 159 random bits
        .not_valid_before(period[0])
        .not_valid_after(period[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


# What is read


def read_certificate(content: bytes, where: str) -> x509.Certificate:
    """The first certificate in PEM. Raises BadInput."""
    try:
        found = x509.load_pem_x509_certificate(content)
        found.public_key(), found.extensions  # both are parsed when they are asked for
    except DAMAGED as error:
        raise BadInput(f"{where} is no certificate in PEM; it is a file that an authority has made") from error
    return found


def read_key(content: bytes, where: str) -> EllipticCurvePrivateKey:
    """A private key on P-256, in PEM without a password. Raises BadInput."""
    try:
        found = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise BadInput(f"{where} is no private key in PEM without a password; see `fedelta ca`") from error
    if not isinstance(found, EllipticCurvePrivateKey) or not isinstance(found.curve, SECP256R1):
        raise BadInput(f"{where} is no key on the curve P-256; make one with `fedelta ca`")
    return found


def key_text(key: EllipticCurvePrivateKey) -> bytes:
    """The private key in PEM, without a password."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_request(content: bytes, where: str) -> tuple[str, EllipticCurvePublicKey]:
    """Name and key of a request, and nothing else that it asks for. Raises BadInput unless it is signed by that key."""
    try:
        found = x509.load_pem_x509_csr(content)
        key, signed = found.public_key(), found.is_signature_valid
        names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except DAMAGED as error:
        raise BadInput(f"{where} is no request in PEM; make one with `fedelta ca request`") from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise BadInput(f"{where} is for a key that is not on the curve P-256; make one with `fedelta ca request`")
    if not signed:
        raise BadInput(
            f"{where} is not signed with the key that it is for: it was changed, or its sender lacks the key"
        )
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise BadInput(f"{where} has {len(names)} common names; make one with `fedelta ca request`")
    return checked_name(names[0].value), key


def read_list(content: bytes, authority: x509.Certificate, where: str) -> x509.CertificateRevocationList:
    """A list of revoked certificates, PEM or DER. Raises BadInput unless it is whole, and signed by the authority."""
    try:
        pem = content.lstrip().startswith(b"-----")
        found = x509.load_pem_x509_crl(content) if pem else x509.load_der_x509_crl(content)
        ends, partial = found.next_update_utc, any(extension.critical for extension in found.extensions)
        signed = found.issuer == authority.subject and found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except DAMAGED as error:
        raise BadInput(f"{where} is no list of revoked certificates; it is a file that the authority makes") from error
    if not signed:
        raise BadInput(f"{where} is not signed by {common_name(authority)!r}; take the file that this authority made")
    if ends is None or partial:  # what is critical limits what it is about (RFC 5280, section 5.2)
        raise BadInput(f"{where} is of a part of the certificates, or has no end; take a whole list")
    return found


def common_name(certificate: x509.Certificate) -> str | None:
    """None if there is not exactly one."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return names[0].value if len(names) == 1 and isinstance(names[0].value, str) else None


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The hosts that it is for, as text."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def serves(certificate: x509.Certificate, purpose: x509.ObjectIdentifier) -> bool:
    """Whether a party may show it for that purpose."""
    found = {type(extension.value): extension.value for extension in certificate.extensions}
    uses, basic = found.get(x509.ExtendedKeyUsage), found.get(x509.BasicConstraints)
    signs = isinstance(basic, x509.BasicConstraints) and basic.ca
    return isinstance(uses, x509.ExtendedKeyUsage) and purpose in uses and not signs


def day(moment: datetime) -> str:
    """A moment as people read it: "2026-11-22 17:50 UTC"."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
