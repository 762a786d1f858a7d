"""Worker processes: what dies, what is left behind, and what is shared."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from fedelta.core.errors import BadInput, UnsoundCombination
from fedelta.core.messages import Replies, Reply, Request, Requests
from fedelta.fleet.workers import SiteBug, WorkerDidNotStart, Workers
from fleet_program import NAMES, Play, load

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process, no zombie and no open descriptor after any test here."""
    resource_tracker.ensure_running()  # Python's own helper, which the first "spawn" starts and keeps
    before = descriptors()
    yield
    assert not multiprocessing.active_children()
    assert descriptors() <= before


def descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.exists() else 0


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something that has to happen has happened; five minutes are far more than it takes."""
    for _ in range(30000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def gone(process: int) -> bool:
    """Whether a process has ended; an orphan that nobody has reaped yet counts as ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def ask(fleet: Workers, to: str, op: str, attempt: int = 0, **meta: str | int) -> Reply:
    fleet.submit(Request(to=to, op=op, round=1, attempt=attempt, meta=meta))
    reply = fleet.next_reply()
    assert reply is not None
    return reply


def homes(fleet: Workers, attempt: int = 0, names: Sequence[str] = NAMES) -> dict[str, int]:
    """Which process each site was handled by."""
    for name in names:
        fleet.submit(Request(to=name, op="whoami", round=1, attempt=attempt))
    found: dict[str, int] = {}
    while (reply := fleet.next_reply()) is not None:
        found[reply.sender] = int(str(reply.meta["pid"]))
    return found


def begun(folder: Path) -> list[str]:
    """Which sites have begun, in their order."""
    file = folder / "begun"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def gate(fleet: Workers, folder: Path, *names: str, round: int = 1) -> None:
    """Let each of these sites begin, and none end before its file is there."""
    for name in names:
        fleet.submit(Request(to=name, op="gate", round=round, meta={"folder": str(folder)}))
    assert fleet.next_reply(0) is None


def opened(fleet: Workers, folder: Path, name: str) -> int:
    """Let this site end, and no other; the process that it was in."""
    (folder / name).touch()
    reply = fleet.next_reply()
    assert reply.sender == name
    (folder / name).unlink()
    return int(reply.meta["pid"])


def test_each_worker_has_a_site_and_no_site_waits_for_its_worker(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=2) as fleet:
        gate(fleet, tmp_path, "amber", "birch")
        eventually(lambda: len(begun(tmp_path)) == 2)
        one = opened(fleet, tmp_path, "amber")
        other = opened(fleet, tmp_path, "birch")
        assert len({one, other, os.getpid()}) == 3
        names = {"cedar", "dune", "birch"}
        gate(fleet, tmp_path, *names, round=2)
        eventually(lambda: len(begun(tmp_path)) == 4)
        assert fleet.next_reply(0) is None
        first, second = begun(tmp_path)[2:]
        (third,) = names - {first, second}  # waits for the worker that is free first, wherever its site was before
        free = opened(fleet, tmp_path, first)
        eventually(lambda: begun(tmp_path)[4:] == [third])
        opened(fleet, tmp_path, second)
        assert opened(fleet, tmp_path, third) == free
        gate(fleet, tmp_path, first, third, round=3)  # both were last at the same worker: the other one takes one
        eventually(lambda: len(begun(tmp_path)) == 7)
        assert {opened(fleet, tmp_path, first), opened(fleet, tmp_path, third)} == {one, other}


def test_requests_of_one_site_do_not_overlap_though_workers_are_idle(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=3) as fleet:
        gate(fleet, tmp_path, "amber")
        gate(fleet, tmp_path, "amber", round=2)
        fleet.submit_many(Requests(to=("birch", "amber"), op="echo", round=3), 2)
        fleet.submit(Request(to="birch", op="echo", round=4))
        fleet.submit(Request(to="cedar", op="echo", round=5))
        assert fleet.next_reply().round == 5  # the others wait for amber, one for the other
        assert fleet.next_reply(0.05) is None
        eventually(lambda: bool(begun(tmp_path)))
        assert begun(tmp_path) == ["amber"]
        (tmp_path / "amber").touch()
        assert [fleet.next_reply().round for _ in range(4)] == [1, 2, 3, 4]


def test_the_longest_is_begun_first(tmp_path: Path) -> None:
    def rest(round: int, *names: str, seconds: float = 0) -> float:
        """How long it was until all had answered."""
        began = time.monotonic()
        for name in names:
            meta = {"folder": str(tmp_path), "seconds": seconds}
            fleet.submit(Request(to=name, op="rest", round=round, meta=meta))
        while fleet.next_reply() is not None:
            pass
        return time.monotonic() - began

    with Workers(Play(), load, NAMES, workers=1) as fleet:
        rest(1, "cedar", seconds=2 * rest(1, "amber", "birch", "dune"))  # longer than each of them, on any machine
        rest(2, *NAMES[:4])
    assert begun(tmp_path)[:4] == ["amber", "birch", "dune", "cedar"]
    assert begun(tmp_path)[4] == "cedar"


def test_parts_are_spread_over_the_workers(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=2) as fleet:
        requests = Requests(to=NAMES[:4], op="gate", round=1, job=str(tmp_path))
        fleet.submit_many(requests, 2)
        assert fleet.next_reply(0) is None
        eventually(lambda: sorted(begun(tmp_path)) == ["amber", "cedar"])
        (tmp_path / "cedar").touch()
        assert fleet.next_reply().senders == ["cedar", "dune"]
        fleet.cancel(requests.id)
        assert fleet.next_reply() is None  # the part that runs is no longer awaited


def test_memory_moves_with_its_site(tmp_path: Path) -> None:
    """Each worker goes on with what the others have left, also after one was killed."""
    with Workers(Play(), load, NAMES, workers=3) as fleet:
        places = set()
        for round in range(1, 7):
            busy = NAMES[1 + round % 2]  # takes a worker, so that amber goes to another one
            gate(fleet, tmp_path, busy, round=round)
            eventually(lambda round=round: len(begun(tmp_path)) == round)  # type: ignore[misc]
            fleet.submit(Request(to="amber", op="count", round=round, base=round - 1 if round > 1 else -1))
            assert fleet.next_reply().body["asked"] == round
            reply = ask(fleet, "amber", "whoami", round)
            places.add(reply.meta["pid"])
            opened(fleet, tmp_path, busy)
            if round == 3:
                os.kill(int(str(reply.meta["pid"])), signal.SIGKILL)
        assert len(places) > 1


def test_memory_lies_in_one_folder_that_goes_with_the_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = "a/../\ud800 " + "long" * 100  # no file could have it
    with Workers(Play(), load, [name, "b"], workers=2) as fleet:
        homes(fleet, names=[name, "b"])
        (folder,) = tmp_path.iterdir()
        assert not [*folder.iterdir()]  # a site that keeps nothing has none
        fleet.submit(Request(to=name, op="count", round=1))
        assert fleet.next_reply().error is None
        assert len([*folder.iterdir()]) == 1
    assert not [*tmp_path.iterdir()]
    dropped = Workers(Play(), load, NAMES, workers=1)
    del dropped
    gc.collect()
    eventually(lambda: not [*tmp_path.iterdir()])


def test_scratch_that_lies_in_two_processes_cannot_be_had_in_one_part(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=2) as fleet:
        gate(fleet, tmp_path, "cedar")
        eventually(lambda: begun(tmp_path) == ["cedar"])
        fleet.submit(Request(to="amber", op="count", round=2))
        assert fleet.next_reply().error is None
        opened(fleet, tmp_path, "cedar")
        fleet.submit(Request(to="amber", op="gate", round=2, meta={"folder": str(tmp_path)}))
        assert fleet.next_reply(0) is None
        eventually(lambda: begun(tmp_path) == ["cedar", "amber"])
        fleet.submit(Request(to="birch", op="count", round=2))
        assert fleet.next_reply().error is None
        opened(fleet, tmp_path, "amber")
        fleet.submit_many(Requests(to=("amber", "birch"), op="count", round=2), 2)
        with pytest.raises(SiteBug, match="ask them in the same parts as before"):
            fleet.next_reply()
        assert fleet.next_reply() is None
        tried = {}
        for name in ("amber", "birch"):
            fleet.submit_many(Requests(to=(name,), op="count", round=2), 2)
            tried |= {key: int(x) for key, x in fleet.next_reply().body.items() if "tried" in key}
        assert tried == {"amber/tried": 2, "birch/tried": 2}


def test_a_part_whose_worker_is_killed_is_tried_again(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=2) as fleet:
        for times in (1, 9):
            folder = tmp_path / str(times)
            folder.mkdir()
            fleet.submit_many(Requests(to=NAMES[:3], op="die", round=1, job=f"{times} {folder}"), 3)
            replies = fleet.next_reply()
            assert isinstance(replies, Replies)
            said = dict.fromkeys(NAMES[:3], "its worker process died (signal 9) twice")
            assert (replies.senders, replies.errors) == ([*NAMES[:3]], {}) if times == 1 else ((), said)
            assert fleet.next_reply() is None
            assert len((folder / "deaths").read_text()) == min(times, 2)


def test_there_are_no_more_workers_than_sites() -> None:
    with Workers(Play(), load, NAMES[:2], workers=7):
        assert len(multiprocessing.active_children()) == 2


def test_close_ends_busy_workers_and_may_be_repeated(tmp_path: Path) -> None:
    fleet = Workers(Play(), load, NAMES, workers=2)
    for name in NAMES:
        fleet.submit(Request(to=name, op="wait", round=1, meta={"folder": str(tmp_path)}))
    assert fleet.next_reply(0) is None  # only this begins what was submitted
    eventually(lambda: (tmp_path / "begun").exists())
    fleet.close()
    fleet.close()
    assert fleet.next_reply() is None
    with pytest.raises(RuntimeError, match="closed"):
        fleet.submit(Request(to="amber", op="echo", round=2))


def test_close_ends_idle_workers_whose_pipes_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may have a copy of the coordinator's ends, so that the workers see no end of file."""
    killed = []
    kill = BaseProcess.kill
    monkeypatch.setattr("fedelta.fleet.process._PATIENCE_S", 120.0)
    monkeypatch.setattr(BaseProcess, "kill", lambda process: (killed.append(process.pid), kill(process)))
    fleet = Workers(Play(), load, NAMES, workers=2)
    homes(fleet)
    copies = [os.dup(worker.pipe.fileno()) for worker in fleet._workers]
    fleet.close()
    for copy in copies:
        os.close(copy)
    assert not killed


@linux
def test_a_fleet_that_is_dropped_ends_its_workers_while_a_newer_one_is_open() -> None:
    older = Workers(Play(), load, NAMES, workers=2)
    pids = set(homes(older).values())
    with Workers(Play(), load, NAMES, workers=2) as newer:
        homes(newer)
        del older
        gc.collect()
        eventually(lambda: all(gone(pid) for pid in pids))
        assert len(homes(newer, attempt=1)) == len(NAMES)


def test_other_systems_are_told_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BadInput, match=r"needs Linux and this is 'darwin'; use Local \(--workers 0\)"):
        Workers(Play(), load, NAMES, workers=1)


def test_a_fleet_that_is_dropped_ends_its_workers() -> None:
    fleet = Workers(Play(), load, NAMES, workers=3)
    assert len(homes(fleet)) == len(NAMES)
    del fleet
    gc.collect()
    eventually(lambda: not multiprocessing.active_children())


def test_a_reply_is_valid_after_close() -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        fleet.submit(Request(to="amber", op="echo", round=1, body={"x": torch.ones(1000)}))
        reply = fleet.next_reply()
    assert reply is not None
    assert reply.body["x"].eq(1).all()


def test_a_timeout_gives_none_and_the_reply_comes_later(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        fleet.submit(Request(to="amber", op="wait", round=1, meta={"folder": str(tmp_path)}))
        assert fleet.next_reply(0) is None
        assert fleet.next_reply(0.05) is None
        (tmp_path / "go").touch()
        reply = fleet.next_reply()
        assert reply is not None
        assert reply.sender == "amber"


def test_the_reply_of_a_cancelled_running_request_is_dropped(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        requests = [
            Request(to="amber", op="wait", round=1, attempt=attempt, meta={"folder": str(tmp_path)})
            for attempt in range(4)
        ]
        for request in requests:
            fleet.submit(request)
        assert fleet.next_reply(0) is None
        eventually((tmp_path / "begun").exists)
        for request in requests[:3]:  # one runs, and the others wait for it
            fleet.cancel(request.id)
        (tmp_path / "go").touch()
        reply = fleet.next_reply()
        assert reply is not None
        assert reply.answers == requests[3].id
        assert fleet.next_reply() is None
        assert len((tmp_path / "begun").read_text().splitlines()) == 2


def test_what_a_worker_has_ahead_can_be_withdrawn(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        requests = [Request(to=to, op="wait", round=1, meta={"folder": str(tmp_path)}) for to in NAMES[:4]]
        for request in requests:
            fleet.submit(request)
        assert fleet.next_reply(0) is None
        eventually((tmp_path / "begun").exists)
        assert [len(worker.busy) for worker in fleet._workers] == [2]
        for request in requests[:3]:  # one runs, one is at the worker, one is in the queue
            fleet.cancel(request.id)
        (tmp_path / "go").touch()
        reply = fleet.next_reply()
        assert reply is not None
        assert reply.answers == requests[3].id
        assert fleet.next_reply() is None
        assert begun(tmp_path) == ["amber", "dune"]


def test_a_cancelled_reply_that_has_arrived_is_dropped() -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        for name in NAMES[:3]:
            fleet.submit(Request(to=name, op="echo", round=1))
        assert fleet.next_reply() is not None
        for name in NAMES[1:3]:
            fleet.cancel(Request(to=name, op="echo", round=1).id)
        assert fleet.next_reply() is None


def test_a_killed_worker_is_replaced_and_the_request_tried_again(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=2) as fleet:
        before = {worker.process.pid for worker in fleet._workers}
        for name in NAMES:
            op = "die" if name == "amber" else "whoami"
            fleet.submit(Request(to=name, op=op, round=2, meta={"folder": str(tmp_path), "times": 1}))
        after: dict[str, Reply] = {}
        while (reply := fleet.next_reply()) is not None:
            after[reply.sender] = reply
        assert set(after) == set(NAMES)
        assert all(reply.error is None for reply in after.values())
        processes = {worker.process.pid for worker in fleet._workers}
        assert len(processes) == 2
        assert len(processes & before) == 1


def test_a_request_that_kills_twice_fails_and_the_others_do_not(tmp_path: Path) -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        for name in NAMES[:4]:
            op = "die" if name == "birch" else "echo"
            body = {"x": torch.full((5,), 3.0)}
            fleet.submit(Request(to=name, op=op, round=1, body=body, meta={"folder": str(tmp_path), "times": 9}))
        replies: dict[str, Reply] = {}
        while (reply := fleet.next_reply()) is not None:
            replies[reply.sender] = reply
        assert replies.pop("birch").error == "its worker process died (signal 9) twice"
        assert set(replies) == {"amber", "cedar", "dune"}
        assert all(reply.body["x"].eq(3).all() for reply in replies.values())
        assert (tmp_path / "deaths").read_text() == "xx"


def test_an_idle_worker_that_is_killed_costs_nobody_a_try() -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        for attempt in range(3):
            process = int(str(ask(fleet, "amber", "whoami", attempt).meta["pid"]))
            os.kill(process, signal.SIGKILL)
            eventually(lambda process=process: gone(process))  # type: ignore[misc]
        assert ask(fleet, "amber", "whoami", 3).error is None


def test_a_worker_killed_again_and_again_loses_no_block(tmp_path: Path) -> None:
    """Each request is answered although its worker was killed, and what it sent does not change."""
    with Workers(Play(), load, NAMES, workers=2) as fleet:
        for round in range(5):
            shared = {"x": torch.full((5000,), float(round))}
            folder = tmp_path / str(round)
            folder.mkdir()
            for name in NAMES[:4]:
                fleet.submit(Request(to=name, op="echo", round=round, shared=shared))
            meta = {"folder": str(folder), "times": 1}
            fleet.submit(Request(to="elm", op="die", round=round, shared=shared, meta=meta))
            replies = []
            while (reply := fleet.next_reply()) is not None:
                replies.append(reply)
            assert len(replies) == 5
            echoes = [reply.body["shared/x"] for reply in replies if reply.sender != "elm"]
            assert all(x.eq(round).all() for x in echoes)


def test_a_bug_carries_the_site_and_the_workers_traceback() -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        with pytest.raises(
            SiteBug, match=r"(?s)site 'cedar'.*Traceback.*in bug.*KeyError: 'not what was meant'"
        ) as caught:
            ask(fleet, "cedar", "bug")
        assert caught.value.sites == ("cedar",)
        with pytest.raises(SiteBug, match="SystemExit: 3"):
            ask(fleet, "cedar", "leave")
        assert ask(fleet, "cedar", "echo").error is None


@linux
def test_a_broadcast_is_one_block_for_all_workers_and_used_again() -> None:
    places = []
    with Workers(Play(), load, NAMES, workers=3) as fleet:
        for round in range(4):
            shared = {"a": torch.full((100_000,), float(round)), "b": torch.ones(3)}
            for name in NAMES:
                fleet.submit(Request(to=name, op="map", round=round, shared=shared, body={"own": torch.ones(9)}))
            while (reply := fleet.next_reply()) is not None:
                assert reply.meta["a"] == reply.meta["b"] != reply.meta["own"]
                places.append(reply.meta["a"])
    assert len(places) == 20
    assert len(set(places)) == 1


@linux
def test_no_memory_has_a_name() -> None:
    """Nothing in /dev/shm, so nothing is left there, whoever is killed."""
    with Workers(Play(), load, NAMES, workers=2) as fleet:
        processes = {os.getpid(), *homes(fleet).values()}
        shared = {"x": torch.ones(100_000)}
        for name in NAMES[:4]:
            fleet.submit(Request(to=name, op="echo", round=2, shared=shared))
        reply = fleet.next_reply()
        assert reply is not None
        assert reply.body["shared/x"].eq(1).all()
        for process in processes:
            maps = Path(f"/proc/{process}/maps").read_text()
            assert "memfd:fedelta" in maps
            # a semaphore of whatever else this process has done may be there
            assert not [line for line in maps.splitlines() if "/dev/shm" in line and "/sem." not in line]


@linux
def test_two_broadcasts_that_are_both_outstanding_are_two_blocks() -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        expected = {}
        for round in range(6):
            shared = {"x": torch.full((1000,), float(round))}
            request = Request(to=NAMES[round % 5], op="echo", round=round, shared=shared)
            expected[request.id] = round
            fleet.submit(request)
            del shared  # the fleet keeps it: another mapping must not get its identity
        while (reply := fleet.next_reply()) is not None:
            assert reply.body["shared/x"].eq(expected.pop(reply.answers)).all()
        assert not expected


@linux
def test_descriptors_do_not_grow_with_the_replies_that_are_kept() -> None:
    with Workers(Play(), load, NAMES, workers=1) as fleet:
        kept = [ask(fleet, "amber", "echo", attempt) for attempt in range(10)]
        before = descriptors()
        for attempt in range(10, 300):
            fleet.submit(Request(to="amber", op="echo", round=1, attempt=attempt, body={"x": torch.ones(10)}))
            reply = fleet.next_reply()
            assert reply is not None
            kept.append(reply)
        assert descriptors() < before + 20


def test_a_fork_after_parallel_work_in_the_coordinator_computes() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.randn(2_000_000).exp().sum()
        torch.randn(500, 500) @ torch.randn(500, 500)
        with Workers(Play(), load, NAMES, workers=2, start="fork") as fleet:
            fleet.submit(Request(to="amber", op="train", round=1, shared={"vector": Play().init()[1]}))
            reply = fleet.next_reply()
            assert reply is not None
            assert reply.error is None
    finally:
        torch.set_num_threads(before)


def test_more_threads_are_spawned_and_not_forked() -> None:
    torch.randn(2_000_000).exp().sum()
    with Workers(Play(), load, NAMES, workers=1, threads=2) as fleet:
        assert ask(fleet, "amber", "echo").meta["threads"] == 2
    with pytest.raises(UnsoundCombination, match="can hang after a fork"):
        Workers(Play(), load, NAMES, workers=1, threads=2, start="fork")


def test_what_cannot_be_built_is_refused() -> None:
    for workers, threads in ((0, 1), (1, 0)):
        with pytest.raises(BadInput, match=">= 1"):
            Workers(Play(), load, NAMES, workers=workers, threads=threads)
    with pytest.raises(BadInput, match="define them in a module"):
        Workers(Play(), lambda name: load(name), NAMES, workers=1, start="spawn")


class _Unreadable:
    """Can be written by pickle and not read back: a worker that is given one cannot start."""

    def __call__(self, name: str) -> object:
        return load(name)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return (int, ("not a number",))


def test_a_worker_that_cannot_start_is_an_error_and_not_a_loop(capfd: pytest.CaptureFixture[str]) -> None:
    fleet = Workers(Play(), _Unreadable(), NAMES, workers=1, start="spawn")
    with pytest.raises(WorkerDidNotStart, match="exit code 1"):
        ask(fleet, "amber", "echo")
    fleet.close()
    assert "not a number" in capfd.readouterr().err


SCRIPT = """
import sys
sys.path[:0] = [{here!r}, {source!r}]
from fleet_program import NAMES, Play, load
from fedelta.core.messages import Request
from fedelta.fleet.workers import Workers

if __name__ == "__main__":
    fleet = Workers(Play(), load, NAMES, workers={workers}, start={start!r})
    for name in NAMES:
        fleet.submit(Request(to=name, op="whoami", round=1))
    pids = set()
    while (reply := fleet.next_reply()) is not None:
        pids.add(reply.meta["pid"])
    print(*pids, flush=True)
    for name in NAMES[:2]:  # at different workers; a third one, if there is one, stays idle
        fleet.submit(Request(to=name, op="wait", round=2, meta=dict(folder={folder!r})))
    fleet.next_reply(0)  # begins what was submitted
    {then}
"""


def script(folder: Path, then: str, start: str = "fork") -> "subprocess.Popen[str]":
    workers = 3 if start == "fork" else 2  # spawning takes its time
    values = {"here": str(HERE), "source": str(SOURCE), "folder": str(folder)}
    text = SCRIPT.format(**values, then=then, start=start, workers=workers)
    path = folder / "coordinator.py"
    path.write_text(text)
    command = [sys.executable, "-W", "error", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def pids_of(coordinator: "subprocess.Popen[str]") -> list[int]:
    assert coordinator.stdout is not None
    return [int(number) for number in coordinator.stdout.readline().split()]


@linux
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_leave_when_the_coordinator_is_killed(tmp_path: Path, start: str) -> None:
    with script(tmp_path, "fleet.next_reply()", start) as coordinator:
        workers = pids_of(coordinator)
        eventually((tmp_path / "begun").exists)
        coordinator.kill()
        coordinator.communicate(timeout=300)
    assert len(workers) == (3 if start == "fork" else 2)
    eventually(lambda: all(gone(worker) for worker in workers))


@linux
@pytest.mark.parametrize("then", ["sys.exit(0)", "del fleet"])
def test_the_interpreter_ends_although_nobody_closed_the_fleet(tmp_path: Path, then: str) -> None:
    with script(tmp_path, then) as coordinator:
        workers = pids_of(coordinator)
        _, errors = coordinator.communicate(timeout=300)
    assert coordinator.returncode == 0
    assert errors == ""
    eventually(lambda: all(gone(worker) for worker in workers))


@linux
def test_ctrl_c_reaches_the_coordinator_and_no_worker(tmp_path: Path) -> None:
    then = "try: print('waiting', flush=True); fleet.next_reply()\n    "
    then += "except KeyboardInterrupt: fleet.close(); print('closed')"
    with script(tmp_path, then) as coordinator:
        workers = pids_of(coordinator)
        eventually(lambda: len(begun(tmp_path)) == 2)
        assert coordinator.stdout.readline() == "waiting\n"
        os.killpg(coordinator.pid, signal.SIGINT)
        output, errors = coordinator.communicate(timeout=300)
    assert (output, errors, coordinator.returncode) == ("closed\n", "", 0)
    assert all(gone(worker) for worker in workers)
