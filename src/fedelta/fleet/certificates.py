"""A small certificate authority in a folder: it says which sites may join, and which coordinator is the right one.

    ca.key                  its private key; whoever has it can let anybody in
    ca.pem                  its certificate; everybody gets it
    revoked.crl             what it has revoked; the coordinator reads it
    issued/NAME.SERIAL.pem  a copy of each certificate that it has issued

It is one level deep: nothing that it issues can issue anything. The key is not encrypted, and there is no service to
ask: requests and certificates are files that people send each other. What a request asks for is decided by whoever runs
the authority; of the request itself only name and key are taken, after its signature was checked.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedelta.core.errors import BadInput
from fedelta.fleet import certificate_forms as forms
from fedelta.fleet import own_files
from fedelta.fleet.revocations import number_of

KEY, CERTIFICATE, REVOKED, ISSUED = "ca.key", "ca.pem", "revoked.crl", "issued"
AUTHORITY_DAYS, CERTIFICATE_DAYS, LIST_DAYS = 3650, 90, 30
_FEWEST_DIGITS = 8  # of a serial number that is not given in full


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate that an authority has issued."""

    name: str
    serial: str  # 40 hex digits
    purpose: Literal["site", "coordinator"]
    hosts: tuple[str, ...]  # of a coordinator
    start: datetime  # this and the two below in UTC
    end: datetime
    revoked: datetime | None  # since when
    key: str  # SHA-256 of its public key

    @property
    def state(self) -> Literal["valid", "expired", "revoked"]:
        if self.revoked is not None:
            return "revoked"
        return "valid" if datetime.now(UTC) <= self.end else "expired"


@dataclass(frozen=True, kw_only=True)
class CertificateAuthority:
    """An authority in a folder; made by `create`, found again by `open`.

    Days are whole and at least 1. `start` is when what is made begins to count: an hour ago if not given, for the sake
    of clocks that are behind. All methods raise BadInput, and leave nothing unfinished behind.
    """

    folder: Path
    certificate: x509.Certificate = field(repr=False)
    _key: EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(
        cls, folder: Path | str, *, name: str = "", days: int = AUTHORITY_DAYS, start: datetime | None = None
    ) -> "CertificateAuthority":
        """A new authority, with an empty list, in a new folder; two without a name of their own have different ones."""
        folder = Path(folder)
        if not own_files.is_free(folder):
            raise BadInput(f"{folder} is there already; an authority is made once, and another needs another folder")
        name = forms.checked_name(name or f"fedelta authority {secrets.token_hex(4)}")
        key = generate_private_key(SECP256R1())
        certificate = forms.new_authority(key, name, forms.lasting(start, days))
        empty = forms.new_list(certificate, key, {}, 1, forms.lasting(start, LIST_DAYS))
        with own_files.new_folder(folder) as unfinished:
            own_files.write_new(unfinished / KEY, forms.key_text(key), secret=True)
            own_files.write_new(unfinished / CERTIFICATE, certificate.public_bytes(Encoding.PEM))
            own_files.write_new(unfinished / REVOKED, empty.public_bytes(Encoding.PEM))
            (unfinished / ISSUED).mkdir()
        return cls(folder=folder, certificate=certificate, _key=key)

    @classmethod
    def open(cls, folder: Path | str) -> "CertificateAuthority":
        """The one in that folder; the file of its key must be its owner's alone."""
        folder = Path(folder)
        if not (folder / KEY).exists():
            raise BadInput(f"there is no certificate authority in {folder}; make one with `fedelta ca init`")
        if own_files.readable_by_others(folder / KEY):
            raise BadInput(
                f"others may read {folder / KEY}, which lets anybody in; chmod 600 it, or begin a new authority"
            )
        key = forms.read_key(own_files.content(folder / KEY), str(folder / KEY))
        certificate = forms.read_certificate(own_files.content(folder / CERTIFICATE), str(folder / CERTIFICATE))
        if certificate.public_key() != key.public_key():
            raise BadInput(f"{folder / CERTIFICATE} is not of the key in {folder / KEY}; bring back the right one")
        return cls(folder=folder, certificate=certificate, _key=key)

    @property
    def name(self) -> str:
        return forms.common_name(self.certificate) or ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its certificate: what people compare who got ca.pem over a line that they do not trust."""
        return self.certificate.fingerprint(SHA256()).hex(":")

    def issue(
        self,
        name: str,
        out: Path | str,
        *,
        hosts: Sequence[str] = (),
        renew: bool = False,
        days: int = CERTIFICATE_DAYS,
        start: datetime | None = None,
    ) -> Issued:
        """Make a key and its certificate in the new folder `out`, to be handed over to that party.

        It is a site's, or, with the hosts at which sites reach it, a coordinator's. A site gets an identity for secure
        aggregation as well. A name that has a certificate gets another only with `renew`, and then no new identity.
        """
        name = forms.checked_name(name)
        key = generate_private_key(SECP256R1())
        with self._alone():
            made = self._made(name, key.public_key(), hosts, renew, forms.lasting(start, days))
            with self._handed_over(made, Path(out)) as folder:
                own_files.write_new(folder / own_files.PRIVATE, forms.key_text(key), secret=True)
                if not hosts and not renew:
                    own_files.add_identity(folder, name)
        return _issued(made, {})

    def answer(
        self,
        request: Path | str,
        out: Path | str | None = None,
        *,
        name: str | None = None,
        hosts: Sequence[str] = (),
        renew: bool = False,
        days: int = CERTIFICATE_DAYS,
        start: datetime | None = None,
    ) -> Issued:
        """As `issue`, for the name and the key in a request (PKCS #10, PEM), whose private key stays where it is.

        If `name` is given, the request must be for it. The folder is named for the party if `out` is not given.
        """
        request = Path(request)
        asked, key = forms.read_request(own_files.content(request), str(request))
        if name is not None and forms.checked_name(name) != asked:
            raise BadInput(f"{request} is for the name {asked!r}, and not for {name!r}; ask its sender")
        with self._alone():
            made = self._made(asked, key, hosts, renew, forms.lasting(start, days))
            with self._handed_over(made, Path(asked) if out is None else Path(out)):
                pass
        return _issued(made, {})

    def issued(self) -> list[Issued]:
        """All that it has issued, by name and then by age."""
        revoked = {one.serial_number: one.revocation_date_utc for one in self.revoked()}
        files = sorted((self.folder / ISSUED).glob("[!.]*.pem"))
        found = [_issued(forms.read_certificate(own_files.content(file), str(file)), revoked) for file in files]
        return sorted(found, key=lambda one: (one.name, one.start, one.serial))

    def revoked(self) -> x509.CertificateRevocationList:
        """The list that it has signed last."""
        path = self.folder / REVOKED
        return forms.read_list(own_files.content(path), self.certificate, str(path))

    def revoke(self, which: str, *, days: int = LIST_DAYS, now: datetime | None = None) -> list[str]:
        """Revoke a serial number, or all certificates of a name; returns the serial numbers.

        A serial number of which there is a copy in the folder may be cut to 8 or more of its first digits. The list
        that is signed expires after `days`. There is no way back: a party gets another certificate instead.
        """
        now = datetime.now(UTC) if now is None else now
        with self._alone():
            known = self.issued()
            serials = _meant(which, known)
            old = {one.serial_number: one.revocation_date_utc for one in self.revoked()}
            new = [serial for serial in serials if int(serial, 16) not in old]
            if not new:
                since = forms.day(max(old[int(serial, 16)] for serial in serials))
                raise BadInput(f"{which!r} is revoked already, since {since}")
            self._sign({**old, **{int(serial, 16): now for serial in new}}, days, now)
        return new

    def renew_list(self, *, days: int = LIST_DAYS, now: datetime | None = None) -> datetime:
        """Sign the list of revoked certificates anew, as it is; returns when it expires."""
        with self._alone():
            self._sign({one.serial_number: one.revocation_date_utc for one in self.revoked()}, days, now)
            end = self.revoked().next_update_utc
        assert end is not None
        return end

    def _made(
        self,
        name: str,
        key: EllipticCurvePublicKey,
        hosts: Sequence[str],
        renew: bool,
        period: tuple[datetime, datetime],
    ) -> x509.Certificate:
        """The certificate, if this name may have one."""
        known = self.issued()
        if any(one.revoked is not None and one.key == _key_digest(key) for one in known):
            raise BadInput(f"the key that {name!r} asks for was revoked; its owner has to make another request")
        others = [one for one in known if one.name.casefold() == name.casefold()]
        spelt = next((one.name for one in others if one.name != name), None)
        if spelt is not None:
            raise BadInput(f"{name!r} differs from {spelt!r} in small and capital letters alone; choose another name")
        current = [one for one in others if one.revoked is None]
        if current and not renew:
            raise BadInput(
                f"{name!r} has a certificate until {forms.day(current[-1].end)}; give it another with --renew, or "
                "revoke that one first"
            )
        if renew and not current:
            raise BadInput(f"{name!r} has no certificate to renew; leave --renew out")
        purpose = "coordinator" if hosts else "site"
        if current and current[-1].purpose != purpose:
            raise BadInput(
                f"{name!r} is a {current[-1].purpose}, and not a {purpose}; choose another name for that one"
            )
        return forms.new_certificate(self.certificate, self._key, name, key, hosts, period)

    @contextmanager
    def _handed_over(self, made: x509.Certificate, out: Path) -> Iterator[Path]:
        """A folder to fill; a certificate leaves in it only after its copy is in the folder of the authority."""
        text = made.public_bytes(Encoding.PEM)
        serial = forms.serial_text(made.serial_number)
        copy = self.folder / ISSUED / f"{forms.common_name(made)}.{serial}.pem"
        noted = False
        try:
            with own_files.new_folder(out) as folder:
                own_files.write_new(folder / own_files.CERTIFICATE, text)
                own_files.write_new(folder / own_files.AUTHORITY, self.certificate.public_bytes(Encoding.PEM))
                yield folder
                noted = True
                own_files.put(copy, text)
        except BaseException:
            if noted:
                copy.unlink(missing_ok=True)
            raise

    def _sign(self, revoked: dict[int, datetime], days: int, now: datetime | None) -> None:
        now = datetime.now(UTC) if now is None else now
        number = number_of(self.revoked()) + 1
        text = forms.new_list(self.certificate, self._key, revoked, number, forms.lasting(now, days))
        own_files.put(self.folder / REVOKED, text.public_bytes(Encoding.PEM))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """With no other process that issues or revokes here."""
        try:
            folder = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise BadInput(f"{self.folder} cannot be opened: {error.strerror}; give the right to it") from error
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def _issued(certificate: x509.Certificate, revoked: dict[int, datetime]) -> Issued:
    hosts = tuple(forms.hosts_of(certificate))
    return Issued(
        name=forms.common_name(certificate) or "",
        serial=forms.serial_text(certificate.serial_number),
        purpose="coordinator" if hosts else "site",
        hosts=hosts,
        start=certificate.not_valid_before_utc,
        end=certificate.not_valid_after_utc,
        revoked=revoked.get(certificate.serial_number),
        key=_key_digest(certificate.public_key()),
    )


def _key_digest(key: PublicKeyTypes) -> str:
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _meant(which: str, known: Sequence[Issued]) -> list[str]:
    """The serial numbers that a name, a serial number or its first digits stand for."""
    named = [one.serial for one in known if one.name == which]
    digits = which.lower()
    hexadecimal = len(digits) >= _FEWEST_DIGITS and set(digits) <= set("0123456789abcdef")
    begun = [one.serial for one in known if one.serial.startswith(digits)] if hexadecimal else []
    if hexadecimal and len(digits) == 40 and not begun:
        begun = [digits]  # of a certificate whose copy was lost
    if len(begun) > 1 or (named and begun):
        raise BadInput(f"{which!r} stands for more than one certificate; give more digits of the serial number")
    if not named and not begun:
        raise BadInput(f"no certificate has the name or the serial number {which!r}; `fedelta ca show` shows all")
    return named or begun
