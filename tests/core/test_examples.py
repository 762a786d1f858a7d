import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples

X, Y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 0, 2])


def test_a_pair_of_tensors_is_examples():
    examples = Examples.of((X, Y))
    assert list(examples.inputs) == ["x"]
    assert torch.equal(examples.inputs["x"], X)
    assert torch.equal(examples.targets, Y)
    assert Examples.of(examples) is examples
    assert len(examples) == 4


@pytest.mark.parametrize("data", [X, (X,), (X, Y, Y), (X, [1, 2]), None, {"x": X}])
def test_other_data_is_refused(data):
    with pytest.raises(BadInput, match=f"got {type(data).__name__}"):
        Examples.of(data)


@pytest.mark.parametrize(
    ("inputs", "targets", "sentence"),
    [
        ({"x": X[:3]}, Y, "'x' has 3 rows and the targets have 4"),
        ({"x": X, "mask": X[:1]}, Y, "'mask' has 1 rows"),
        ({}, Y, "at least one input"),
        ({"x": torch.tensor(1.0)}, Y, "'x' has one row per example"),
        ({"x": X}, torch.tensor(1), "'targets' has one row per example"),
    ],
)
def test_inputs_that_do_not_fit_the_targets_are_refused(inputs, targets, sentence):
    with pytest.raises(BadInput, match=sentence):
        Examples(inputs, targets)


@given(st.lists(st.integers(0, 3)), st.slices(4))
def test_rows_are_taken_of_inputs_and_targets_alike(rows, part):
    examples = Examples({"a": X, "b": Y}, Y)
    for index in (torch.tensor(rows, dtype=torch.int64), slice(part.start, part.stop, abs(part.step or 1))):
        taken = examples[index]
        assert len(taken) == len(Y[index])
        assert torch.equal(taken.inputs["a"], X[index])
        assert torch.equal(taken.inputs["b"], Y[index])
        assert torch.equal(taken.targets, Y[index])


def test_a_slice_gives_views():
    assert Examples.of((X, Y))[1:3].inputs["x"].data_ptr() == X[1:].data_ptr()


def test_the_digest_covers_names_dtypes_shapes_and_bytes_but_not_order_or_strides():
    base = Examples({"a": X, "b": Y}, Y)
    assert base.digest() == Examples({"b": Y, "a": X.t().contiguous().t()}, Y.clone()).digest()
    others = [
        Examples({"a": X, "c": Y}, Y),
        Examples({"a": X.double(), "b": Y}, Y),
        Examples({"a": X.reshape(4, 1, 3), "b": Y}, Y),
        Examples({"a": X, "b": Y}, Y + 1),
        Examples({"a": X.neg(), "b": Y}, Y),
        base[:0],
    ]
    assert len({examples.digest() for examples in [base, *others]}) == 7


def test_numpy_arrays_become_what_models_are_trained_with() -> None:
    examples = Examples.of((np.ones((3, 2)), np.array([0, 1, 2], dtype=np.int32)))
    assert examples.inputs["x"].dtype == torch.float32
    assert examples.targets.dtype == torch.int64
    assert Examples.of((np.ones((3, 2), dtype=np.uint8), np.ones(3))).inputs["x"].dtype == torch.uint8
    with pytest.raises(BadInput, match=r"got tuple\(list, Tensor\)"):
        Examples.of(([1], torch.ones(1)))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no data for a model"):
        Examples.of((np.array(["a"]), np.array([1])))
