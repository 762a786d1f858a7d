import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput, BadTensors
from fedelta.core.memory import Memory

Make = Callable[[], Memory]


@pytest.fixture(params=["in this process", "in files"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Memories of one site; those in files are of one folder, as if each were in a process of its own."""
    if request.param == "in files":
        return lambda: Memory(tmp_path / "site")
    memory = Memory()
    return lambda: memory


def test_a_site_starts_with_an_empty_memory(make: Make) -> None:
    assert make().at(-1) == {}


def test_the_version_of_a_round_and_the_one_it_was_made_from_are_kept(make: Make) -> None:
    make().commit(-1, 2, {"c": torch.tensor(2)})
    assert make().at(-1) == {}
    make().commit(2, 5, {"c": torch.tensor(5)})
    assert make().at(5)["c"] == 5
    assert make().at(2)["c"] == 2
    with pytest.raises(BadInput, match=r"no memory of round -1, only of \[2, 5\]"):
        make().at(-1)


def test_a_round_that_is_done_again_replaces_what_it_left(make: Make) -> None:
    make().commit(-1, 2, {"c": torch.tensor(2)})
    make().commit(2, 5, {"c": torch.tensor(5)})
    make().commit(2, 5, {"c": torch.tensor(50)})
    assert make().at(5)["c"] == 50
    make().commit(2, 6, {"c": torch.tensor(6)})
    assert make().at(2)["c"] == 2
    with pytest.raises(BadInput, match="no memory of round 5"):
        make().commit(5, 7, {})


def test_what_is_kept_does_not_change_with_what_was_given(make: Make) -> None:
    tensor = torch.zeros(2)
    tensors = {"c": tensor}
    make().commit(-1, 0, tensors)
    tensor += 1
    del tensors["c"]
    assert make().at(0)["c"].tolist() == [0, 0]


def test_what_was_read_outlives_its_version(make: Make) -> None:
    make().commit(-1, 0, {"c": torch.full((5000,), 1.0)})
    read = make().at(0)["c"]
    make().commit(-1, 0, {"c": torch.full((3,), 2.0)})
    make().commit(0, 1, {})
    make().commit(1, 2, {})
    assert read.eq(1).all()


def test_what_is_kept_needs_no_gradient_and_has_the_order_of_its_names(make: Make) -> None:
    make().commit(-1, 0, {"b": torch.ones(2, requires_grad=True) * 2, "a": torch.ones(1, dtype=torch.int64)})
    assert list(make().at(0)) == ["a", "b"]
    assert not make().at(0)["b"].requires_grad


def test_what_the_codec_cannot_hold_is_refused(make: Make) -> None:
    with pytest.raises(BadTensors, match="complex128"):
        make().commit(-1, 0, {"c": torch.ones(2, dtype=torch.complex128)})
    assert make().at(-1) == {}


def test_files_are_made_by_the_first_commit_and_hold_two_versions(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "site")
    memory.at(-1)
    assert not (tmp_path / "site").exists()
    for round in range(5):
        memory.commit(round - 1, round, {"c": torch.ones(3)})
    assert sorted(os.listdir(tmp_path / "site")) == ["3", "4"]


def test_what_is_read_from_a_file_may_be_written_to(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "site")
    memory.commit(-1, 0, {"c": torch.zeros(3)})
    memory.at(0)["c"].add_(1)
    assert memory.at(0)["c"].eq(0).all()


def test_a_commit_that_was_cut_off_left_the_version_before(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "site")
    memory.commit(-1, 0, {"c": torch.zeros(3)})
    (tmp_path / "site" / ".part").write_bytes(b"the first bytes of round 1")
    assert memory.at(0)["c"].eq(0).all()
    memory.commit(0, 1, {"c": torch.ones(3)})
    assert memory.at(1)["c"].eq(1).all()


ROUNDS = st.integers(-1, 3)
TENSORS = st.dictionaries(
    st.sampled_from(["a", "b", "è/.."]),
    st.builds(
        lambda shape, dtype: torch.ones(shape).cumsum(0).to(dtype) if shape else torch.tensor(7).to(dtype),
        st.lists(st.integers(0, 3), max_size=2),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    ),
    max_size=2,
)


@given(steps=st.lists(st.tuples(ROUNDS, ROUNDS, TENSORS), max_size=8))
def test_files_are_as_good_as_this_process(steps: list[tuple[int, int, dict[str, torch.Tensor]]]) -> None:
    """Any commits, with every version looked at after each: the same tensors, the same errors."""
    with tempfile.TemporaryDirectory() as folder:
        here, files = Memory(), Memory(Path(folder) / "site")
        for base, round, tensors in steps:
            refusals = [_error(memory.commit, base, round, tensors) for memory in (here, files)]
            assert refusals[0] == refusals[1]
            for version in range(-2, 5):
                refusals = [_error(memory.at, version) for memory in (here, files)]
                assert refusals[0] == refusals[1]
                if refusals[0] is None:
                    kept, read = here.at(version), files.at(version)
                    assert list(kept) == list(read)
                    assert all(kept[name].dtype == read[name].dtype for name in kept)
                    assert all(torch.equal(kept[name], read[name]) for name in kept)


def _error(do: Callable[..., object], *given: object) -> str | None:
    try:
        do(*given)
    except BadInput as error:
        return str(error)
    return None
