"""Certificates and lists of revoked ones that end soon: a warning in time, and not again and again."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.cli.test_serve import Processes
from tests.ports import free_port

from fedelta.cli.expiry import Expiry, Paper
from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.revocations import Revocations

START = datetime(2026, 1, 1, tzinfo=UTC)
PAPER = Paper(what="a pass", start=START, end=START + timedelta(days=100), cure="get another")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.end()


def test_each_is_warned_of_in_its_last_tenth_in_its_last_hundredth_and_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    papers = [PAPER]
    expiry = Expiry([lambda: papers[-1]])
    told = []
    for day in (0.0, 89.9, 90.0, 91.0, 98.9, 99.0, 99.5, 100.0, 101.0):
        before = len(caplog.records)
        expiry.look(START + timedelta(days=day))
        told += [day] * (len(caplog.records) - before)
    assert told == [90.0, 99.0, 100.0]
    assert [record.getMessage() for record in caplog.records] == [
        f"a pass {ends} on 2026-04-11 00:00 UTC; get another" for ends in ("ends", "ends", "has ended")
    ]
    papers.append(Paper(what="a pass", start=START, end=START + timedelta(days=1000), cure="get another"))
    expiry.look(START + timedelta(days=101))  # it was renewed
    expiry.look(START + timedelta(days=900))
    assert len(caplog.records) == 4


def test_a_list_that_is_renewed_is_looked_at_as_it_is(tmp_path: Path) -> None:
    authority, now = CertificateAuthority.create(tmp_path / "ca"), datetime.now(UTC)
    revocations = Revocations(tmp_path / "ca" / "revoked.crl")
    assert Paper.revoked(revocations).warned(now) == 0
    authority.renew_list(days=10, now=now - timedelta(days=9.5))
    assert Paper.revoked(revocations).warned(now) == 1
    authority.renew_list(days=10)
    assert Paper.revoked(revocations).warned(now) == 0


def test_serve_and_join_warn_as_they_begin(processes: Processes) -> None:
    folder, old = processes.folder, datetime.now(UTC) - timedelta(days=28)
    authority = CertificateAuthority.create(folder / "ca")
    for name in ("a", "b"):
        authority.issue(name, out=folder / name, days=30, start=old if name == "a" else None)
    authority.issue("coordinator", hosts=["127.0.0.1"], out=folder / "coordinator")
    authority.renew_list(days=30, now=old)
    port = free_port()
    serve = ["serve", "experiment.py", "--listen", f"127.0.0.1:{port}", "--certificates", "coordinator"]
    serving = processes("serve", *serve, "--revoked", "ca/revoked.crl")
    for name in ("a", "b"):
        processes(name, "join", "experiment.py", "--at", f"127.0.0.1:{port}", "--certificates", name, may_read=name)
    assert serving.wait(300) == 0, processes.said("serve")
    assert processes.said("serve").count("revoked.crl, without which nobody is let in, ends on") == 1
    assert "coordinator/certificate.pem" not in processes.said("serve")
    for name, one in zip(("a", "b"), processes.running[1:], strict=True):
        assert one.wait(300) == 0, processes.said(name)
        warned = f"{name}/certificate.pem ends on" in processes.said(name)
        assert warned == (name == "a")
