"""A coordinator and its sites in one process, over TLS on a loopback address, and an authority that certifies them."""

import datetime
import functools
import ipaddress
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedelta.core.program import Program
from fedelta.fleet.limits import Limits
from fedelta.fleet.member import Member, Patience
from fedelta.fleet.remote import Remote
from fedelta.fleet.wire import Credentials

PATIENCE_S = 120.0  # for what has to happen, on a machine that is busy with much else
QUICK = Patience(first_pause_s=0.05, longest_pause_s=0.2, connect_s=PATIENCE_S)
_DAYS = datetime.timedelta(days=1)


class Authority:
    """Issues certificates on the P-256 curve that are valid for a day."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self._certificate = self._signed(self._name, self._key, x509.BasicConstraints(ca=True, path_length=0))
        self.root = self._certificate.public_bytes(Encoding.PEM)

    def issue(self, name: str) -> Credentials:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        chain = self._signed(subject, key, x509.BasicConstraints(ca=False, path_length=None), here)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Credentials(root=self.root, chain=chain.public_bytes(Encoding.PEM), key=pem)

    def _signed(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *more: x509.ExtensionType) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - _DAYS).not_valid_after(now + _DAYS)
        for extension in more:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self._key, hashes.SHA256())


@functools.cache
def authority() -> Authority:
    return Authority()


@functools.cache
def issued(name: str) -> Credentials:
    return authority().issue(name)


def until(condition: Callable[[], object]) -> None:
    """Wait for what has to come about."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)


def coordinator(program: Program[Any], names: Sequence[str], **options: Any) -> Remote:
    settings: dict[str, Any] = {"listen": "127.0.0.1:0", "credentials": issued("coordinator"), "limits": Limits()}
    return Remote(program, names, **(settings | options))


@contextmanager
def site(
    program: Program[Any], load: Callable[[str], object], name: str, port: int, **options: Any
) -> Iterator["Running"]:
    settings: dict[str, Any] = {"at": f"127.0.0.1:{port}", "credentials": issued(name), "patience": QUICK}
    running = Running(Member(program, load, name, **(settings | options)))
    try:
        yield running
    finally:
        running.end()


class Running:
    """A member in a thread."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.outcome: object = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self.member.run()
        except Exception as error:
            self.outcome = error

    def result(self) -> object:
        """What `run` returned or raised, once it is over by itself."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.outcome

    def end(self) -> None:
        self.member.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@contextmanager
def far(program: Program[Any], load: Callable[[str], object], names: Sequence[str], **options: Any) -> Iterator[Remote]:
    """A coordinator, and all of its sites."""
    with coordinator(program, names, **options) as fleet:
        members = [
            Member(program, load, name, at=f"127.0.0.1:{fleet.port}", credentials=issued(name), patience=QUICK)
            for name in names
        ]
        running = [Running(member) for member in members]
        try:
            assert fleet.wait_for(len(names), PATIENCE_S)
            yield fleet
        finally:
            for one in running:
                one.end()
