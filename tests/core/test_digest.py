import dataclasses
import functools
import importlib.util
import math
import operator
import os
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedelta.core.digest import describe, digest
from fedelta.core.errors import BadExperiment
from fedelta.core.messages import Request
from fedelta.core.parameters import Parameters
from fedelta.core.program import Sight

EXPERIMENT = '''
"""An experiment."""

import functools
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn

HIDDEN = 8
WEIGHTS = torch.arange(3)
ROWS = 100


class Mode(Enum):
    FAST = 1
    SLOW = 2


def bounded(function):
    @functools.wraps(function)
    def inner(*args):
        return min(function(*args), 10)

    return inner


def activation():
    return nn.ReLU()


def layer(width):
    return nn.Sequential(nn.Linear(4, width), activation())


class Base(nn.Module):
    scale = 2.0


class Net(Base):
    def __init__(self, outputs=3):
        super().__init__()
        self.body = layer(HIDDEN)
        self.head = nn.Linear(HIDDEN, outputs)

    @property
    def text(self):
        return """
unindented
"""

    def forward(self, x):
        return self.head(self.body(x)) * self.scale


@dataclass(frozen=True, kw_only=True)
class Trainer:
    model: object
    schedule: object
    mode: Mode = Mode.FAST
    site: int = 3
    threads: int = field(default=1, metadata={"digest": False})


def schedule(start, *, decay=0.5):
    count = 0

    @bounded
    def rate(round):
        nonlocal count
        count += 1
        return start * decay**round + len(WEIGHTS)

    return rate


def program():
    first, second = lambda: Net(3), lambda: Net(5)
    return Trainer(
        model=[first, second],
        schedule=schedule(1.5),
    )


def site(name):
    return torch.zeros(ROWS, 4)
'''


def load(path, text, name="experiment"):
    """The program of an experiment file with that text."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def digest_of(path, text, name="experiment"):
    return digest(load(path, text, name).program())


@pytest.fixture
def path(tmp_path, monkeypatch):
    # cached bytecode counts as fresh when a file of the same size is written within the same second
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "experiment.py"
    sys.modules.pop("experiment", None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return nn.ReLU()", "return nn.Tanh()"),
        ("HIDDEN = 8", "HIDDEN = 9"),
        ("torch.arange(3)", "torch.tensor([0, 1, 3])"),
        ("scale = 2.0", "scale = 2.5"),
        ("class Net(Base)", "class Net(nn.Module)"),
        ("* self.scale", "+ self.scale"),
        ("outputs=3", "outputs=4"),
        ("\nunindented\n", "\n unindented\n"),
        ("lambda: Net(3)", "lambda: Net(4)"),
        ("lambda: Net(3), lambda: Net(5)", "lambda: Net(5), lambda: Net(3)"),
        ("schedule(1.5)", "schedule(1.25)"),
        ("schedule(1.5)", "schedule(1.5, decay=0.25)"),
        ("    @bounded\n", ""),
        ("), 10)", "), 11)"),
        ("mode: Mode = Mode.FAST", "mode: Mode = Mode.SLOW"),
        ("SLOW = 2", "SLOW = 3"),
        ("nonlocal count\n", "count = 0\n"),
    ],
)
def test_what_changes_the_experiment_changes_the_digest(path, old, new):
    assert EXPERIMENT.count(old) >= 1
    assert digest_of(path, EXPERIMENT) != digest_of(path, EXPERIMENT.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""An experiment."""', "# An experiment.\n\n"),
        ("HIDDEN = 8", "HIDDEN = 8  # wide"),
        ("return min(function(*args), 10)", "return min(\n            function(*args), 10,\n        )"),
        ("first, second = lambda: Net(3), lambda: Net(5)", "first = lambda: Net(3)\n    second = lambda: Net(5)"),
        ("schedule=schedule(1.5),", "schedule=schedule(1.5), threads=8,"),
        ("ROWS = 100", "ROWS = 50"),
        ("torch.zeros(ROWS, 4)", 'open("/somewhere/else").read()'),
        ("torch.arange(3)", "torch.tensor([0, 1, 2])"),
    ],
)
def test_what_does_not_change_the_experiment_does_not_change_the_digest(path, old, new):
    assert EXPERIMENT.count(old) == 1
    assert digest_of(path, EXPERIMENT) == digest_of(path, EXPERIMENT.replace(old, new))


def test_the_name_and_the_place_of_the_file_do_not_count(path, tmp_path):
    elsewhere = tmp_path / "deep" / "other.py"
    elsewhere.parent.mkdir()
    assert digest_of(path, EXPERIMENT) == digest_of(elsewhere, EXPERIMENT, "other")


def test_a_constant_set_after_loading_counts(path):
    module = load(path, EXPERIMENT)
    before = digest(module.program())
    module.HIDDEN = 16
    assert digest(module.program()) != before


def test_a_second_file_under_the_same_module_name_does_not_confuse_the_first(path, tmp_path):
    first = load(path, EXPERIMENT).Net
    before = digest(first)
    second = load(tmp_path / "second.py", EXPERIMENT.replace("HIDDEN = 8", "HIDDEN = 9")).Net
    assert digest(first) == before != digest(second)


def test_a_module_of_the_user_counts_as_a_whole(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for body in ("return 1", "return 2"):
        (tmp_path / "parts_of_it.py").write_text(f"def part():\n    {body}\n")
        importlib.invalidate_caches()
        sys.modules.pop("parts_of_it", None)
        digests.append(digest_of(path, "import parts_of_it\n\ndef program():\n    return lambda: parts_of_it.part()\n"))
    sys.modules.pop("parts_of_it")
    assert digests[0] != digests[1]


def test_functions_that_call_each_other_have_a_digest(path):
    text = "def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n > 0 and even(n - 1)\n"
    text += "def program(): return even\n"
    assert digest_of(path, text) != digest_of(path, text.replace("n > 0", "n > 1"))


def test_processes_agree(tmp_path):
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    code = (
        "import experiment, torch; from fedelta.core.digest import digest; "
        "print(digest([experiment.program(), {'a', 'b', 'c', 1, 2.5}, frozenset(range(50)), experiment.Mode]))"
    )
    import_path = os.pathsep.join([str(tmp_path), *sys.path])
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": import_path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1
    assert len(answers.pop().strip()) == 64


class Colour(Enum):
    RED = 1
    BLUE = 2


class Level(IntEnum):
    ONE = 1


@dataclass
class Pair:
    left: object
    right: object
    note: object = field(default="", metadata={"digest": False})


def typed(value):
    """`value` with its types, in a form that compares as descriptions should."""
    if isinstance(value, dict):
        return "dict", frozenset((typed(key), typed(item)) for key, item in value.items())
    if isinstance(value, frozenset):
        return "set", frozenset(map(typed, value))
    if isinstance(value, list | tuple):
        return type(value), tuple(map(typed, value))
    if isinstance(value, Pair):
        return "pair", typed(value.left), typed(value.right)
    return type(value), (value.hex() if isinstance(value, float) else value)


scalars = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, -0.0, 1.0, math.inf, math.nan])
    | st.sampled_from(["", "1", "a", "a, b", '"', "None", "é", "[1]"]) | st.binary(max_size=1) | st.sampled_from(Colour)
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.lists(inner, max_size=2).map(tuple)
        | st.frozensets(scalars, max_size=3)
        | st.dictionaries(scalars, inner, max_size=3)
        | st.builds(Pair, inner, inner, inner)
    ),
    max_leaves=4,
)


@given(values, values)
def test_descriptions_are_equal_exactly_where_the_values_are(one, other):
    assert (describe(one) == describe(other)) == (typed(one) == typed(other))


@settings(max_examples=20)
@given(st.permutations([("a", 1), ("b", [2]), (3, "c"), (None, 4), (Colour.RED, 5), (Colour.BLUE, 6)]))
def test_the_order_of_mappings_and_sets_does_not_count(items):
    reference = {"a": 1, "b": [2], 3: "c", None: 4, Colour.RED: 5, Colour.BLUE: 6}
    assert describe(dict(items)) == describe(reference)
    assert describe({key for key, _ in items}) == describe(set(reference))


def test_tensors_count_by_dtype_shape_and_bytes():
    base = torch.arange(6.0).reshape(2, 3)
    different = [base, base.reshape(3, 2), base.double(), base.int(), base + 1, base.bfloat16(), base[:0], base.numpy()]
    assert len({describe(tensor) for tensor in different}) == len(different)
    assert describe(base.t().contiguous().t()) == describe(base) == describe(nn.Parameter(base))
    assert describe(torch.tensor(0.0)) != describe(torch.tensor(-0.0))
    parameters = Parameters.of(nn.Linear(1, 1))
    assert describe(parameters) == describe(parameters.like(parameters.vector.clone()))
    assert describe(parameters) != describe(parameters.like(parameters.vector + 1))


def test_numbers_of_numpy():
    assert describe(np.float64(0.5)) == describe(0.5)
    assert describe(np.int64(1)) != describe(1)
    assert describe(np.array([1, 2])) != describe(np.array([[1, 2]]))


def test_a_module_counts_by_its_parts_settings_and_weights():
    def build(**changes):
        torch.manual_seed(0)
        settings = {"activation": nn.ReLU(), "momentum": 0.1, **changes}
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=settings["momentum"]), settings["activation"])

    frozen, shifted, counted = build(), build(), build()
    frozen[0].weight.requires_grad_(False)
    shifted[0].bias.data += 1
    counted[1].num_batches_tracked += 1
    variants = [build(), build(activation=nn.Tanh()), build(momentum=0.2), frozen, shifted, counted]
    assert len({digest(module) for module in variants}) == len(variants)
    assert digest(build()) == digest(build().eval())


def decorated(function):
    return functools.wraps(function)(functools.cache(function))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (nn.Linear, "torch.nn.modules.linear.Linear"),
        (nn.functional.relu, "torch.nn.functional.relu"),
        (torch.relu, "torch.relu"),
        (torch.Tensor.relu, "torch._C.TensorBase.relu"),
        (math.sin, "math.sin"),
        (str.lower, "builtins.str.lower"),
        (np.exp, "numpy.exp"),
        (operator, "operator"),
        (dict, "builtins.dict"),
        (
            functools.partial(nn.Linear, 2, bias=False),
            'partial([torch.nn.modules.linear.Linear, (2), {"bias": False}])',
        ),
        (Sight.SUM, "fedelta.core.program.Sight.SUM"),
        (torch.float32, "torch.float32"),
        (torch.device("cpu"), "cpu"),
        (torch.Size([2, 3]), "torch.Size(2, 3)"),
        (PurePosixPath("a/b"), 'path("a/b")'),
        (Path("a") / "b", 'path("a/b")'),
        (range(3), "range(0, 3)"),
        ([1].append, "[1].append"),
        (
            Request(to="a", op="train", round=1),
            'fedelta.core.messages.Request(to="a", op="train", round=1, job="", attempt=0, base=-1, shared={}, '
            "body={}, meta={})",
        ),
    ],
)
def test_what_is_installed_counts_by_name(value, text):
    assert describe(value) == text


def test_what_an_installed_function_made_counts_by_what_it_closes_over():
    assert "arg_index=6" in describe(nn.functional.max_pool2d)
    assert describe(nn.functional.max_pool2d) != describe(nn.functional.max_pool1d)


def test_methods_and_cached_functions():
    assert describe(decorated(add_one)) == describe(decorated(add_one))
    assert describe(functools.cache(add_one)) != describe(functools.cache(add_two))
    assert describe(Counter(1).count) == describe(Counter(1).count) != describe(Counter(2).count)
    assert describe(Level.ONE) != describe(1)


def add_one(x):
    return x + 1


def add_two(x):
    return x + 2


@dataclass
class Counter:
    start: int

    def count(self) -> int:
        return self.start + 1


class Odd:
    pass


@pytest.mark.parametrize(
    "value",
    [Odd(), object(), iter([]), torch.Generator(), [1, {"a": Odd()}], Pair(Odd(), 1), functools.partial(print, Odd())],
)
def test_an_object_without_a_digest_is_refused_with_the_cure(value):
    with pytest.raises(BadExperiment, match=r'has no digest, .*make it a dataclass, or .*"digest": False'):
        digest(value)


def test_a_field_left_out_may_hold_anything():
    assert digest(Pair(1, 2, Odd())) == digest(Pair(1, 2, iter([])))


def test_a_closure_over_something_without_a_digest_is_refused_and_a_module_level_name_is_not():
    odd = Odd()
    with pytest.raises(BadExperiment, match="Odd has no digest"):
        digest(lambda: odd)
    assert "SOMETHING=a #" in describe(lambda: SOMETHING)


SOMETHING = Odd()


def test_code_that_is_in_no_file_is_refused():
    names = {"__name__": "prompt"}
    exec("def f(): return 1\nclass C: pass", names)
    made = dataclasses.make_dataclass("Made", ["x"])
    for value in (names["f"], names["C"], made(1), eval("lambda: 0")):
        with pytest.raises(BadExperiment, match="the source of"):
            digest(value)


def test_a_value_that_contains_itself_is_refused():
    circle = []
    circle.append(circle)
    with pytest.raises(BadExperiment, match="contains itself"):
        digest(circle)


@pytest.mark.parametrize(
    "value", [torch.ones(2).to_sparse(), torch.ones(2, device="meta"), np.array([Odd()], dtype=object)]
)
def test_tensors_and_arrays_without_bytes_are_refused(value):
    with pytest.raises(BadExperiment, match="has no digest; convert"):
        digest(value)
