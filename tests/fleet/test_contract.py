"""What every fleet does, in this process and in worker processes alike."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.messages import Reply, Request, Tensors
from fedelta.core.program import Fleet, run
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Start, Workers
from fleet_program import NAMES, Play, load


@contextmanager
def local(names: Sequence[str] = NAMES) -> Iterator[Fleet]:
    yield Local(Play(), load, names)


@contextmanager
def workers(names: Sequence[str] = NAMES, *, count: int, start: Start = "fork") -> Iterator[Fleet]:
    with Workers(Play(), load, names, workers=count, start=start) as fleet:
        yield fleet


KINDS: dict[str, Callable[..., AbstractContextManager[Fleet]]] = {
    "local": local,
    "one worker": partial(workers, count=1),
    "three workers": partial(workers, count=3),
}


@pytest.fixture(params=KINDS)
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with KINDS[request.param]() as fleet:
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


def test_a_bug_is_an_exception_and_the_fleet_goes_on(fleet: Fleet) -> None:
    fleet.submit(Request(to="amber", op="bug", round=1))
    with pytest.raises((KeyError, RuntimeError), match="not what was meant"):
        fleet.next_reply()
    assert ask(fleet, Request(to="amber", op="echo", round=2)).error is None
    assert fleet.next_reply() is None


def test_writing_into_a_broadcast_is_a_bug(fleet: Fleet) -> None:
    fleet.submit(Request(to="amber", op="overwrite", round=1, shared={"vector": torch.zeros(3)}))
    with pytest.raises(RuntimeError, match="clone them before writing"):
        fleet.next_reply()


def test_a_reply_to_another_request_is_a_bug(fleet: Fleet) -> None:
    fleet.submit(Request(to="amber", op="stray", round=1))
    with pytest.raises(RuntimeError, match="another request"):
        fleet.next_reply()


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
def test_a_reply_that_cannot_be_sent_is_a_bug(fleet: Fleet, kind: str, why: str) -> None:
    fleet.submit(Request(to="amber", op="unsendable", round=1, meta={"kind": kind}))
    with pytest.raises(RuntimeError, match=f"the reply to request .* cannot be sent: .*{why}"):
        fleet.next_reply()
    assert ask(fleet, Request(to="amber", op="echo", round=2)).error is None


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
