"""What every fleet does: in this process, in worker processes, and with sites that are elsewhere.

A bug at a site that is elsewhere is a failure of that site, and each of them is asked for itself: what is said here of
bugs, and of many sites in one go, holds for the fleets that are near.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.messages import Replies, Reply, Request, Requests, Tensors
from fedelta.core.program import Fleet, run
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Start, Workers
from fleet_program import NAMES, Play, load
from remote_sites import far


@contextmanager
def local(names: Sequence[str] = NAMES) -> Iterator[Fleet]:
    yield Local(Play(), load, names)


@contextmanager
def spilling(names: Sequence[str] = NAMES) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory() as folder:
        yield Local(Play(), load, names, spill=Path(folder))


@contextmanager
def keeping(names: Sequence[str] = NAMES) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory() as folder:
        with Workers(Play(), load, names, workers=2, spill=Path(folder)) as fleet:
            yield fleet
        assert Path(folder).is_dir()  # it is its owner's


@contextmanager
def workers(names: Sequence[str] = NAMES, *, count: int, start: Start = "fork") -> Iterator[Fleet]:
    with Workers(Play(), load, names, workers=count, start=start) as fleet:
        yield fleet


@contextmanager
def elsewhere(names: Sequence[str] = NAMES) -> Iterator[Fleet]:
    with far(Play(), load, names) as fleet:
        yield fleet


NEAR: dict[str, Callable[..., AbstractContextManager[Fleet]]] = {
    "local": local,
    "local with memory in files": spilling,
    "workers with memory in a folder that stays": keeping,
    "one worker": partial(workers, count=1),
    "three workers": partial(workers, count=3),
}
KINDS = {**NEAR, "sites elsewhere": elsewhere}


@pytest.fixture(params=KINDS)
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with KINDS[request.param]() as fleet:
        yield fleet


@pytest.fixture(params=NEAR)
def near(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with NEAR[request.param]() as fleet:
        yield fleet


def everything(fleet: Fleet) -> list[Reply]:
    replies = []
    while (reply := fleet.next_reply()) is not None:
        replies.append(reply)
    return replies


def ask(fleet: Fleet, request: Request) -> Reply:
    fleet.submit(request)
    reply = fleet.next_reply()
    assert reply is not None
    assert reply.answers == request.id
    assert reply.sender == request.to
    return reply


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name], right[name])
        for name in left
    )


def test_tensors_of_any_kind_and_plain_values_come_through(fleet: Fleet) -> None:
    body = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bits": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16(),
        "none": torch.empty(0, 4, dtype=torch.int16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "strided": torch.arange(24).reshape(4, 6).t()[::2],
        "gradient": torch.randn(3, requires_grad=True),
    }
    shared = {"a": torch.randn(7, 3), "b": torch.arange(5, dtype=torch.uint8)}
    meta = {"text": "è", "list": [1, 2.5, None, True], "nested": {"x": {"y": -1}}}
    reply = ask(fleet, Request(to="cedar", op="echo", round=4, job="j", base=2, shared=shared, body=body, meta=meta))
    assert same(reply.body, {**{f"shared/{name}": tensor for name, tensor in shared.items()}, **body})
    assert reply.meta == {**meta, "base": 2, "job": "j", "threads": 1}
    assert reply.round == 4
    assert reply.error is None


def test_a_site_answers_in_the_order_of_its_requests(fleet: Fleet) -> None:
    for attempt in range(6):
        for name in NAMES[:4]:
            fleet.submit(Request(to=name, op="echo", round=1, attempt=attempt, meta={"n": attempt}))
    replies = everything(fleet)
    assert len(replies) == 24
    for name in NAMES[:4]:
        assert [reply.meta["n"] for reply in replies if reply.sender == name] == list(range(6))


def test_memory_lasts_over_rounds_and_scratch_for_one_attempt(fleet: Fleet) -> None:
    asked, tried = [], []
    for job, round, attempt, base in [("", 1, 0, -1), ("", 2, 0, 1), ("", 2, 1, 1), ("", 3, 0, 2), ("", 3, 0, 3)]:
        for name in ("amber", "birch"):
            reply = ask(fleet, Request(to=name, op="count", round=round, job=job, attempt=attempt, base=base))
        asked.append(int(reply.body["asked"]))
        tried.append(int(reply.body["tried"]))
    assert asked == [1, 2, 2, 3, 4]  # the second attempt of round 2 starts from round 1 again
    assert tried == [1, 1, 1, 1, 2]
    forgotten = ask(fleet, Request(to="amber", op="count", round=9, base=1))
    assert forgotten.error is not None
    assert "no memory of round 1" in forgotten.error


def test_a_broadcast_that_a_site_keeps_stays_as_it_was(fleet: Fleet) -> None:
    for value in range(4):
        shared = {"vector": torch.full((1000,), float(value))}
        for name in ("amber", "birch", "cedar"):
            fleet.submit(Request(to=name, op="keep", round=1, base=value, job="j", shared=shared))
            reply = fleet.next_reply()
            assert reply is not None
            assert reply.body["kept"].eq(0).all()


def test_replies_that_are_kept_do_not_change(fleet: Fleet) -> None:
    sent = [torch.full((300,), float(n)) for n in range(40)]
    replies = [ask(fleet, Request(to=NAMES[n % 4], op="echo", round=n, body={"x": x})) for n, x in enumerate(sent)]
    assert all(torch.equal(reply.body["x"], x) for reply, x in zip(replies, sent, strict=True))


def test_an_absent_site_is_data(fleet: Fleet) -> None:
    failed = ask(fleet, Request(to="amber", op="fail", round=1, meta={"kind": "user"}))
    assert failed.error == "the loss is NaN; lower the learning rate"
    assert not failed.body
    assert ask(fleet, Request(to="amber", op="fail", round=2, meta={"kind": "memory"})).error == "out of memory"
    allocation = ask(fleet, Request(to="amber", op="fail", round=2, attempt=1, meta={"kind": "allocation"})).error
    assert allocation is not None
    assert allocation.startswith("out of memory (")
    assert "\n" not in allocation
    shared = {"vector": Play().init()[1]}
    for round in (3, 4):  # a failed load is not taken for data the second time
        unread = ask(fleet, Request(to="elm", op="train", round=round, shared=shared))
        assert unread.error is not None
        assert "no such file" in unread.error
        assert "elm.csv" in unread.error
    assert ask(fleet, Request(to="amber", op="train", round=5, shared=shared)).error is None


def test_a_bug_is_an_exception_and_the_fleet_goes_on(near: Fleet) -> None:
    near.submit(Request(to="amber", op="bug", round=1))
    with pytest.raises((KeyError, RuntimeError), match="not what was meant"):
        near.next_reply()
    assert ask(near, Request(to="amber", op="echo", round=2)).error is None
    assert near.next_reply() is None


def test_writing_into_a_broadcast_is_a_bug(near: Fleet) -> None:
    near.submit(Request(to="amber", op="overwrite", round=1, shared={"vector": torch.zeros(3)}))
    with pytest.raises(RuntimeError, match="clone them before writing"):
        near.next_reply()


def test_a_reply_to_another_request_is_a_bug(near: Fleet) -> None:
    near.submit(Request(to="amber", op="stray", round=1))
    with pytest.raises(RuntimeError, match="another request"):
        near.next_reply()


def test_a_cancelled_request_is_not_answered(fleet: Fleet) -> None:
    requests = [Request(to="amber", op="echo", round=1, attempt=attempt) for attempt in range(5)]
    for request in requests:
        fleet.submit(request)
    for request in requests[1:4]:
        fleet.cancel(request.id)
        fleet.cancel(request.id)
    fleet.cancel("unknown")
    assert [reply.answers for reply in everything(fleet)] == [requests[0].id, requests[4].id]
    ask(fleet, requests[2])  # its id is free again
    fleet.cancel(requests[2].id)


def test_nothing_outstanding_is_none_at_once(fleet: Fleet) -> None:
    assert fleet.next_reply() is None
    assert fleet.next_reply(3600) is None
    assert list(fleet.parties()) == list(NAMES)


def test_what_cannot_be_sent_is_refused(fleet: Fleet) -> None:
    with pytest.raises(BadInput, match=r"no site 'fir' among the 5 of this fleet .*sites\(\)"):
        fleet.submit(Request(to="fir", op="echo", round=1))
    fleet.submit(Request(to="amber", op="echo", round=1))
    with pytest.raises(BadInput, match="already outstanding"):
        fleet.submit(Request(to="amber", op="echo", round=1))
    assert len(everything(fleet)) == 1


def test_names_are_distinct_and_there_is_one() -> None:
    for open_fleet in KINDS.values():
        with pytest.raises(BadInput, match="at least one site"), open_fleet(names=()):
            pass
        with pytest.raises(BadInput, match="'a' is named twice"), open_fleet(names=("a", "b", "a")):
            pass


def test_training_with_dropout_gives_the_same_bits_in_every_fleet() -> None:
    finals = {}
    spawned = partial(workers, count=1, start="spawn")
    for kind, open_fleet in {**KINDS, "spawned": spawned}.items():
        with open_fleet() as fleet:
            torch.rand(1)  # the coordinator's own generator must not matter
            rounds = list(run(Play(), fleet))
        assert [set(report.absent) for _, report in rounds] == [{"elm"}] * 3
        finals[kind] = rounds[-1][0][1]
    assert not torch.equal(finals["local"], Play().init()[1])
    assert all(torch.equal(final, finals["local"]) for final in finals.values()), finals


def test_a_request_gives_the_same_bits_every_time(fleet: Fleet) -> None:
    shared = {"vector": Play().init()[1]}
    first = ask(fleet, Request(to="amber", op="train", round=1, shared=shared))
    ask(fleet, Request(to="birch", op="train", round=1, shared=shared))
    again = ask(fleet, Request(to="amber", op="train", round=1, attempt=1, shared=shared))
    assert same(first.body, again.body)
    assert not first.body["difference"].eq(0).all()


def test_what_is_not_dense_or_not_plain_is_refused(fleet: Fleet) -> None:
    for part in ("body", "shared"):
        with pytest.raises(BadTensors, match=r"'w' is torch\.sparse_coo"):
            fleet.submit(Request(to="amber", op="echo", round=1, **{part: {"w": torch.eye(3).to_sparse()}}))
    strange: list[Any] = [(1, 2), {1, 2}, {1: 2}, torch.ones(2), math.nan, math.inf, Path()]
    for value in strange:
        with pytest.raises(BadInput, match="not plain JSON"):
            fleet.submit(Request(to="amber", op="echo", round=1, meta={"m": [value]}))
    assert fleet.next_reply() is None


@pytest.mark.parametrize(("kind", "why"), [("sparse", "sparse_coo"), ("set", "plain JSON"), ("tuple", "plain JSON")])
def test_a_reply_that_cannot_be_sent_is_a_bug(near: Fleet, kind: str, why: str) -> None:
    near.submit(Request(to="amber", op="unsendable", round=1, meta={"kind": kind}))
    with pytest.raises(RuntimeError, match=f"the reply to request .* cannot be sent: .*{why}"):
        near.next_reply()
    assert ask(near, Request(to="amber", op="echo", round=2)).error is None


def test_threads_of_the_coordinator_are_restored(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        reply = ask(Local(Play(), load, NAMES), Request(to="amber", op="echo", round=1))
        assert reply.meta["threads"] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(BadInput, match="threads must be >= 1"):
        Local(Play(), load, NAMES, threads=0)
    with pytest.raises(BadInput, match="must be a folder"):
        Local(Play(), load, NAMES, spill=tmp_path / "nothing")
    with pytest.raises(BadInput, match=r"Workers\.spill must be a folder"):
        Workers(Play(), load, NAMES, workers=1, spill=tmp_path / "nothing")


def together(fleet: Fleet, requests: Requests, together: int) -> dict[tuple[str, ...], Replies]:
    """The replies to `requests` by the sites of their part, in the order of the requests."""
    fleet.submit_many(requests, together)
    found: dict[tuple[str, ...], Replies] = {}
    while (replies := fleet.next_reply()) is not None:
        assert isinstance(replies, Replies)
        assert replies.answers == requests.id
        assert replies.round == requests.round
        answered = {*replies.senders, *replies.errors}
        found[tuple(name for name in requests.to if name in answered)] = replies
    return dict(sorted(found.items(), key=lambda item: requests.to.index(item[0][0])))


def test_requests_are_handled_in_parts_in_their_order(near: Fleet) -> None:
    names = ("dune", "amber", "elm", "birch", "cedar")
    bodies = {name: {"x": torch.full((3,), float(at)), "a/b": torch.tensor(at)} for at, name in enumerate(names[1:])}
    shared = {"v": torch.arange(1000)}
    requests = Requests(to=names, op="echo", round=3, bases={"elm": 2, "dune": 1}, shared=shared, bodies=bodies)
    for size, parts in {
        2: [("dune", "amber"), ("elm", "birch"), ("cedar",)],
        9: [names],
    }.items():
        found = together(near, requests, size)
        assert [*found] == parts
        for part, replies in found.items():
            assert tuple(replies.senders) == part
            assert not replies.errors
            own = {f"{name}/{key}": x for name in part for key, x in bodies.get(name, {}).items()}
            bases = torch.tensor([{"elm": 2, "dune": 1}.get(name, -1) for name in part])
            sent = {**own, "shared/v": shared["v"], "bases": bases, "threads": torch.tensor(1)}
            assert same(replies.body, sent)


def test_many_give_the_same_bits_in_every_fleet_and_as_one_by_one() -> None:
    shared = {"vector": Play().init()[1]}
    single = {}
    with KINDS["local"]() as fleet:
        for name in NAMES[:4]:
            single[name] = ask(fleet, Request(to=name, op="train", round=1, shared=shared)).body["difference"]
    for open_fleet in NEAR.values():
        for size in (2, 5):
            with open_fleet() as fleet:
                found = together(fleet, Requests(to=NAMES, op="train", round=1, shared=shared), size)
            trained = {key.partition("/")[0]: x for replies in found.values() for key, x in replies.body.items()}
            assert same(trained, single)
            errors = {name: error for replies in found.values() for name, error in replies.errors.items()}
            assert errors.keys() == {"elm"}
            assert "elm.csv" in errors["elm"]


def test_what_fails_as_a_whole_is_a_failure_of_every_site_of_its_part(near: Fleet) -> None:
    for kind, said in {"user": "the loss is NaN", "memory": "out of memory", "allocation": "out of memory ("}.items():
        found = together(near, Requests(to=NAMES, op="fail", round=1, job=kind), 3)
        assert [*found] == [NAMES[:3], NAMES[3:]]
        for part, replies in found.items():
            assert not replies.senders
            assert not replies.body
            assert set(replies.errors) == set(part)
            assert all(error.startswith(said) for error in replies.errors.values())


@pytest.mark.parametrize(
    ("job", "why"),
    [(job, "not of the sites that were asked, each once") for job in ("missing", "double", "more", "both")]
    + [("stray", "other requests"), ("unsendable", "sparse_coo")],
)
def test_replies_to_what_was_not_asked_are_a_bug(near: Fleet, job: str, why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        together(near, Requests(to=NAMES[:3], op="mistake", round=1, job=job), 3)
    assert near.next_reply() is None
    assert ask(near, Request(to="amber", op="echo", round=2)).error is None


@pytest.mark.parametrize("where", ["shared", "bodies"])
def test_writing_into_what_many_were_given_is_a_bug(near: Fleet, where: str) -> None:
    given: dict[str, Any] = {"vector": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="clone them before writing"):
        together(
            near,
            Requests(
                to=("amber",), op="overwrite", round=1, **{where: given if where == "shared" else {"amber": given}}
            ),
            2,
        )


def test_a_bug_in_one_part_leaves_the_others(near: Fleet) -> None:
    near.submit_many(Requests(to=("amber", "birch"), op="bug", round=1), 1)
    for _ in range(2):
        with pytest.raises((KeyError, RuntimeError), match="not what was meant"):
            near.next_reply()
    assert near.next_reply() is None


def test_cancelled_requests_are_not_answered(near: Fleet) -> None:
    requests = Requests(to=NAMES, op="echo", round=1)
    near.submit_many(requests, 2)
    near.submit(Request(to="amber", op="echo", round=1))
    assert near.next_reply() is not None
    near.cancel(requests.id)
    near.cancel(requests.id)
    assert [reply.answers for reply in everything(near)] == [f"{requests.id}/amber"]
    assert len(together(near, requests, 2)) == 3  # the id is free again
    near.cancel(requests.id)


def test_many_and_single_requests_of_a_site_come_in_their_order(near: Fleet) -> None:
    """Each finds the memory that the one before has left."""
    for round in range(1, 9):
        names = NAMES[:4] if round % 4 else NAMES[3::-1]
        if round % 2:
            bases = dict.fromkeys(names, round - 1 if round > 1 else -1)
            near.submit_many(Requests(to=names, op="count", round=round, bases=bases), 3)
        else:
            for name in names:
                near.submit(Request(to=name, op="count", round=round, base=round - 1))
    asked: dict[str, list[int]] = {name: [] for name in NAMES[:4]}
    while (reply := near.next_reply()) is not None:
        if isinstance(reply, Replies):
            for name in reply.senders:
                asked[name].append(int(reply.body[f"{name}/asked"]))
        else:
            asked[reply.sender].append(int(reply.body["asked"]))
    assert all(counts == [*range(1, 9)] for counts in asked.values())


def test_scratch_of_many_lasts_for_one_attempt(near: Fleet) -> None:
    tried = []
    for round, attempt, base in [(1, 0, -1), (1, 0, -1), (1, 1, -1), (2, 0, 1), (2, 0, 1), (2, 1, 1), (2, 0, 1)]:
        requests = Requests(to=NAMES[:4], op="count", round=round, attempt=attempt, bases=dict.fromkeys(NAMES, base))
        found = together(near, requests, 2)
        tried += [{int(x) for replies in found.values() for key, x in replies.body.items() if key.endswith("tried")}]
    assert tried == [{1}, {2}, {1}, {1}, {2}, {1}, {1}]


def test_parts_of_one_are_single_requests(fleet: Fleet) -> None:
    names, shared = ("dune", "amber", "birch"), {"v": torch.arange(10)}
    requests = Requests(to=names, op="echo", round=3, bases={"dune": 1}, shared=shared)
    fleet.submit_many(requests, 1)
    found = everything(fleet)
    for request in requests:
        fleet.submit(request)
    expected = everything(fleet)
    for replies in (found, expected):
        assert sorted(reply.answers for reply in replies) == sorted(requests.id_to(name) for name in names)
    assert {reply.sender: reply.meta for reply in found} == {reply.sender: reply.meta for reply in expected}


def test_what_cannot_be_asked_of_many_is_refused(near: Fleet) -> None:
    with pytest.raises(BadInput, match=r"no site 'fir' among the 5 of this fleet \('amber', .*sites\(\)"):
        near.submit_many(Requests(to=("amber", "fir"), op="echo", round=1), 2)
    with pytest.raises(BadInput, match="named twice"):
        near.submit_many(Requests(to=("amber", "birch", "amber"), op="echo", round=1), 1)
    with pytest.raises(BadInput, match="together must be >= 1, got 0"):
        near.submit_many(Requests(to=("amber",), op="echo", round=1), 0)
    sparse = {"w": torch.eye(3).to_sparse()}
    for given in ({"shared": sparse}, {"bodies": {"amber": sparse}}):
        with pytest.raises(BadTensors, match="sparse_coo"):
            near.submit_many(Requests(to=("amber",), op="echo", round=1, **given), 1)  # type: ignore[arg-type]
    near.submit_many(Requests(to=(), op="echo", round=1), 1)
    assert near.next_reply() is None
    near.submit_many(Requests(to=NAMES, op="echo", round=1), 3)
    with pytest.raises(BadInput, match="already outstanding"):
        near.submit_many(Requests(to=NAMES, op="echo", round=1), 3)
    assert len(everything(near)) == 2
