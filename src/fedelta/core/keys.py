"""The Ed25519 keys (RFC 8032) with which ledgers and messages are signed, as PEM files.

A private key is not encrypted: only its owner may read the file, and whoever does can sign.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fedelta.core.errors import BadInput

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def new_key(path: Path | str) -> Path:
    """Write a new private key to `path`, which only its owner can read; returns the file of its public key beside it.

    Raises BadInput if one of the files is there already or cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    private = Ed25519PrivateKey.generate()
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    path = Path(path)
    beside = path.with_name(f"{path.name}.pub")
    if beside.exists():
        raise BadInput(f"{beside} is there already; choose another name, so that no key is lost")
    _write(path, secret, 0o600)
    _write(beside, public, 0o644)
    return beside


def private_key(key: "Path | str | Ed25519PrivateKey") -> "Ed25519PrivateKey":
    """The key, or the one in a PEM file. Raises BadInput if there is none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    found: object = key
    if isinstance(key, Path | str):
        try:
            found = load_pem_private_key(_content(key), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
            raise BadInput(f"{key} is no private key in PEM without a password; make one with new_key") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise BadInput(f"what signs is an Ed25519 private key, not {type(found).__name__}; see new_key")
    return found


def public_key(key: "Path | str | Ed25519PublicKey") -> "Ed25519PublicKey":
    """The key, or the one in a PEM file. Raises BadInput if there is none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found: object = key
    if isinstance(key, Path | str):
        try:
            found = load_pem_public_key(_content(key))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BadInput(f"{key} is no public key in PEM; it is the file with .pub beside the private key") from error
    if not isinstance(found, Ed25519PublicKey):
        raise BadInput(f"what checks is an Ed25519 public key, not {type(found).__name__}; see new_key")
    return found


def _content(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"the key {path} cannot be read: {error.strerror}; make one with new_key") from error


def _write(path: Path, content: bytes, mode: int) -> None:
    """Durably, and never over another file."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise BadInput(f"{path} is there already; choose another name, so that no key is lost") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}; choose a folder that is there") from error
