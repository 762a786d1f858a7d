"""`fedelta signatures`: what others have signed is checked and counted."""

from pathlib import Path

from tests.cli.in_process import Fedelta, fedelta
from tests.fleet.remote_sites import issued

from fedelta.core.messages import Reply, Request
from fedelta.fleet import certificate_forms as forms
from fedelta.fleet import signatures
from fedelta.fleet.receipts import FILE, Receipts

__all__ = ["fedelta"]  # a fixture


def signed(folder: Path) -> None:
    """Three replies of a site, and a broadcast."""
    from cryptography.hazmat.primitives.serialization import Encoding

    own, digest = issued("north"), bytes(32)
    certificate = forms.read_certificate(own.chain, "").public_bytes(Encoding.DER)
    sign, kept = signatures.Signer(own.key), Receipts(folder)
    for round in (1, 2, 4):
        reply = Reply(sender="north", answers=f"/{round}/train/0/north", round=round)
        kept.reply(certificate, digest, reply, digest, sign(signatures.reply(digest, reply, digest)))
    request = Request(to="north", op="train", round=2)
    kept.broadcast(certificate, request, "r", digest, sign(signatures.broadcast("r", "train", "", 2, 0, digest)))


def test_signatures_are_checked_and_counted(fedelta: Fedelta, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    signed(tmp_path / "run")
    printed = fedelta("signatures", tmp_path)
    for text in ("4 signatures, and all of them hold.", "north broadcast 1 2 to 2", "north reply 3 1 to 4"):
        assert text in " ".join(printed.split())


def test_one_that_does_not_hold_is_an_error(fedelta: Fedelta, tmp_path: Path) -> None:
    signed(tmp_path)
    content = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(content.replace('"round":2', '"round":3', 1))
    assert "line 2 of" in fedelta("signatures", tmp_path, status=2)
    (tmp_path / FILE).unlink()
    assert "there are no signatures in" in fedelta("signatures", tmp_path, status=2)
