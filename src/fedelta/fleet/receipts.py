"""What others have signed, kept: a line of JSON for each signature, and the certificates by which they are checked.

    signatures.jsonl      who has said what, and the signature
    signers/DIGEST.der    a certificate, by its SHA-256

A coordinator keeps what sites have replied, a site what the coordinator has broadcast: digests of it, not the tensors.
`read` checks every line, and needs nothing else than the two. Limits: whether a certificate was valid, and issued by
whom, is asked when its owner connects, and not here; lines that are missing are not noticed. What is written survives
the end of a process, and not a power cut.
"""

import base64
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.messages import Reply, Request
from fedelta.fleet import certificate_forms as forms
from fedelta.fleet import signatures

FILE, SIGNERS = "signatures.jsonl", "signers"
_LINE = 2**18  # bytes, more than a line has


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A signature that was checked."""

    time: datetime  # when it came
    signer: str  # the name in the certificate
    what: str  # "broadcast" or "reply"
    round: int


class Receipts:
    """Keeps signatures in a folder, which exists; without one, nowhere. To be used in one thread."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._signers: set[str] = set()
        if folder is not None and (path := folder / FILE).exists():
            with path.open("rb") as file:
                start = max(0, path.stat().st_size - _LINE)
                file.seek(start)
                last = file.read()
            if not last.endswith(b"\n"):  # torn by a crash
                os.truncate(path, start + last.rfind(b"\n") + 1)

    def broadcast(self, certificate: bytes, request: Request, run: str, shared: bytes, signature: bytes) -> None:
        """What a site was sent; `certificate`: DER, of the coordinator; `shared`: its digest. Raises OSError."""
        said = {"run": run, "op": request.op, "job": request.job, "round": request.round, "attempt": request.attempt}
        self._keep("broadcast", certificate, said | {"shared": shared.hex()}, signature)

    def reply(self, certificate: bytes, request: bytes, said: Reply, body: bytes, signature: bytes) -> None:
        """What a site has answered, and no failure; `request` and `body` are digests. Raises OSError."""
        plain = {"request": request.hex(), "answers": said.answers, "round": said.round, "body": body.hex()}
        self._keep("reply", certificate, plain, signature)

    def _keep(self, what: str, certificate: bytes, said: Mapping[str, object], signature: bytes) -> None:
        if self._folder is None:
            return
        by = hashlib.sha256(certificate).hexdigest()
        if by not in self._signers:
            (self._folder / SIGNERS).mkdir(exist_ok=True)
            (self._folder / SIGNERS / f"{by}.der").write_bytes(certificate)
            self._signers.add(by)
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "what": what, "by": by, "said": said}
        line["signature"] = base64.b64encode(signature).decode()
        content = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with (self._folder / FILE).open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(content) < len(content):  # or what comes next would be in the same line
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), FILE)


def read(folder: Path) -> Iterator[Receipt]:
    """What is kept in a folder, each line of which is checked; a last one that a crash has torn is left out.

    Raises BadInput for a line that is damaged, or whose signature does not hold.
    """
    path = folder / FILE
    if not path.exists():
        raise BadInput(f"there is no {path}; signatures are kept in the folder of a run over TLS")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    yield _checked(folder, json.loads(line))
                except (ValueError, TypeError, KeyError, AttributeError, OSError, BadTensors) as error:
                    own = isinstance(error, BadTensors | OSError)  # others are about what Python makes of the line
                    why = error if own else "it is not what serve and join write"
                    raise BadInput(f"line {number} of {path} does not hold: {why}") from None


def _checked(folder: Path, line: dict[str, Any]) -> Receipt:
    by, what, said = line["by"], line["what"], dict(line["said"])
    certificate = (folder / SIGNERS / f"{by}.der").read_bytes()
    if hashlib.sha256(certificate).hexdigest() != by:
        raise ValueError(f"{by}.der is another certificate")
    if what == "broadcast":
        shared = bytes.fromhex(said.pop("shared"))
        statement = signatures.broadcast(**said, shared=shared)
    elif what == "reply":
        reply = Reply(sender="", answers=said["answers"], round=int(said["round"]))
        statement = signatures.reply(bytes.fromhex(said["request"]), reply, bytes.fromhex(said["body"]))
    else:
        raise ValueError(f"{what!r} is neither a broadcast nor a reply")
    signatures.check(certificate, statement, base64.b64decode(line["signature"]))
    name = forms.common_name(x509.load_der_x509_certificate(certificate)) or by
    return Receipt(time=datetime.fromisoformat(line["time"]), signer=name, what=what, round=int(said["round"]))
