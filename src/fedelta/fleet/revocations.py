"""Who may take part by its certificate: what a coordinator asks when a site connects, and again while it is connected.

TLS checks a certificate once, and gRPC takes no list of revoked certificates (CRL, RFC 5280, section 5); so it is read
here, and again when its file changes. Whatever cannot be told is a refusal: a list that has expired lets nobody in. A
file that is damaged, or older than what was read before, is not taken: the list that was read last counts until it
expires. What was read before a restart is not remembered.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedelta.core.errors import BadInput, NotNow
from fedelta.fleet import certificate_forms as forms
from fedelta.fleet.own_files import content

log = logging.getLogger(__name__)
_REMEMBERED = 4096  # certificates whose signature is not checked again


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A certificate that the authority has issued to a site."""

    name: str | None
    serial: int
    start: datetime
    end: datetime


@dataclass(frozen=True, kw_only=True)
class _List:
    revoked: dict[int, datetime]
    number: int  # grows with each list
    start: datetime
    end: datetime


class Revocations:
    """The list of revoked certificates in a file, and the certificate of the authority that has signed it.

    `authority` is a PEM file: if not given, ca.pem in the folder of the list. That authority must have issued the
    certificates of all sites itself. Raises BadInput if one of the two files is not what it has to be.
    """

    def __init__(self, path: Path | str, authority: Path | str | None = None) -> None:
        self.path = Path(path)
        root = self.path.with_name("ca.pem") if authority is None else Path(authority)
        if not self.path.exists():
            raise BadInput(f"there is no list of revoked certificates {self.path}; `fedelta ca` makes revoked.crl")
        if not root.exists():
            raise BadInput(f"there is no {root}; put the authority's certificate beside its list {self.path.name}")
        self._authority = forms.read_certificate(content(root), str(root))
        self._issued: Callable[[bytes], _Known | str] = lru_cache(maxsize=_REMEMBERED)(self._read)
        self._stamp = self._now_there()
        self._list = self._taken()

    @property
    def since(self) -> datetime:
        """When the list was signed; in UTC."""
        self._renew()
        return self._list.start

    @property
    def until(self) -> datetime:
        """When the list expires, and with it everybody's admission, unless it is renewed; in UTC."""
        self._renew()
        return self._list.end

    def refused(self, name: str, certificate: bytes, now: datetime | None = None) -> str | None:
        """Why the site `name` may not take part with this certificate (DER), or None if it may.

        Raises NotNow for what passes without the site: a certificate that is not valid yet, a list that has expired.
        """
        now = datetime.now(UTC) if now is None else now
        self._renew()
        known = self._issued(certificate)
        if isinstance(known, str):
            return known
        if known.name != name:
            return f"the certificate is of {known.name!r}, and not of {name!r}"
        since = self._list.revoked.get(known.serial)
        if since is not None:
            return f"the certificate of {name!r} is revoked since {forms.day(since)}; ask the authority for another"
        if now < known.start:
            why = f"the certificate of {name!r} is not valid before {forms.day(known.start)}; are all clocks right?"
            raise NotNow(why)
        if now > known.end:
            return f"the certificate of {name!r} has expired on {forms.day(known.end)}; ask the authority for another"
        if now > self._authority.not_valid_after_utc:
            return f"the authority's certificate has expired on {forms.day(self._authority.not_valid_after_utc)}"
        if now > self._list.end:
            raise NotNow(
                f"the coordinator's list of revoked certificates has expired on {forms.day(self._list.end)}; its "
                "authority has to renew it with `fedelta ca renew-list`"
            )
        return None

    def _read(self, der: bytes) -> _Known | str:
        try:
            found = x509.load_der_x509_certificate(der)
            found.verify_directly_issued_by(self._authority)
        except (*forms.DAMAGED, InvalidSignature):
            return f"the certificate was not issued by {forms.common_name(self._authority)!r}"
        try:
            fits = forms.serves(found, ExtendedKeyUsageOID.CLIENT_AUTH)
        except forms.DAMAGED:
            fits = False
        if not fits:
            return "the certificate is not one of a site"
        return _Known(
            name=forms.common_name(found),
            serial=found.serial_number,
            start=found.not_valid_before_utc,
            end=found.not_valid_after_utc,
        )

    def _renew(self) -> None:
        """Take the file anew if it has changed and may take the place of what was read before."""
        stamp = self._now_there()
        if stamp == self._stamp:
            return
        self._stamp = stamp  # so that each change is told of once
        try:
            found = self._taken()
        except BadInput as error:
            log.warning("%s; the list that was read before counts until %s", error, forms.day(self._list.end))
            return
        if found.number < self._list.number:
            log.warning("%s is older than the list that was read before, and is not taken", self.path)
            return
        self._list = found

    def _now_there(self) -> tuple[int, ...]:
        try:
            found = os.stat(self.path)
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _taken(self) -> _List:
        found = forms.read_list(content(self.path), self._authority, str(self.path))
        assert found.next_update_utc is not None  # read_list has looked
        return _List(
            revoked={entry.serial_number: entry.revocation_date_utc for entry in found},
            number=number_of(found),
            start=found.last_update_utc,
            end=found.next_update_utc,
        )


def number_of(found: x509.CertificateRevocationList) -> int:
    """Of the list; 0 if it has none."""
    try:
        return found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0
