import pytest
import torch

from fedelta.core.errors import BadInput
from fedelta.core.memory import Memory


def test_a_site_starts_with_an_empty_memory():
    assert Memory().at(-1) == {}


def test_the_version_of_a_round_and_the_one_it_was_made_from_are_kept():
    memory = Memory()
    memory.commit(-1, 2, {"c": torch.tensor(2)})
    memory.commit(2, 5, {"c": torch.tensor(5)})
    assert memory.at(5)["c"] == 5
    assert memory.at(2)["c"] == 2
    with pytest.raises(BadInput, match=r"no memory of round -1, only of \[2, 5\]"):
        memory.at(-1)


def test_a_round_that_is_done_again_replaces_what_it_left():
    memory = Memory()
    memory.commit(-1, 2, {"c": torch.tensor(2)})
    memory.commit(2, 5, {"c": torch.tensor(5)})
    memory.commit(2, 5, {"c": torch.tensor(50)})
    assert memory.at(5)["c"] == 50
    memory.commit(2, 6, {"c": torch.tensor(6)})
    assert memory.at(2)["c"] == 2
    with pytest.raises(BadInput, match="no memory of round 5"):
        memory.commit(5, 7, {})


def test_what_is_kept_does_not_change_with_what_was_given():
    memory, tensor = Memory(), torch.zeros(2)
    tensors = {"c": tensor}
    memory.commit(-1, 0, tensors)
    tensor += 1
    del tensors["c"]
    assert memory.at(0)["c"].tolist() == [0, 0]
