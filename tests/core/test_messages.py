import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core import codec
from fedelta.core.errors import BadTensors
from fedelta.core.messages import Reply, Request, Requests, Update, Updates
from fedelta.core.parameters import Layout, Parameters

LAYOUT = Layout.of({"w": torch.zeros(2, 2), "b": torch.zeros(())}, {"n": torch.zeros(1, dtype=torch.int64)})
number = torch.tensor(1.0, dtype=torch.float64)
GOOD = {"difference": torch.zeros(6), "weight": number, "count": number}

updates = st.builds(
    lambda values, dtype, **rest: Update(values=Parameters(LAYOUT, torch.tensor(values, dtype=dtype)), **rest),
    values=st.lists(st.floats(width=16), min_size=6, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    kind=st.sampled_from(["difference", "value"]),
    weight=st.floats(0, allow_infinity=False),
    sums=st.dictionaries(st.text(), st.floats(), max_size=3),
    count=st.integers(1, 2**53 - 1),
)


def hexes(sums):
    return {name: value.hex() for name, value in sums.items()}


@given(updates)
def test_an_update_survives_the_way_through_tensors_and_bytes(update):
    tensors, _ = codec.decode(codec.encode(update.to_tensors()))
    back = Update.from_tensors(tensors, LAYOUT)
    assert (back.kind, back.weight, back.count) == (update.kind, update.weight, update.count)
    assert hexes(back.sums) == hexes(update.sums)
    assert back.values.vector.dtype == update.values.vector.dtype
    assert torch.equal(back.values.vector.view(torch.uint8), update.values.vector.view(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"difference": None}, "one of 'difference' and 'value'"),
        ({"value": torch.zeros(6)}, "one of 'difference' and 'value'"),
        ({"difference": torch.zeros(5)}, "6 elements"),
        ({"difference": torch.zeros(2, 3)}, "1-D"),
        ({"difference": torch.zeros(12)[::2]}, "contiguous"),
        ({"difference": torch.zeros(6, dtype=torch.int32)}, "floating-point"),
        ({"weight": None}, "without 'weight'"),
        ({"count": None}, "without 'count'"),
        ({"weight": number.float()}, "'weight' of an update is not a float64 scalar"),
        ({"count": number.reshape(1)}, "'count' of an update is not a float64 scalar"),
        ({"sum/loss": torch.zeros(2)}, "'sum/loss' of an update is not a float64 scalar"),
        ({"weight": -number}, "weight -1"),
        ({"weight": number * math.inf}, "weight inf"),
        ({"weight": number * math.nan}, "weight nan"),
        ({"count": number * 0}, "count 0"),
        ({"count": number * 1.5}, "count 1.5"),
        ({"count": number * math.nan}, "count nan"),
        ({"count": number * math.inf}, "count inf"),
        ({"loss": number}, r"unknown numbers in an update: \['loss'\]"),
    ],
)
def test_malformed_updates_are_refused(changes, sentence):
    assert Update.from_tensors(GOOD, LAYOUT).count == 1
    tensors = {name: tensor for name, tensor in {**GOOD, **changes}.items() if tensor is not None}
    with pytest.raises(BadTensors, match=sentence):
        Update.from_tensors(tensors, LAYOUT)


def test_requests_that_differ_in_job_round_operation_attempt_or_site_have_different_ids():
    base = {"to": "a", "op": "train", "round": 1}
    changes = [{}, {"to": "b"}, {"op": "evaluate"}, {"round": 2}, {"job": "j"}, {"attempt": 1}]
    assert len({Request(**{**base, **change}).id for change in changes}) == len(changes)
    assert Request(**base).id == Request(**base, base=0, meta={"x": 1}).id


def test_replies_answer_their_request():
    request = Request(to="a", op="train", round=3)
    good, bad = Reply.to_request(request, {"x": number}), Reply.failure(request, "no data")
    for reply in (good, bad):
        assert (reply.sender, reply.answers, reply.round) == ("a", request.id, 3)
    assert good.error is None
    assert (bad.error, bad.body) == ("no data", {})


def test_many_requests_are_what_each_would_be() -> None:
    shared, own = {"w": torch.ones(2)}, {"c": torch.zeros(1)}
    requests = Requests(
        to=("a", "b", "c"), op="train", round=4, job="j", attempt=1, bases={"b": 3}, shared=shared, bodies={"c": own}
    )
    single = [
        Request(to=to, op="train", round=4, job="j", attempt=1, base=base, shared=shared, body=body)
        for to, base, body in (("a", -1, {}), ("b", 3, {}), ("c", -1, own))
    ]
    assert list(requests) == single
    assert [requests.id_to(to) for to in requests.to] == [request.id for request in single]
    part = requests.part(slice(1, 3))
    assert list(part) == single[1:]
    assert (part.id, len(part), part.shared) == (requests.id, 2, shared)
    assert part.shared is shared


def test_updates_side_by_side_can_be_put_together() -> None:
    layout = Layout.of({"w": torch.empty(2)})

    def updates(*names: str) -> Updates:
        n = len(names)
        return Updates(
            senders=names,
            layout=layout,
            values=torch.arange(2.0 * n).view(n, 2),
            weights=torch.arange(1.0, n + 1, dtype=torch.float64),
            sums={"loss": torch.full((n,), 0.5, dtype=torch.float64)},
        )

    together = Updates.cat([updates("a"), updates("b", "c")], layout)
    assert together.senders == ["a", "b", "c"]
    assert [(one.weight, one.values.vector.tolist(), one.sums, one.count) for one in together] == [
        (1.0, [0.0, 1.0], {"loss": 0.5}, 1),
        (1.0, [0.0, 1.0], {"loss": 0.5}, 1),
        (2.0, [2.0, 3.0], {"loss": 0.5}, 1),
    ]
    assert len(Updates.cat([], layout)) == 0
