"""The files by which a party is known: what it shows, what it keeps secret, and whom it trusts.

    certificate.pem   who it is; shown to the other side
    private.key       the key of that certificate; stays with the party
    ca.pem            the certificate of the authority that the other side's has to be from
    identity.key      at a site: signs for secure aggregation; stays with the site
    NAME.pub          its public half, for all other sites (`fedelta.identities` reads a folder of them)

Private keys are not encrypted: only their owner may read the files.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedelta.core.errors import BadInput, FedeltaWarning
from fedelta.core.keys import new_key
from fedelta.fleet import certificate_forms as forms

CERTIFICATE, PRIVATE, AUTHORITY, IDENTITY = "certificate.pem", "private.key", "ca.pem", "identity.key"
UNFINISHED = ".unfinished-"  # how the names of files and folders begin that are being written
_PURPOSES = {"site": ExtendedKeyUsageOID.CLIENT_AUTH, "coordinator": ExtendedKeyUsageOID.SERVER_AUTH}
_MOST = 2**24  # bytes of a file that is read: a list of revoked certificates may be long


@dataclass(frozen=True, kw_only=True)
class Party:
    """What a folder says of the party that it belongs to; the three in bytes are PEM, as TLS takes them."""

    name: str
    until: datetime  # when its certificate expires; in UTC
    root: bytes
    chain: bytes
    key: bytes = field(repr=False)
    identity: Path | None  # the file of its Ed25519 key, if it has one

    @classmethod
    def read(cls, folder: Path | str, purpose: Literal["site", "coordinator"], now: datetime | None = None) -> "Party":
        """Warns of keys that others may read.

        Raises BadInput if a file is missing or damaged, if they do not belong together or have expired, or if the
        certificate is not for that purpose.
        """
        folder, now = Path(folder), datetime.now(UTC) if now is None else now
        certificate = folder / CERTIFICATE
        root, chain, key = (content(folder / name) for name in (AUTHORITY, CERTIFICATE, PRIVATE))
        own = forms.read_certificate(chain, str(certificate))
        name = forms.common_name(own)
        if name is None:
            raise BadInput(f"{certificate} does not have exactly one common name; get one with `fedelta ca issue`")
        if _public_key(key, folder / PRIVATE) != own.public_key():
            raise BadInput(f"{folder / PRIVATE} is not the key of {certificate}; put together what belongs together")
        if not _issued_by_one(own, chain, root, folder):
            raise BadInput(f"{certificate} was not issued by {folder / AUTHORITY}; get both from one authority")
        if not forms.serves(own, _PURPOSES[purpose]):
            raise BadInput(f"{certificate} is not one of a {purpose}; make one with `fedelta ca issue`")
        if now > own.not_valid_after_utc:
            raise BadInput(
                f"{certificate} has expired on {forms.day(own.not_valid_after_utc)}; ask its authority for another"
            )
        for secret in (PRIVATE, IDENTITY):
            if readable_by_others(folder / secret):
                warnings.warn(f"others may read {folder / secret}; chmod 600 it", FedeltaWarning, stacklevel=2)
        identity = folder / IDENTITY
        return cls(
            name=name,
            until=own.not_valid_after_utc,
            root=root,
            chain=chain,
            key=key,
            identity=identity if identity.exists() else None,
        )


def new_request(name: str, folder: Path | str) -> Path:
    """Make a site's keys in a new folder, and a request for its certificate; returns the file of the request.

    What is sent to the authority is the request, NAME.csr; what other sites get is NAME.pub. Raises BadInput if the
    name cannot be one, or if the folder is there already or cannot be made.
    """
    name = forms.checked_name(name)
    key = generate_private_key(SECP256R1())
    with new_folder(Path(folder)) as unfinished:
        write_new(unfinished / PRIVATE, forms.key_text(key), secret=True)
        write_new(unfinished / f"{name}.csr", forms.new_request(name, key))
        add_identity(unfinished, name)
    return Path(folder) / f"{name}.csr"


def add_identity(folder: Path, name: str) -> None:
    """A new Ed25519 key for that site, and its public half."""
    new_key(folder / IDENTITY).rename(folder / f"{name}.pub")


def content(path: Path) -> bytes:
    """Of a file. Raises BadInput if it cannot be read, or is far too large."""
    try:
        with open(path, "rb") as file:
            found = file.read(_MOST + 1)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}; see `fedelta ca --help`") from error
    if len(found) > _MOST:
        raise BadInput(f"{path} has more than {_MOST} bytes; it is another file than is asked for")
    return found


def write_new(path: Path, text: bytes, *, secret: bool = False) -> None:
    """Durably, and never over another file, in a folder that is not in use yet; a secret one is for its owner alone."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise BadInput(f"{path} is there already; choose another name") from None


def put(path: Path, text: bytes) -> None:
    """A public file in a folder that is in use, durably: whoever reads it finds the old content or the new one."""
    unfinished = None
    try:
        descriptor, unfinished = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
        with open(descriptor, "wb") as file:
            file.write(text)
            os.fchmod(descriptor, 0o644)
            file.flush()
            os.fsync(descriptor)
        os.rename(unfinished, path)
        unfinished = None
        sync_folder(path.parent)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}; make room, or give the right to it") from error
    finally:
        if unfinished is not None:
            os.unlink(unfinished)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` when all is in it, and is gone after an error.

    Raises BadInput if something is there already, or if it cannot be made.
    """
    if not is_free(path):
        raise BadInput(f"{path} is there already; choose another folder, so that no key is lost")
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent))
    except OSError as error:
        raise BadInput(f"{path} cannot be made: {error.strerror}; choose a place that is there") from error
    try:
        yield unfinished
        os.rename(unfinished, path)  # fails if a folder is there by now that has something in it
        sync_folder(path.parent)
    except OSError as error:
        raise BadInput(f"{path} cannot be made: {error.strerror}; choose another place") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_free(path: Path) -> bool:
    """Whether a folder of that name can be made: nothing is there, or an empty one."""
    return not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable_by_others(path: Path) -> bool:
    """Whether somebody else than the owner may read or change the file; False if it is not there."""
    with suppress(FileNotFoundError):
        return bool(os.stat(path).st_mode & 0o077)
    return False


def _public_key(key: bytes, path: Path) -> object:
    """Of any kind of key: an organisation's own authority may take others than ours does."""
    try:
        return load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise BadInput(f"{path} is no private key in PEM without a password; see `fedelta ca`") from error


def _issued_by_one(own: x509.Certificate, chain: bytes, root: bytes, folder: Path) -> bool:
    try:
        above = [*x509.load_pem_x509_certificates(chain)[1:], *x509.load_pem_x509_certificates(root)]
    except ValueError as error:
        raise BadInput(
            f"{folder / AUTHORITY} is no certificate in PEM; it is the authority's, for everybody"
        ) from error
    for one in above:
        with suppress(*forms.DAMAGED, InvalidSignature):
            own.verify_directly_issued_by(one)
            return True
    return False
