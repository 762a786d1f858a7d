import dataclasses
import math
import resource
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, Flag
from types import MappingProxyType
from typing import Generic, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedelta.core import codec, snapshot
from fedelta.core.errors import BadInput, CannotResume, FedeltaError
from fedelta.core.messages import Request
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Report, Sight

S = TypeVar("S")


class Phase(Enum):
    WARM = 1
    COLD = "two"


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    first: Tensor
    second: Tensor | None = None


@dataclass(frozen=True)
class Node:
    content: object
    phase: Phase = Phase.WARM


@dataclass(frozen=True, kw_only=True)
class State(Generic[S]):
    inner: S
    round: int = 0
    node: Node | None = None
    history: Mapping[str, Sequence[Moments]] = field(default_factory=dict)
    double: int = field(init=False)

    def __post_init__(self) -> None:
        if self.round < 0:
            raise ValueError(f"State.round must be >= 0, got {self.round}")
        object.__setattr__(self, "double", 2 * self.round)


def equal(one, other):
    """Equal types and values throughout; NaN equals NaN."""
    if isinstance(one, Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
    if isinstance(one, Parameters):
        return one.layout == other.layout and equal(one.vector, other.vector)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if dataclasses.is_dataclass(one):
        return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float):
        return one.hex() == other.hex()
    return one == other


def twin_of_node(module):
    """A class like Node, in another module."""
    return dataclasses.make_dataclass("Node", ["content", "phase"], frozen=True, namespace={"__module__": module})


tensors = st.lists(st.floats(allow_nan=False, width=32), max_size=3).map(torch.tensor)
numbers = st.integers() | st.integers(-(2**200), 2**200) | st.floats() | st.booleans()
values = st.recursive(
    st.none() | numbers | st.text() | tensors | st.sampled_from([*Phase, Layout.of({"w": torch.zeros(2)})]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.builds(Node, inner, st.sampled_from(Phase))
    ),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "state"


@given(value=values, round=st.integers(0, 2**70), meta=st.dictionaries(st.text(), st.integers() | st.text()))
def test_what_is_loaded_equals_what_was_saved(path, value, round, meta):
    state = State(inner=value, round=round, node=Node((value,)))
    snapshot.save(path, state, meta)
    loaded, loaded_meta = snapshot.load(path, State(inner=None))
    assert equal(loaded, state)
    assert loaded_meta == meta


def test_parameters_come_back_with_their_layout(path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    state = {"global": Parameters.of(model, torch.float64), "empty": Parameters.zeros(Layout.of({}))}
    snapshot.save(path, state)
    loaded, _ = snapshot.load(path, {})
    assert equal(loaded, state)
    assert loaded["global"].layout.trained == 12
    torch.testing.assert_close(loaded["global"]["1.num_batches_tracked"], torch.tensor(0.0, dtype=torch.float64))


def test_every_type_that_the_hints_reach_may_be_built_though_the_template_has_none_of_them(path):
    moments = Moments(first=torch.ones(2))
    state = State(inner=None, node=Node([1], Phase.COLD), history={"a": (moments, moments)})
    snapshot.save(path, state)
    loaded, _ = snapshot.load(path, State(inner=None))
    assert equal(loaded, state)


def test_requests_and_reports_are_states(path):
    shared = {"w": torch.arange(3, dtype=torch.int8)}
    requests = [Request(to=to, op="train", round=2, shared=shared, meta={"epochs": [1, {"x": None}]}) for to in "ab"]
    state = (requests, Report(round=2, metrics={"loss": math.nan}, absent={"c": "away"}), Sight.SUM)
    snapshot.save(path, state)
    loaded, _ = snapshot.load(path, ([Request(to="", op="", round=0)], Report(round=0), Sight.EACH))
    assert equal(loaded[0][1].shared, shared)
    assert loaded[0][1].meta == requests[1].meta
    assert equal(loaded[1], state[1])
    assert loaded[2] is Sight.SUM


def test_a_tensor_that_occurs_twice_is_written_once(path):
    tensor = torch.zeros(10_000)
    snapshot.save(path, [tensor, {"again": tensor}])
    assert 40_000 < path.stat().st_size < 41_000


def test_loaded_tensors_can_be_written_to_and_do_not_change_the_file(path):
    snapshot.save(path, {"w": nn.Parameter(torch.ones(3))})
    loaded, _ = snapshot.load(path, {})
    loaded["w"].add_(1)
    assert snapshot.load(path, {})[0]["w"].tolist() == [1, 1, 1]


def test_mappings_of_other_types_come_back_as_dicts(path):
    snapshot.save(path, MappingProxyType({"a": 1}))
    assert snapshot.load(path, {})[0] == {"a": 1}


class Odd:
    pass


class Rights(Flag):
    READ = 1
    WRITE = 2


def test_a_state_that_no_file_can_hold_is_refused_by_the_place_of_the_fault_and_the_old_file_stays(path):
    snapshot.save(path, "old")
    for state, sentence in [
        (State(inner=[{"x": Odd()}]), r"state\.inner\[0\]\['x'\] is a Odd"),
        ({1: 2}, "keys"),
        ({"s": {1, 2}}, "is a set"),
        (Node, "is a type"),
        (lambda: 0, "is a function"),
        (Rights.READ | Rights.WRITE, "combination of members"),
        (torch.ones(2).to_sparse(), "dense"),
        ((Node(1), twin_of_node(__name__)(1, Phase.COLD)), "two different classes"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            snapshot.save(path, state)
    assert snapshot.load(path, "")[0] == "old"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path):
    path = tmp_path / "state"
    snapshot.save(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            snapshot.save(path, torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot.load(path, "")[0] == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_whole_states_while_another_thread_writes(path):
    snapshot.save(path, [0, torch.zeros(1)])
    finished = threading.Event()

    def write():
        for i in range(50):
            snapshot.save(path, [i, torch.full((i % 7 * 1000 + 1,), float(i))])
        finished.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not finished.is_set():
        number, tensor = snapshot.load(path, [])[0]
        assert torch.all(tensor == number)
    writer.join()


def store(path, state, layouts=(), tensors=None):
    """A file of the right form with any tree in it."""
    with path.open("wb") as file:
        codec.write(file, tensors or {}, {"format": 1, "state": state, "layouts": list(layouts), "meta": {}})


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"record": ["os:system", {}]}, "no such class"),
        ({"record": ["subprocess:Popen", {"args": "true"}]}, "no such class"),
        ({"record": ["builtins:object", {}]}, "no such class"),
        ({"record": [f"{__name__}:Odd", {}]}, "no such class"),
        ({"enum": [f"{__name__}:Rights", "READ"]}, "no such class"),
        ({"enum": ["x:Phase", "HOT"]}, "no member 'HOT'"),
        ({"enum": ["x:Node", "WARM"]}, "no member 'WARM'"),
        ({"record": ["x:Phase", {}]}, "refused by that class"),
        ({"record": ["x:Node", {"content": 1}]}, r"differs from the program's in the fields \['phase'\]"),
        ({"record": ["x:Node", {"content": 1, "phase": 1, "more": 1}]}, "more"),
        ({"record": ["x:Node"]}, "no value that a snapshot writes"),
        ({"pickle": "gASV"}, "no value that a snapshot writes"),
        ({"int": "0xg"}, "no value that a snapshot writes"),
        ({"int": "12"}, "no value that a snapshot writes"),
        ({"float": "nano"}, "no value that a snapshot writes"),
        ({"tensor": "9"}, "no value that a snapshot writes"),
        ({"layout": 1}, "no value that a snapshot writes"),
        ({"layout": -1}, "no value that a snapshot writes"),
        ({"parameters": [0, "0"]}, "2 elements"),
        ({"a": 1, "b": 2}, "no value that a snapshot writes"),
        ({}, "no value that a snapshot writes"),
    ],
)
def test_a_file_can_ask_for_nothing_but_the_classes_of_the_program(path, tree, sentence):
    store(path, tree, [Layout.of({"w": torch.zeros(2)}).describe()], {"0": torch.zeros(3)})
    with pytest.raises(CannotResume, match=sentence):
        snapshot.load(path, State(inner=None))


def test_checks_of_a_class_are_run_and_their_sentence_is_shown(path):
    fields = {"inner": None, "round": -1, "node": None, "history": {"map": {}}, "double": 0}
    store(path, {"record": [f"{__name__}:State", fields]})
    with pytest.raises(CannotResume, match="round must be >= 0, got -1"):
        snapshot.load(path, State(inner=None))


def test_another_programs_state_is_refused(path):
    snapshot.save(path, Node(1))
    with pytest.raises(CannotResume, match="holds a Node and the program's state is a State"):
        snapshot.load(path, State(inner=None))
    with pytest.raises(CannotResume, match="no such class"):
        snapshot.load(path, Report(round=0))


def test_a_class_is_found_though_its_file_was_loaded_under_another_name(path):
    twin = twin_of_node("elsewhere")
    snapshot.save(path, Node(3))
    loaded, _ = snapshot.load(path, twin(1, Phase.COLD))
    assert type(loaded) is twin
    assert loaded == twin(3, Phase.WARM)


def test_of_two_classes_with_one_name_the_one_of_the_right_module_is_taken(path):
    twin = twin_of_node("elsewhere")
    state = [Node(3), twin(4, Phase.COLD)]
    snapshot.save(path, state)
    loaded, _ = snapshot.load(path, [twin(0, Phase.WARM), Node(0)])
    assert equal(loaded, state)


def test_a_hint_that_only_a_type_checker_resolves_is_no_hindrance(path):
    @dataclass(frozen=True)
    class Loose:
        later: "Unknown"  # noqa: F821
        phase: Phase = Phase.WARM

    snapshot.save(path, Loose(1, Phase.COLD))
    assert snapshot.load(path, Loose(0))[0] == Loose(1, Phase.COLD)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(CannotResume, match=r"nothing cannot be read \(No such file"):
        snapshot.load(tmp_path / "nothing", None)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, codec.encode({}), codec.encode({}, {"format": 2, "state": 1})])
def test_a_file_that_is_no_snapshot_is_one_sentence(path, content):
    path.write_bytes(content)
    with pytest.raises(CannotResume, match="damaged or no snapshot"):
        snapshot.load(path, None)


def test_every_truncation_is_noticed(path):
    snapshot.save(path, State(inner=torch.ones(2)))
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(CannotResume):
            snapshot.load(path, State(inner=None))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_a_state_or_one_sentence(tmp_path, data):
    path = tmp_path / "state"
    parameters = Parameters.of(nn.Linear(1, 1))
    snapshot.save(path, State(inner=(parameters, 2**80, math.inf), node=Node([None])), {"a": 1})
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(content)
    try:
        loaded, _ = snapshot.load(path, State(inner=None))
    except FedeltaError:
        return
    assert isinstance(loaded, State)
