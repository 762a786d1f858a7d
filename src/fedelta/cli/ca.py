"""`fedelta ca`: a small certificate authority, so that a coordinator and its sites know each other in TLS."""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedelta.cli.tables import new_table, show_table
from fedelta.fleet import own_files
from fedelta.fleet.certificate_forms import checked_name, day, serial_text
from fedelta.fleet.certificates import (
    AUTHORITY_DAYS,
    CERTIFICATE,
    CERTIFICATE_DAYS,
    KEY,
    LIST_DAYS,
    REVOKED,
    CertificateAuthority,
    Issued,
)
from fedelta.observe.text import plural

_SHOWN_DIGITS = 16  # of a serial number in a table: enough to tell all from each other, and to revoke one by

_folder = click.option(
    "--ca",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    default="ca",
    show_default=True,
    help="The authority's folder.",
)


def _out(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        show_default="the party's name",
        help=help,
    )


def _days(default: int, what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--days",
        type=click.IntRange(1, 36500),
        metavar="N",
        default=default,
        show_default=True,
        help=f"How long {what} is valid.",
    )


@click.group(short_help="A small certificate authority: who may join a coordinator.")
def command() -> None:
    """A small certificate authority: who may join a coordinator, and which coordinator is the right one.

    Its files are in one folder, which belongs on the machine of whoever decides on that.
    """


@command.command(short_help="Begin an authority in a new folder.")
@_folder
@click.option("--name", metavar="NAME", default="", show_default="one that is drawn", help="Its name in certificates.")
@_days(AUTHORITY_DAYS, "its own certificate")
def init(folder: Path, name: str, days: int) -> None:
    """Begin an authority: its key, its certificate, and an empty list of revoked certificates."""
    authority = CertificateAuthority.create(folder, name=name, days=days)
    _say(f"The authority {authority.name!r} is valid until {day(authority.certificate.not_valid_after_utc)}.")
    _files(
        {
            folder / KEY: "its private key: whoever has it can let anybody in. It stays here.",
            folder / CERTIFICATE: "its certificate: everybody gets it",
            folder / REVOKED: f"what it has revoked: for the coordinator; renew it within {LIST_DAYS} days",
        }
    )
    _say(f"SHA-256 of its certificate: {authority.fingerprint}")


@command.command(short_help="Make a certificate for a site, or for a coordinator.")
@click.argument("name", required=False)
@click.option(
    "--host",
    "hosts",
    metavar="HOST",
    multiple=True,
    help="A host name or address at which sites reach it: makes it a coordinator. May be given again.",
)
@click.option(
    "--request",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Certify the key in this request, which its owner has made with `fedelta ca request`.",
)
@click.option("--renew", is_flag=True, help="Another certificate for a name that has one; its identity stays.")
@_days(CERTIFICATE_DAYS, "the certificate")
@_out("New folder for what the party is to get.")
@_folder
def issue(
    name: str | None,
    hosts: tuple[str, ...],
    request: Path | None,
    renew: bool,
    days: int,
    out: Path | None,
    folder: Path,
) -> None:
    """Make a certificate for the site NAME, or with --host for a coordinator, and a folder to hand over to it.

    With --request the name and the key are the request's, and NAME, if it is given, has to be the same. Without, the
    key is made here, and whoever carries the folder could keep a copy.
    """
    if name is None and request is None:
        raise click.UsageError("Missing argument 'NAME', or --request FILE.")
    authority = CertificateAuthority.open(folder)
    if request is not None:
        made = authority.answer(request, out, name=name, hosts=hosts, renew=renew, days=days)
    else:
        name = checked_name(name or "")
        made = authority.issue(name, out or Path(name), hosts=hosts, renew=renew, days=days)
    where = f" at {', '.join(made.hosts)}" if made.hosts else ""
    _say(f"{made.name!r} is a {made.purpose}{where}, until {day(made.end)}; serial number {made.serial}.")
    _handed_over(made.name, out or Path(made.name))


@command.command(short_help="Make a site's own keys, and a request for its certificate.")
@click.argument("name")
@_out("New folder for the site's keys and the request.")
def request(name: str, out: Path | None) -> None:
    """Make the keys of the site NAME, which stay there, and a request that its authority answers.

    The authority answers with `fedelta ca issue --request FILE`.
    """
    name = checked_name(name)
    file = own_files.new_request(name, out or Path(name))
    _say(f"Send {file} to the authority, and put the certificate.pem and the ca.pem that come back beside it.")
    _handed_over(name, file.parent)


@command.command(short_help="Revoke all certificates of a name, or one by its serial number.")
@click.argument("which", metavar="NAME|SERIAL")
@_days(LIST_DAYS, "the list of revoked certificates")
@_folder
def revoke(which: str, days: int, folder: Path) -> None:
    """Revoke all certificates of a name, or one by its serial number (8 or more of its first digits).

    It is the coordinator that refuses them: the list has to get to it. There is no way back but another certificate.
    """
    for serial in CertificateAuthority.open(folder).revoke(which, days=days):
        _say(f"{serial} is revoked.")
    _say(f"The coordinator refuses it as soon as it has the new {folder / REVOKED}; it need not be restarted.")


@command.command("renew-list", short_help="Sign the list of revoked certificates anew, before it expires.")
@_days(LIST_DAYS, "the list")
@_folder
def renew_list(days: int, folder: Path) -> None:
    """Sign the list of revoked certificates anew: a coordinator lets nobody in with a list that has expired."""
    end = CertificateAuthority.open(folder).renew_list(days=days)
    _say(f"{folder / REVOKED} is valid until {day(end)}; give it to the coordinator.")


@command.command(short_help="Show the authority, what it has issued, and what it has revoked.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="ca")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def show(folder: Path, as_json: bool) -> None:
    """Show the authority in FOLDER (ca, if none is given): until when it, its certificates and its list are valid."""
    authority = CertificateAuthority.open(folder)
    issued, revoked = authority.issued(), authority.revoked()
    start, end = authority.certificate.not_valid_before_utc, authority.certificate.not_valid_after_utc
    ends = revoked.next_update_utc
    assert ends is not None
    if as_json:
        plain = {
            "name": authority.name,
            "fingerprint": authority.fingerprint,
            "start": start,
            "end": end,
            "issued": [{**asdict(one), "state": one.state} for one in issued],
            "list": {
                "start": revoked.last_update_utc,
                "end": ends,
                "revoked": {serial_text(one.serial_number): one.revocation_date_utc for one in revoked},
            },
        }
        click.echo(json.dumps(plain, indent=1, default=datetime.isoformat))
        return
    now = datetime.now(UTC)
    _say(f"The authority {authority.name!r} {_lasting(end, now)}.")
    _say(f"SHA-256 of its certificate: {authority.fingerprint}")
    count = plural(len(revoked), "certificate")
    _say(f"Its list of revoked certificates has {count}, and {_lasting(ends, now)}.")
    if issued:
        _say("")
        show_table(Console(highlight=False), _table(issued))


def _lasting(end: datetime, now: datetime) -> str:
    return f"{'is valid until' if now <= end else 'HAS EXPIRED on'} {day(end)}"


def _table(issued: list[Issued]) -> Table:
    table = new_table("name", "purpose", "serial number", "until", "state", texts=5)
    for one in issued:
        purpose = f"{one.purpose} at {', '.join(one.hosts)}" if one.hosts else one.purpose
        since = f" {one.revoked:%Y-%m-%d}" if one.revoked is not None else ""
        table.add_row(
            escape(one.name), purpose, one.serial[:_SHOWN_DIGITS], f"{one.end:%Y-%m-%d}", f"{one.state}{since}"
        )
    return table


def _handed_over(name: str, out: Path) -> None:
    what = {
        own_files.CERTIFICATE: "its certificate",
        own_files.PRIVATE: "the key of that certificate: for it alone",
        own_files.AUTHORITY: "the authority's certificate: whom it trusts",
        own_files.IDENTITY: "signs for secure aggregation: for it alone",
        f"{name}.pub": "the public half of that: all other sites get it",
        f"{name}.csr": "the request: for the authority",
    }
    _files({out / file: meaning for file, meaning in what.items() if (out / file).exists()})


def _files(meaning: dict[Path, str]) -> None:
    wide = max(len(str(path)) for path in meaning)
    for path, text in meaning.items():
        _say(f"  {str(path).ljust(wide)}  {text}")


def _say(line: str) -> None:
    click.echo(line)
