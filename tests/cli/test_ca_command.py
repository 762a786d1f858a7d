"""`fedelta ca` as its users type it: an authority, a coordinator, sites that make their own keys and others."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tests.cli.in_process import Fedelta, fedelta

from fedelta.cli.ca import command
from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.own_files import Party
from fedelta.fleet.revocations import Revocations

__all__ = ["fedelta"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_from_nothing_to_a_revoked_site(fedelta: Fedelta, here: Path) -> None:
    printed = fedelta("ca", "init", "--name", "The consortium")
    assert "The authority 'The consortium' is valid until" in printed
    assert files(here) == {"ca/ca.key", "ca/ca.pem", "ca/revoked.crl"}

    printed = fedelta("ca", "issue", "coordinator", "--host", "localhost", "--host", "127.0.0.1")
    assert "is a coordinator at localhost, 127.0.0.1, until" in printed
    assert files(here / "coordinator") == {"certificate.pem", "private.key", "ca.pem"}
    assert Party.read("coordinator", "coordinator").name == "coordinator"

    printed = fedelta("ca", "issue", "Zürich")
    named = set(re.findall(r"^  (\S+)", printed, flags=re.MULTILINE))
    assert named == {f"Zürich/{name}" for name in files(here / "Zürich")}
    assert len(named) == 5

    fedelta("ca", "request", "hospital-b", "--out", "own")
    printed = fedelta("ca", "issue", "hospital-b", "--request", "own/hospital-b.csr", "--days", 7)
    assert files(here / "hospital-b") == {"certificate.pem", "ca.pem"}
    for name in files(here / "hospital-b"):
        (here / "hospital-b" / name).rename(here / "own" / name)
    assert Party.read("own", "site").name == "hospital-b"

    revocations = Revocations("ca/revoked.crl")
    certificate = x509.load_pem_x509_certificate(Party.read("Zürich", "site").chain).public_bytes(Encoding.DER)
    assert revocations.refused("Zürich", certificate) is None
    assert "is revoked." in fedelta("ca", "revoke", "Zürich")
    assert "revoked since" in str(revocations.refused("Zürich", certificate))
    until = revocations.until
    assert "ca/revoked.crl is valid until" in fedelta("ca", "renew-list", "--days", 60)
    assert revocations.until > until

    lines = [" ".join(line.split()) for line in fedelta("ca", "show").splitlines()]
    assert "name purpose serial number until state" in lines
    day = r"\d{4}-\d\d-\d\d"
    for row in (
        rf"Zürich site [0-9a-f]{{16}} {day} revoked {day}",
        rf"hospital-b site [0-9a-f]{{16}} {day} valid",
        rf"coordinator coordinator at localhost, 127\.0\.0\.1 [0-9a-f]{{16}} {day} valid",
    ):
        assert any(re.fullmatch(row, line) for line in lines), row
    assert lines[0].startswith("The authority 'The consortium' is valid until")
    assert re.fullmatch(r"Its list of revoked certificates has 1 certificate, and is valid until .* UTC\.", lines[2])

    told = json.loads(fedelta("ca", "show", "ca", "--json"))
    authority = CertificateAuthority.open("ca")
    assert (told["name"], told["fingerprint"]) == (authority.name, authority.fingerprint)
    assert datetime.fromisoformat(told["list"]["end"]) == revocations.until
    revoked = {one["serial"]: one["revoked"] for one in told["issued"] if one["state"] == "revoked"}
    assert told["list"]["revoked"] == revoked
    assert {one["name"]: one["state"] for one in told["issued"]} == {
        "Zürich": "revoked",
        "hospital-b": "valid",
        "coordinator": "valid",
    }


def test_what_has_expired_is_shown_so(fedelta: Fedelta) -> None:
    fedelta("ca", "init")
    CertificateAuthority.open("ca").renew_list(days=1, now=datetime.now(UTC) - timedelta(days=2))
    assert "and HAS EXPIRED on" in fedelta("ca", "show")


def test_a_serial_number_from_the_list_can_be_revoked(fedelta: Fedelta) -> None:
    fedelta("ca", "init")
    fedelta("ca", "issue", "a", "--out", "first")
    fedelta("ca", "issue", "a", "--out", "second", "--renew")
    serial = re.findall(r"[0-9a-f]{16}", fedelta("ca", "show"))[0]
    fedelta("ca", "revoke", serial)
    states = [line.split()[4] for line in fedelta("ca", "show").splitlines() if line.startswith("a ")]
    assert sorted(states) == ["revoked", "valid"]


def test_what_is_wrong_is_one_line_and_changes_nothing(fedelta: Fedelta, here: Path) -> None:
    assert "there is no certificate authority in ca" in fedelta("ca", "issue", "a", status=2)
    fedelta("ca", "init")
    fedelta("ca", "issue", "a")
    before = {name: (here / name).read_bytes() for name in files(here)}
    wrong: list[tuple[list[str], str]] = [
        (["init"], "an authority is made once"),
        (["init", "--ca", "no/where"], "cannot be made: No such file or directory"),
        (["init", "--ca", "b", "--name", "a/b"], "has a path separator"),
        (["issue", "a"], "is there already|has a certificate until"),
        (["issue", "a", "--out", "b"], "has a certificate until"),
        (["issue", "ca"], "ca is there already"),
        (["issue", "../b"], "has a path separator"),
        (["issue", "b", "--host", "localhost:80"], "without a port"),
        (["issue", "b", "--days", "36500"], "its authority is until"),
        (["issue", "--request", "ca/ca.pem"], "no request in PEM"),
        (["issue", "--request", "none.csr"], "cannot be read: No such file"),
        (["issue", "b", "--ca", "a"], "no certificate authority in a"),
        (["request", "a"], "is there already"),
        (["request", "-- b"], "No such option|begins or ends"),
        (["revoke", "b"], "`fedelta ca show` shows all"),
        (["show", "a"], "no certificate authority in a"),
    ]
    for arguments, why in wrong:
        error = fedelta("ca", *arguments, status=2)
        assert re.search(why, error), error
        assert len(error.strip().splitlines()) == 1 or error.startswith("Usage:"), error
        assert {name: (here / name).read_bytes() for name in files(here)} == before
    assert "Missing argument 'NAME', or --request FILE." in fedelta("ca", "issue", status=2)


@pytest.mark.parametrize("name", [None, *command.commands])
def test_help_fits_a_terminal_and_explains_every_option(
    fedelta: Fedelta, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = fedelta("ca", *([] if name is None else [name]), "--help")
    assert max(map(len, printed.splitlines())) <= 80
    one = command if name is None else command.commands[name]
    options = [option for option in one.params if isinstance(option, click.Option)]
    assert all(option.help for option in options)
