"""What a coordinator knows of its sites: what is written, what survives, and who is shut out."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core.digest import digest
from fedelta.core.errors import BadInput, FedeltaError, Refused
from fedelta.core.messages import Reply, Request
from fedelta.fleet import frames_pb2 as frames
from fedelta.fleet import registry as registry_module
from fedelta.fleet.attendance import Attendance
from fedelta.fleet.known_sites import KnownSite, Turns
from fedelta.fleet.limits import Limits
from fedelta.fleet.registry import DATABASE, LockedRegistry, Registry
from fedelta.fleet.wire import METHOD, PROTOCOL, frame, versions
from fleet_program import Play, load
from remote_sites import PATIENCE_S, coordinator, issued, site, until

NAN = "its number is NaN"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / DATABASE, quarantine_after=3) as found:
        found.begin(["a", "b"])
        yield found


def known(registry: Registry, name: str) -> KnownSite:
    return next(one for one in registry.sites() if one.name == name)


def refused(number: int, name: str = "b") -> Turns:
    return Turns(number=number, counted=["a"], absent={name: NAN}, refused=[name])


def der(name: str) -> bytes:
    return x509.load_pem_x509_certificate(issued(name).chain).public_bytes(Encoding.DER)


def test_it_has_who_was_seen_with_which_certificate_and_in_which_rounds(opened: Registry) -> None:
    before, certificate = datetime.now(UTC) - timedelta(seconds=1), der("a")
    opened.joined("a", certificate)
    opened.left("a")
    opened.joined("a", certificate)
    opened.committed(Turns(number=1, counted=["a"], absent={"b": "it has not been connected"}, state="5f"))
    a, b = opened.sites()
    assert (a.name, a.here, a.streams, a.counted, a.failures) == ("a", True, 2, 1, 0)
    assert a.first_seen is not None
    assert a.last_seen is not None
    assert before < a.first_seen <= a.last_seen
    own = x509.load_der_x509_certificate(certificate)
    assert a.expires == own.not_valid_after_utc
    assert a.fingerprint == own.fingerprint(SHA256()).hex()
    assert (b.name, b.here, b.first_seen, b.streams, b.counted, b.failures) == ("b", False, None, 0, 0, 0)
    assert opened.rounds() == [Turns(number=1, counted=("a",), absent={"b": "it has not been connected"}, state="5f")]
    assert [(event.site, event.what) for event in opened.events(9)] == [("a", "joined"), ("a", "left"), ("a", "joined")]
    opened.begin(["a", "b", "c"])
    assert [(one.name, one.here) for one in opened.sites()] == [("a", False), ("b", False), ("c", False)]


def test_an_event_that_repeats_is_counted_and_old_ones_go(opened: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        opened.note("refused", "x", "it is not registered")
    opened.note("refused", "y", "it is not registered")
    assert [(one.site, one.times) for one in opened.events(9)] == [("x", 3), ("y", 1)]
    assert [one.site for one in opened.events(9, "y")] == ["y"]
    monkeypatch.setattr(registry_module, "_EVENTS", 5)
    for number in range(12):
        opened.note("refused", f"{number}", "it is not registered")
    assert [one.site for one in opened.events(99)] == ["7", "8", "9", "10", "11"]


def test_failures_in_a_row_put_a_site_in_quarantine_and_absences_do_not(opened: Registry) -> None:
    for number in (1, 2):
        opened.committed(refused(number))
    opened.committed(Turns(number=3, counted=["a"], absent={"b": "it did not answer within 5 s"}))
    assert known(opened, "b").failures == 2
    opened.committed(Turns(number=4, counted=["a", "b"]))
    assert known(opened, "b").failures == 0
    for number in (5, 6):
        opened.committed(refused(number))
    assert opened.quarantined() == {}
    opened.broke("b", "a chunk came that belongs to no reply")
    found = opened.quarantined()["b"]
    assert "failed 3 times in a row" in found.why
    assert "a chunk came that belongs to no reply" in found.why
    assert opened.quarantined().keys() == {"b"}
    told = found.told("b")
    assert "--readmit b" in told
    assert "is in quarantine since 2" in told
    since = found.since
    opened.committed(refused(7))
    assert opened.quarantined()["b"].since == since


def test_where_the_updates_of_most_sites_cannot_be_used_it_is_not_their_fault(opened: Registry) -> None:
    both = {"b": NAN, "c": NAN}
    for number in range(1, 5):
        opened.committed(Turns(number=number, counted=["a"], absent=both, refused=["b", "c"]))
    assert opened.quarantined() == {}
    assert [known(opened, name).failures for name in "abc"] == [0, 0, 0]
    assert [event.what for event in opened.events(9)] == ["update refused"] * 2  # four times each
    for number in range(5, 8):
        opened.committed(Turns(number=number, counted=["a", "d"], absent=both, refused=["b", "c"]))
    assert opened.quarantined().keys() == {"b", "c"}


def test_a_quarantine_outlasts_the_process_until_an_operator_ends_it(opened: Registry) -> None:
    for number in (1, 2, 3):
        opened.committed(refused(number))
    assert opened.quarantined()["b"].why == f"It has failed 3 times in a row, the last in round 3: {NAN}"
    opened.close()
    with Registry(opened.path, quarantine_after=3) as again:
        assert not again.fresh
        again.begin(["a", "b"])
        assert again.follow([refused(1), refused(2), refused(3)]) == (0, 0)
        assert again.quarantined().keys() == {"b"}
        again.readmit("b")
        assert (again.quarantined(), known(again, "b").failures) == ({}, 0)
        again.quarantine("a", "By the operator: its owner asked for it")
        assert again.quarantined()["a"].why == "By the operator: its owner asked for it"
        said = [(event.site, event.what) for event in again.events(3)]
        assert said == [("b", "quarantined"), ("b", "readmitted"), ("a", "quarantined")]
        for wrong, why in [
            (lambda: again.readmit("b"), "not in quarantine"),
            (lambda: again.quarantine("a", "twice"), "in quarantine already"),
            (lambda: again.readmit("nobody"), "'nobody' is not among the sites"),
        ]:
            with pytest.raises(BadInput, match=why):
                wrong()


def test_with_zero_nobody_is_put_there_by_itself(tmp_path: Path) -> None:
    with Registry(tmp_path / DATABASE) as found:
        for number in range(9):
            found.committed(refused(number))
        assert (found.quarantined(), known(found, "b").failures) == ({}, 9)
    with pytest.raises(BadInput, match="-1"):
        Registry(tmp_path / DATABASE, quarantine_after=-1)


@settings(max_examples=25, deadline=None)
@given(here=st.sets(st.integers(0, 8)), there=st.sets(st.integers(0, 8)), other=st.sets(st.integers(0, 8)))
def test_it_follows_the_rounds_that_are_committed(
    tmp_path_factory: pytest.TempPathFactory, here: set[int], there: set[int], other: set[int]
) -> None:
    """Whatever is in the two; `other` are rounds in which they differ."""
    with Registry(tmp_path_factory.mktemp("run") / DATABASE) as found:
        for number in here:
            absent = {"a": "it was away"} if number in other else {}
            found.committed(Turns(number=number, counted=["b"], absent=absent))
        rounds = [Turns(number=number, counted=["b"]) for number in sorted(there)]
        assert found.follow(rounds) == (len(here - there), len(there - here))
        assert [(one.number, one.counted, one.absent) for one in found.rounds()] == [
            (number, ("b",), {}) for number in sorted(there)
        ]
        assert found.follow(rounds) == (0, 0)
        assert sum(one.counted for one in found.sites() if one.name == "b") in (0, len(there))


KILLED = """
import os, sys
from pathlib import Path
from fedelta.fleet.known_sites import Turns
from fedelta.fleet.registry import Registry
folder = Path(sys.argv[1])
with Registry(folder / "coordinator.sqlite", quarantine_after=3) as found, open(folder / "rounds", "ab", 0) as rounds:
    for number in range(1, 100000):
        rounds.write(b"%d\\n" % number)
        found.committed(Turns(number=number, counted=["a"], absent={"b": "away"}))
"""


@pytest.mark.parametrize("lines", [3, 40])
def test_after_a_kill_it_lacks_one_round_at_most_and_has_it_once_it_follows(tmp_path: Path, lines: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    rounds = tmp_path / "rounds"
    while not rounds.exists() or rounds.read_bytes().count(b"\n") < lines:
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    last = rounds.read_bytes().count(b"\n")
    found, told = Registry.beside(tmp_path, quarantine_after=3)
    with found:
        assert told is None
        assert found.rounds()[-1].number in (last - 1, last)
        over, added = found.follow([Turns(number=n, counted=["a"], absent={"b": "away"}) for n in range(1, last + 1)])
        assert over == 0
        assert added <= 1
        assert known(found, "a").counted == last


@pytest.mark.parametrize("damage", ["another file", "cut", "a page"])
def test_a_damaged_one_is_kept_aside_and_made_again_from_the_rounds(tmp_path: Path, damage: str) -> None:
    path, rounds = tmp_path / DATABASE, [refused(number) for number in range(1, 200)]
    with Registry(path, quarantine_after=3) as found:
        found.follow(rounds)
    whole = path.read_bytes()
    wrong = {"another file": b"not a database" * 99, "cut": whole[:9000], "a page": whole[:4096] + b"x" * 20000}[damage]
    path.write_bytes(wrong)
    with pytest.raises(BadInput, match=DATABASE):
        Registry(path)
    for number in (1, 2):
        found, told = Registry.beside(tmp_path, quarantine_after=3)
        aside = tmp_path / f"coordinator.damaged-{number}.sqlite"
        assert told is not None
        assert aside.name in told
        assert aside.read_bytes() == wrong
        with found:
            assert found.fresh
            assert found.follow(rounds) == (0, 199)
            assert known(found, "a").counted == 199
            assert found.quarantined().keys() == {"b"}
        path.write_bytes(wrong)


def test_one_that_is_made_again_takes_who_counted_later_for_readmitted(tmp_path: Path) -> None:
    rounds = [*map(refused, (1, 2, 3)), Turns(number=4, counted=["a", "b"])]
    found, told = Registry.beside(tmp_path, quarantine_after=3)
    with found:
        assert told is None
        assert found.follow(rounds) == (0, 4)
        assert found.quarantined() == {}


def test_another_database_is_not_taken_for_one(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / DATABASE) as other:
        other.execute("CREATE TABLE sites (name)")
    other.close()
    with pytest.raises(BadInput, match="not a coordinator's database"):
        Registry(tmp_path / DATABASE)


def test_one_of_another_version_is_left_alone(tmp_path: Path, opened: Registry) -> None:
    opened.close()
    with sqlite3.connect(tmp_path / DATABASE) as other:
        other.execute("PRAGMA user_version = 2")
    other.close()
    with pytest.raises(BadInput, match="another version"):
        Registry.beside(tmp_path)
    assert not list(tmp_path.glob("*damaged*"))


def test_a_full_disk_is_one_sentence_and_nothing_is_half_written(opened: Registry) -> None:
    opened.committed(Turns(number=1, counted=["a", "b"]))
    pages = opened._database.execute("PRAGMA page_count").fetchone()[0]
    opened._database.execute(f"PRAGMA max_page_count = {pages}")
    large = Turns(number=2, counted=["a"], absent={f"site-{n}": "away" * 90 for n in range(500)})
    with pytest.raises(FedeltaError, match=r"coordinator\.sqlite cannot be used: database or disk is full.*--resume"):
        opened.committed(large)
    assert [one.number for one in opened.rounds()] == [1]
    opened._database.execute("PRAGMA max_page_count = 100000")
    opened.committed(large)
    assert [one.number for one in opened.rounds()] == [1, 2]


# While a coordinator runs


def test_what_cannot_be_written_ends_the_run_at_its_next_round(opened: Registry) -> None:
    pages = opened._database.execute("PRAGMA page_count").fetchone()[0]
    opened._database.execute(f"PRAGMA max_page_count = {pages}")
    with Attendance(opened) as attendance:
        for number in range(300):
            attendance.tell("refused", f"{number}", "why" * 100)
        with pytest.raises(FedeltaError, match="disk is full"):
            attendance.committed(Turns(number=1, counted=["a"]))
        with pytest.raises(FedeltaError, match="disk is full"):
            attendance.committed(Turns(number=2, counted=["a"]))


def test_one_that_is_locked_is_waited_for_and_nothing_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / DATABASE
    with Registry(path, busy_s=0.05) as operator, ThreadPoolExecutor(1) as pool:
        with Registry(path) as found:
            found.begin(["a", "b"])
        with (
            closing(sqlite3.connect(path, isolation_level=None)) as other,
            Attendance(Registry(path, busy_s=0.05)) as own,
        ):
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LockedRegistry, match=r"another process has locked .*coordinator\.sqlite; end it"):
                operator.quarantine("a", "why")
            own.tell("joined", "a")
            written = pool.submit(own.committed, Turns(number=1, counted=["a"], absent={"b": "away"}))
            until(lambda: caplog.text.count("it is waited for") > 2)
            assert not written.done()
            other.execute("ROLLBACK")
            written.result(PATIENCE_S)
            own.committed(Turns(number=2, counted=["a", "b"]))
        assert [one.number for one in operator.rounds()] == [1, 2]
        assert [(one.what, one.times) for one in operator.events(9)] == [("joined", 1)]


def test_one_that_stays_locked_does_not_keep_a_coordinator_from_ending_and_a_resume_mends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, turns = tmp_path / DATABASE, Turns(number=1, counted=["a"])
    own = Attendance(Registry(path, busy_s=0.05))
    with closing(sqlite3.connect(path, isolation_level=None)) as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN IMMEDIATE")
        written = pool.submit(own.committed, turns)
        until(lambda: "it is waited for" in caplog.text)
        own.close()
        with pytest.raises(LockedRegistry):
            written.result(PATIENCE_S)
    with Registry(path) as again:
        assert again.follow([turns]) == (0, 1)


def test_a_site_in_quarantine_is_told_why_and_its_requests_fail_at_once_until_it_is_readmitted(tmp_path: Path) -> None:
    program, path = Play(), tmp_path / DATABASE
    limits = Limits(absence_s=3600, deadline_s=3600)
    with (
        Attendance(Registry(path)) as attendance,
        coordinator(program, ("amber", "birch"), register=attendance, limits=limits) as fleet,
        site(program, load, "birch", fleet.port),
        site(program, load, "amber", fleet.port) as amber,
        Registry(path) as operator,
    ):
        assert fleet.wait_for(2, PATIENCE_S)
        until(lambda: {one.name for one in operator.sites() if one.here} == {"amber", "birch"})
        operator.quarantine("amber", "By the operator: it is under repair")
        until(lambda: attendance.barred("amber"))
        outcome = amber.result()
        assert isinstance(outcome, Refused)
        assert "it is under repair" in str(outcome)
        assert "--readmit amber" in str(outcome)
        for to in ("amber", "birch"):
            fleet.submit(Request(to=to, op="echo", round=1))
        replies = [fleet.next_reply(PATIENCE_S), fleet.next_reply(PATIENCE_S)]
        failed = {reply.sender: reply.error for reply in replies if isinstance(reply, Reply)}
        assert failed["birch"] is None
        assert "it is under repair" in str(failed["amber"])
        until(lambda: operator.events(1, "amber")[0].what == "left")  # the stream ends a moment after the site
        with site(program, load, "amber", fleet.port) as again:
            assert isinstance(again.result(), Refused)
        until(lambda: operator.events(1, "amber")[0].what == "refused")  # it is written a moment later
        operator.readmit("amber")
        until(lambda: attendance.barred("amber") is None)
        with site(program, load, "amber", fleet.port):
            fleet.submit(Request(to="amber", op="echo", round=2))
            reply = fleet.next_reply(PATIENCE_S)
            assert isinstance(reply, Reply)
            assert reply.error is None
    with Registry(path) as after:
        own = [event.what for event in after.events(99, "amber")]
    assert own == ["joined", "quarantined", "shut out", "left", "refused", "readmitted", "joined", "left"]


def test_a_site_that_breaks_the_protocol_is_put_in_quarantine(tmp_path: Path) -> None:
    program = Play()
    own = issued("amber")
    with (
        Attendance(Registry(tmp_path / DATABASE, quarantine_after=2)) as attendance,
        coordinator(program, ("amber", "birch"), register=attendance, limits=Limits(faults=99)) as fleet,
    ):
        credentials = grpc.ssl_channel_credentials(own.root, own.key, own.chain)
        hello = frames.Hello(protocol=PROTOCOL, name="amber", experiment=digest(program), versions=versions())
        for _ in range(2):
            with grpc.secure_channel(f"127.0.0.1:{fleet.port}", credentials) as channel:
                call = channel.stream_stream(METHOD)(iter([frame(hello), b"\x99 what no site sends"]))
                list(call)
        until(lambda: attendance.barred("amber"))
        with site(program, load, "amber", fleet.port) as amber:
            outcome = amber.result()
        assert isinstance(outcome, Refused)
        assert "failed 2 times in a row" in str(outcome)
        assert "unknown kind 153" in str(outcome)
        assert attendance.barred("birch") is None
