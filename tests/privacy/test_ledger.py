"""A ledger keeps what was recorded, whatever happens to the process, and shows what happened to the file."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core.children import started_quietly
from fedelta.core.errors import BadInput, BadLedger, BudgetSpent, FedeltaError
from fedelta.core.keys import new_key, private_key, public_key
from fedelta.core.release import Budget, Ledger, Limit, Release
from fedelta.privacy.accounting import epsilon
from fedelta.privacy.events import gaussian, poisson_gaussian, steps, without_replacement_gaussian
from fedelta.privacy.ledger import FileLedger, MemoryLedger, verify

FORMAT = b"fedelta privacy ledger 1\n"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key()
LIMIT = Limit(budget=Budget(epsilon=1.0, delta=1e-5), unit="site", of="a")


def release(round: int = 1, job: str = "job", noise: float = 10.0, of: str | None = "a") -> Release:
    return Release(event=gaussian(noise), unit="site", relation="replace_special", of=of, job=job, round=round)


def filled(path: Path, n: int = 3, key: Ed25519PrivateKey | None = KEY) -> FileLedger:
    ledger = FileLedger.open(path, key)
    for round in range(1, n + 1):
        ledger.record(release(round))
    return ledger


def rounds(ledger: Ledger) -> list[int]:
    return [found.round for found in ledger.releases()]


names = st.text(min_size=1, max_size=5)
noises = st.floats(1e-3, 1e3)
rates = st.floats(0, 1)
events = st.one_of(
    st.builds(gaussian, noises),
    st.builds(poisson_gaussian, rates, noises),
    st.builds(steps, rates, noises, st.integers(1, 10**6)),
    st.builds(without_replacement_gaussian, st.integers(1, 10), st.integers(10, 10**6), noises),
    st.builds(lambda *parts: {"composed": list(parts)}, st.builds(gaussian, noises), st.just({"no_op": {}})),
)
releases = st.builds(
    Release,
    event=events,
    unit=st.sampled_from(["site", "example"]),
    relation=st.sampled_from(["add_or_remove_one", "replace_one", "replace_special"]),
    of=st.none() | names,
    job=st.text(max_size=5),
    round=st.integers(0, 2**70),
)


@settings(max_examples=25, deadline=None)
@given(recorded=st.lists(releases, max_size=4), cut=st.integers(0, 4), signed=st.booleans())
def test_what_was_recorded_is_read_back(
    recorded: list[Release], cut: int, signed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    key = KEY if signed else None
    in_memory, first = MemoryLedger(), FileLedger.open(path, key)
    for release in recorded[:cut]:
        first.record(release)
    again = FileLedger.open(path, key, at_least=len(recorded[:cut]), includes=first.head)
    for release in recorded[cut:]:
        again.record(release)
    for release in recorded:
        in_memory.record(release)
    assert list(in_memory.releases()) == list(first.releases()) == list(again.releases()) == recorded
    assert verify(path, PUBLIC if signed else None, at_least=len(recorded), includes=again.head) == recorded
    assert first.head == again.head


def test_the_file_is_what_its_description_says(tmp_path: Path) -> None:
    """Read here with nothing but hashlib, json and the signature."""
    ledger = filled(tmp_path / "ledger")
    before = hashlib.sha256(FORMAT + PUBLIC.public_bytes_raw()).hexdigest()
    for number, line in enumerate((tmp_path / "ledger").read_bytes().splitlines(), start=1):
        plain = json.loads(line)
        assert (plain["number"], plain["before"]) == (number, before)
        assert plain["release"]["round"] == number
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", plain["time"])
        unsealed = line.replace(b',"seal":"' + plain["seal"].encode() + b'"', b"")
        PUBLIC.verify(bytes.fromhex(plain["seal"]), FORMAT + unsealed)
        with pytest.raises(InvalidSignature):
            OTHER.public_key().verify(bytes.fromhex(plain["seal"]), FORMAT + unsealed)
        before = hashlib.sha256(line).hexdigest()
    assert number == 3
    assert ledger.head == before


def test_what_a_caller_changes_later_is_not_changed_in_a_ledger(tmp_path: Path) -> None:
    for ledger in (MemoryLedger(), FileLedger.open(tmp_path / "ledger", None)):
        event = gaussian(2.0)
        ledger.record(Release(event=event, unit="site", relation="replace_one"))
        event["gaussian"] = {"noise_multiplier": 1e6}
        assert ledger.releases()[0].event == gaussian(2.0)


# Durability


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """What each file held when it was last synced, and the names that a folder had."""
    found: dict[str, bytes] = {}
    really = os.fsync

    def fsync(file: int) -> None:
        really(file)
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        found[str(path)] = repr(sorted(os.listdir(path))).encode() if path.is_dir() else path.read_bytes()

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_a_record_is_on_the_disk_when_it_returns(tmp_path: Path, synced: dict[str, bytes]) -> None:
    path = tmp_path / "ledger"
    ledger = FileLedger.open(path, KEY)
    assert b"'ledger'" in synced[str(tmp_path)]
    for round in range(1, 4):
        ledger.record(release(round))
        assert synced[str(path)] == path.read_bytes()
        assert synced[str(path)].count(b"\n") == round
    with path.open("ab") as file:
        file.write(b'{"number":4,')
    ledger.record(release(4))
    assert synced[str(path)] == path.read_bytes()
    assert len(verify(path, PUBLIC)) == 4


def start(function: Any, *arguments: object) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    with started_quietly():
        process.start()
    return process


def sent(pipe: Connection) -> Iterator[bytes]:
    """All that a process that has ended had sent."""
    with pipe, suppress(EOFError):
        while True:
            yield pipe.recv_bytes()


def record_forever(path: Path, pipe: Connection) -> None:
    ledger = FileLedger.open(path, KEY)
    done = len(ledger.releases())
    while True:
        done += 1
        ledger.record(release(done))
        pipe.send_bytes(b"%d" % done)


def test_a_process_that_is_killed_loses_no_release_that_was_recorded(tmp_path: Path) -> None:
    """As when what was released has left just after `record` returned."""
    path, moments = tmp_path / "ledger", random.Random(1)
    released = 0
    for _ in range(10):
        receiving, sending = multiprocessing.Pipe(duplex=False)
        process = start(record_forever, path, sending)
        sending.close()
        receiving.poll(None)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        for message in sent(receiving):
            released = int(message)
        found = verify(path, PUBLIC, at_least=released)
        assert [release.round for release in found] == list(range(1, len(found) + 1))
        assert len(found) <= released + 1
    assert released >= 10


class Killed:
    """Ends this process with SIGKILL after its k-th call that touches the file."""

    def __init__(self, k: int) -> None:
        self.left = k

    def __call__(self, frame: object, event: str, function: Any) -> None:
        if event == "c_return" and function.__name__ in ("open", "flock", "ftruncate", "write", "fsync"):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), 9)


def record_and_be_killed(path: Path, k: int, pipe: Connection) -> None:
    ledger = FileLedger.open(path, KEY)
    sys.setprofile(Killed(k))
    ledger.record(release(3))
    sys.setprofile(None)
    pipe.send_bytes(b"released")


def test_a_process_that_is_killed_after_any_call(tmp_path: Path) -> None:
    filled(tmp_path / "before", 2)
    content = (tmp_path / "before").read_bytes() + b'{"number":3,"bef'
    for k in range(1, 20):
        path = tmp_path / f"{k}"
        path.write_bytes(content)
        receiving, sending = multiprocessing.Pipe(duplex=False)
        process = start(record_and_be_killed, path, k, sending)
        sending.close()
        process.join()
        released = list(sent(receiving)) == [b"released"]
        assert released == (process.exitcode == 0)
        ledger = FileLedger.open(path, KEY, at_least=3 if released else 2)
        ledger.record(release(4))
        assert rounds(ledger) in ([1, 2, 3, 4], [1, 2, 4])
        assert len(verify(path, PUBLIC)) == len(rounds(ledger))
        if released:
            assert k > 6  # opened, locked, cut, synced, written, synced, and let go
            return
    raise AssertionError("no record was finished")


def test_a_torn_line_is_no_release_and_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    filled(path, 2)
    two = path.read_bytes()
    filled_three = FileLedger.open(path, KEY)
    filled_three.record(release(3))
    three = path.read_bytes()
    for size in [*range(len(two), len(three), 11), len(three) - 2, len(three) - 1]:
        path.write_bytes(three[:size])
        ledger = FileLedger.open(path, KEY)
        assert rounds(ledger) == [1, 2]
        assert path.read_bytes() == three[:size]  # reading changes nothing
        ledger.record(release(7))
        assert [found.round for found in verify(path, PUBLIC)] == [1, 2, 7]
    path.write_bytes(two + bytes(100))  # what some file systems leave after a power cut
    assert rounds(FileLedger.open(path, KEY)) == [1, 2]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "ledger"
    ledger, really = filled(path, 2), getattr(os, call)
    content, head = path.read_bytes(), ledger.head

    def full(file: int, content: bytes = b"") -> int:
        if call == "fsync":
            raise OSError(5, "Input/output error")
        return int(os.pwrite(file, content[:20], 0))  # O_APPEND: at the end, whatever the place

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(FedeltaError, match=r"cannot be written: .*; nothing was recorded: mend that before"):
            ledger.record(release(3))
    assert getattr(os, call) is really
    assert path.read_bytes() == content
    assert (rounds(ledger), ledger.head) == ([1, 2], head)
    ledger.record(release(3))
    assert len(verify(path, PUBLIC)) == 3


# Sharing


def record_some(ledger: FileLedger | Path, job: str, n: int) -> None:
    if isinstance(ledger, Path):
        ledger = FileLedger.open(ledger, KEY)
    for round in range(1, n + 1):
        ledger.record(release(round, job))


def test_processes_and_threads_that_share_a_file_leave_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    inherited = FileLedger.open(path, KEY)
    processes = [
        start(record_some, path, "a", 40),
        start(record_some, path, "b", 40),
        start(record_some, inherited, "c", 40),
        start(record_some, inherited, "d", 40),
    ]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(record_some, [inherited, inherited], "ef", [40, 40]))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = verify(path, PUBLIC, at_least=240, includes=inherited.head)
    assert list(inherited.releases()) == found
    for job in "abcdef":
        assert [release.round for release in found if release.job == job] == list(range(1, 41))


def spent(n: int) -> float:
    return epsilon([release()] * n, delta=1e-5, unit="site", of="a")


def test_jobs_that_share_the_data_share_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    one, two = (FileLedger.open(path, KEY, LIMIT) for _ in range(2))
    recorded = 0
    while spent(recorded + 1) <= 1:
        (one, two)[recorded % 2].record(release(recorded))
        recorded += 1
    content = path.read_bytes()
    assert content.count(b"\n") == recorded > 2
    text = (
        f"bring epsilon for each site from {spent(recorded):.4g} to {spent(recorded + 1):.4g} at delta 1e-05, and the"
    )
    with pytest.raises(BudgetSpent, match=re.escape(text)):
        (one, two)[recorded % 2].record(release(recorded))
    for ledger in (one, two, FileLedger.open(path, KEY, LIMIT)):
        with pytest.raises(BudgetSpent, match="stop here, or have the owner of the data raise it"):
            ledger.record(release(99, "another job"))
    assert path.read_bytes() == content
    FileLedger.open(path, KEY, LIMIT).record(release(of="b"))  # another site's data
    in_memory = MemoryLedger(LIMIT)
    for round in range(recorded):
        in_memory.record(release(round))
    with pytest.raises(BudgetSpent):
        in_memory.record(release())
    assert len(in_memory.releases()) == recorded


# Damage


def refused(path: Path, key: Ed25519PrivateKey | None = KEY) -> bool:
    """By an officer, and by who would go on with it."""
    count = 0
    for attempt in (lambda: verify(path, key and key.public_key()), lambda: FileLedger.open(path, key)):
        try:
            attempt()
        except BadLedger:
            count += 1
    assert count in (0, 2)
    return count == 2


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    """A ledger of two lines, signed or not."""
    folder = tmp_path_factory.mktemp("small")
    for signed in (True, False):
        filled(folder / f"{signed}", 2, KEY if signed else None)
    return {signed: (folder / f"{signed}").read_bytes() for signed in (True, False)}


@pytest.mark.parametrize("signed", [True, False])
def test_every_altered_byte_is_noticed(small: dict[bool, bytes], tmp_path: Path, signed: bool) -> None:
    content, path, key = small[signed], tmp_path / "ledger", KEY if signed else None
    for place in range(len(content)):  # each bit of a byte in turn
        altered = bytearray(content)
        altered[place] ^= 1 << place % 8
        path.write_bytes(altered)
        assert refused(path, key), f"byte {place}: {content[place : place + 1]!r} became {altered[place : place + 1]!r}"


@settings(max_examples=150, deadline=None)
@given(data=st.data(), signed=st.booleans())
def test_any_altered_bytes_are_noticed(
    small: dict[bool, bytes], data: st.DataObject, signed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, key = tmp_path_factory.getbasetemp() / "altered", KEY if signed else None
    altered = bytearray(small[signed])
    for place in data.draw(st.lists(st.integers(0, len(altered) - 1), min_size=1, max_size=3, unique=True)):
        altered[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(altered)
    if altered.endswith(b"\n"):
        assert refused(path, key)
    else:  # the last newline and more, as if the last line was torn
        assert refused(path, key) or len(verify(path, key and PUBLIC)) < 2


@pytest.mark.parametrize(
    ("order", "line"),
    [
        ([1, 2, 3], 1),
        ([0, 2, 3], 2),
        ([0, 1, 3], 3),
        ([0, 2, 1, 3], 2),
        ([0, 0, 1, 2, 3], 2),
        ([0, 1, 1, 2, 3], 3),
        ([3, 2, 1, 0], 1),
        ([0, 1, 2, 3, 3], 5),
        ([0, 1, 2, 3, 0], 5),
    ],
)
def test_lines_removed_added_or_moved_are_noticed(tmp_path: Path, order: list[int], line: int) -> None:
    path = tmp_path / "ledger"
    filled(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[place] for place in order))
    assert refused(path)
    with pytest.raises(
        BadLedger, match=rf"^line {line} of .*ledger does not .*; put back a copy that has all lines, or"
    ):
        verify(path, PUBLIC)


def test_lines_of_another_ledger_or_none_are_noticed(tmp_path: Path) -> None:
    path, other = tmp_path / "ledger", tmp_path / "other"
    filled(path, 2)
    filled(other, 3, OTHER)
    mine, strange = (file.read_bytes().splitlines(keepends=True) for file in (path, other))
    for lines in ([*mine, strange[2]], [mine[0], strange[1]], strange, [*mine, b"\n"], [b"\n", *mine], [b"{}\n"]):
        path.write_bytes(b"".join(lines))
        assert refused(path)


def test_a_chain_that_was_computed_anew_without_the_key_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    for key, forger in ((KEY, OTHER), (KEY, None), (None, KEY)):
        path.unlink(missing_ok=True)
        filled(path, 3, forger)
        assert refused(path, key)
    first_of_mine = tmp_path / "mine"
    filled(first_of_mine, 1)
    start = hashlib.sha256(first_of_mine.read_bytes()[:-1]).hexdigest()
    for forger in (OTHER, None):
        path.write_bytes(first_of_mine.read_bytes() + sealed(forger, number=2, before=start))
        assert refused(path)
    path.write_bytes(first_of_mine.read_bytes() + sealed(KEY, number=2, before=start))
    assert not refused(path)


def test_what_is_missing_at_the_end_is_noticed_by_who_knows_how_far_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = filled(path, 3)
    heads = [hashlib.sha256(line).hexdigest() for line in path.read_bytes().splitlines()]
    assert heads[-1] == ledger.head
    for count, head in enumerate(heads, start=1):  # also when more has been recorded since
        assert len(verify(path, PUBLIC, at_least=count, includes=head)) == 3
        assert rounds(FileLedger.open(path, KEY, at_least=count, includes=head)) == [1, 2, 3]
    content = path.read_bytes()
    two = content[: content[:-1].rindex(b"\n") + 1]
    for cut, left in ((two, 2), (content[:-1], 2), (b"", 0)):
        path.write_bytes(cut)
        assert len(verify(path, PUBLIC)) == left  # the chain alone cannot know
        with pytest.raises(BadLedger, match=rf"ledger has {left} releases and must have at least 3; put back"):
            verify(path, PUBLIC, at_least=3)
        with pytest.raises(BadLedger, match="has no line with the hash"):
            verify(path, PUBLIC, includes=heads[-1])
        with pytest.raises(BadLedger, match="must have at least 3"):
            FileLedger.open(path, KEY, at_least=3)
        with pytest.raises(BadLedger, match="has no line with the hash"):
            FileLedger.open(path, KEY, includes=heads[-1])
        with pytest.raises(BadLedger, match="has become shorter"):
            ledger.record(release(4))
        path.write_bytes(content)
        assert rounds(ledger) == [1, 2, 3]


def test_a_ledger_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = filled(path, 1)
    path.unlink()
    for attempt in (
        lambda: ledger.record(release(2)),
        ledger.releases,
        lambda: FileLedger.open(path, KEY, at_least=1),
        lambda: FileLedger.open(path, KEY, includes=ledger.head),
        lambda: verify(path, PUBLIC),
    ):
        with pytest.raises(BadLedger, match=r"there is no ledger .*ledger; put back a copy"):
            attempt()
    assert not path.exists()


def test_a_place_where_no_ledger_can_be(tmp_path: Path) -> None:
    with pytest.raises(BadLedger, match="cannot be begun: No such file or directory; choose a folder that is there"):
        FileLedger.open(tmp_path / "none" / "ledger", KEY)
    with pytest.raises(BadLedger, match="cannot be opened: Is a directory"):
        verify(tmp_path, PUBLIC)


# Content


def sealed(
    key: Ed25519PrivateKey | None, *, number: object = 1, before: object = None, time: object = None, **other: object
) -> bytes:
    """A line with the seal of `key`, whatever is in it."""
    plain: dict[str, object] = {
        "number": number,
        "before": before or hashlib.sha256(FORMAT + (key.public_key().public_bytes_raw() if key else b"")).hexdigest(),
        "time": time or "2026-11-22T10:00:00.000000+00:00",
        "release": {
            "event": gaussian(1.0),
            "unit": "site",
            "relation": "replace_one",
            "of": None,
            "job": "",
            "round": 0,
        },
    }
    return seal(json.dumps({**plain, **other}, separators=(",", ":")).encode(), key)


def seal(body: bytes, key: Ed25519PrivateKey | None) -> bytes:
    seal = key.sign(FORMAT + body) if key else hashlib.sha256(FORMAT + body).digest()
    return body[:-1] + b',"seal":"' + seal.hex().encode() + b'"}\n'


FIELDS = {"event": gaussian(1.0), "unit": "site", "relation": "replace_one", "of": None, "job": "", "round": 0}
BAD_FIELDS: list[dict[str, Any]] = [
    {"event": {"laplace": {"noise_multiplier": 1.0}}},
    {"event": {"gaussian": {"noise_multiplier": -1.0}}},
    {"event": [1]},
    {"event": {}},
    {"unit": "row"},
    {"unit": None},
    {"relation": "other"},
    {"of": ""},
    {"of": 3},
    {"job": None},
    {"round": -1},
    {"round": 1.0},
    {"round": True},
]


def test_a_line_that_is_signed_and_right_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    for key in (KEY, None):
        path.write_bytes(sealed(key))
        assert verify(path, key and PUBLIC) == [Release(**FIELDS)]
        assert not refused(path, key)


@pytest.mark.parametrize("wrong", BAD_FIELDS, ids=str)
def test_what_is_no_release_is_neither_read_nor_recorded(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(sealed(KEY, release={**FIELDS, **wrong}))
    assert refused(path)
    path.write_bytes(b"")
    for ledger in (MemoryLedger(), FileLedger.open(path, KEY)):
        with pytest.raises(BadInput):
            ledger.record(Release(**{**FIELDS, **wrong}))
        assert len(ledger.releases()) == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("number", [float("nan"), {1.0}, 1j])
def test_an_event_that_is_no_json_is_not_recorded(tmp_path: Path, number: Any) -> None:
    ledger = FileLedger.open(tmp_path / "ledger", None)
    with pytest.raises(BadInput, match="a release must consist of plain JSON values"):
        ledger.record(Release(**{**FIELDS, "event": {"gaussian": {"noise_multiplier": number}}}))
    assert (tmp_path / "ledger").read_bytes() == b""


def test_an_event_with_tuples_is_not_recorded() -> None:
    event: dict[str, Any] = {"composed": (gaussian(1.0),)}
    with pytest.raises(BadInput, match="plain JSON values, with lists and no tuples"):
        MemoryLedger().record(Release(**{**FIELDS, "event": event}))
    MemoryLedger().record(Release(**{**FIELDS, "event": MappingProxyType({"composed": [gaussian(1.0)]})}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": 2},
        {"number": 1.0},
        {"number": True},
        {"number": "1"},
        {"before": "0" * 64},
        {"before": 0.5},
        {"time": "2026-11-22T10:00:00+00:00"},
        {"time": "2026-11-22T10:00:00.000000+01:00"},
        {"time": "2026-11-22T10:00:00.000000"},
        {"time": 17},
        {"more": 1},
        {"release": {**FIELDS, "more": 1}},
        {"release": {name: value for name, value in FIELDS.items() if name != "of"}},
        {"release": dict(reversed(FIELDS.items()))},
        {"release": [FIELDS]},
    ],
    ids=str,
)
def test_a_signed_line_of_another_form_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(sealed(KEY, **wrong))
    assert refused(path)


def test_signed_json_in_another_spelling_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    body = sealed(KEY).partition(b',"seal"')[0] + b"}"
    path.write_bytes(seal(body, KEY))
    assert not refused(path)
    for old, new in (
        (b'"round":0', b'"round": 0'),
        (b'"round":0', b'"round":5,"round":0'),
        (b'"round":0', b'"round":00'),
        (b'"round":0', b'"round":' + b"[" * 100_000),
        (b'"site"', b'"\\u0073ite"'),
        (b'"site"', b'"s\xff"'),
        (b'{"number"', b'{ "number"'),
    ):
        assert old in body
        path.write_bytes(seal(body.replace(old, new), KEY))
        assert refused(path)
    path.write_bytes(seal(body, KEY).replace(b"\n", b"\r\n"))
    assert refused(path)
    line = seal(body, KEY)
    path.write_bytes(line[:-131] + line[-131:-3].upper() + line[-3:])
    assert refused(path)


# Keys


def test_keys_in_files_and_as_objects_are_the_same(tmp_path: Path) -> None:
    public = new_key(tmp_path / "key")
    assert public == tmp_path / "key.pub"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    filled(tmp_path / "ledger", 1, private_key(tmp_path / "key"))
    assert rounds(FileLedger.open(tmp_path / "ledger", str(tmp_path / "key"))) == [1]
    assert len(verify(tmp_path / "ledger", public)) == len(verify(str(tmp_path / "ledger"), public_key(public))) == 1
    with pytest.raises(BadLedger, match=r"line 1 of .* was altered, or is not signed with this key"):
        verify(tmp_path / "ledger", OTHER.public_key())


def test_keys_are_not_written_over(tmp_path: Path) -> None:
    new_key(tmp_path / "key")
    content = (tmp_path / "key").read_bytes()
    with pytest.raises(BadInput, match=r"key\.pub is there already; choose another name"):
        new_key(tmp_path / "key")
    (tmp_path / "key.pub").unlink()
    with pytest.raises(BadInput, match=r"key is there already; choose another name"):
        new_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == content
    with pytest.raises(BadInput, match=r"cannot be written: No such file or directory"):
        new_key(tmp_path / "none" / "key")


def test_what_is_no_key_is_said_in_one_sentence(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    public, form = new_key(tmp_path / "key"), (Encoding.PEM, PrivateFormat.PKCS8)
    (tmp_path / "locked").write_bytes(KEY.private_bytes(*form, BestAvailableEncryption(b"secret")))
    (tmp_path / "other").write_bytes(X25519PrivateKey.generate().private_bytes(*form, NoEncryption()))
    (tmp_path / "text").write_text("no key")
    for name in ("locked", "text", public.name):
        with pytest.raises(
            BadInput, match=rf"{name} is no private key in PEM without a password; make one with new_key"
        ):
            FileLedger.open(tmp_path / "ledger", tmp_path / name)
    with pytest.raises(BadInput, match="what signs is an Ed25519 private key, not X25519PrivateKey"):
        FileLedger.open(tmp_path / "ledger", tmp_path / "other")
    with pytest.raises(
        BadInput, match=r"the key .*none cannot be read: No such file or directory; make one with new_key"
    ):
        FileLedger.open(tmp_path / "ledger", tmp_path / "none")
    assert not (tmp_path / "ledger").exists()
    filled(tmp_path / "ledger", 1)
    with pytest.raises(
        BadInput, match=r"key is no public key in PEM; it is the file with \.pub beside the private key"
    ):
        verify(tmp_path / "ledger", tmp_path / "key")
