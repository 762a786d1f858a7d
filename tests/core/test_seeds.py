import contextlib
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.seeds import derive, generator, seeded

parts = st.integers() | st.text(alphabet=st.characters(codec="utf-8"), max_size=3)
paths = st.lists(parts, min_size=1, max_size=4)


@given(paths, paths)
def test_paths_have_equal_seeds_exactly_where_they_are_equal(one, other):
    def typed(path):
        return [(type(part), part) for part in path]

    assert (derive(7, *one) == derive(7, *other)) == (typed(one) == typed(other))


@given(st.integers(), paths)
def test_a_seed_has_63_bits(seed, path):
    assert 0 <= derive(seed, *path) < 2**63


def test_parts_are_typed_and_framed():
    seeds = [derive(1, "a", 2), derive(1, "a2"), derive(1, "a", "2"), derive(1, 2, "a"), derive(1, "a"), derive(1)]
    assert len(set(seeds)) == len(seeds)
    assert derive(1, "x") != derive(2, "x")


def reference(text):
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") // 2


def test_seeds_stay_what_they_were():
    """A run that is resumed, or compared with one of an earlier version, draws the same numbers."""
    eight = [n.to_bytes(8, "big") for n in range(8)]
    assert derive(0) == reference(b"i" + eight[1] + b"0") == 5789868883982397445
    path = b"i" + eight[1] + b"0" + b"i" + eight[2] + b"-3" + b"s" + eight[5] + "süß".encode()
    assert derive(0, -3, "süß") == reference(path)


def test_integers_of_other_types_count_as_the_number():
    assert derive(1, np.int64(3)) == derive(1, 3) == derive(np.int32(1), torch.tensor(3).item())
    with pytest.raises(TypeError):
        derive(1, 3.0)


def test_generators_of_one_path_draw_the_same_and_of_two_paths_do_not():
    draws = [torch.rand(8, generator=generator(5, *path)) for path in (("a", 1), ("a", 1), ("a", 2))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_seeded_restores_the_global_state_also_after_an_error():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with seeded(1, "dropout"):
        first = torch.rand(4)
    with contextlib.suppress(ZeroDivisionError), seeded(1, "dropout"):
        assert torch.equal(torch.rand(4), first)
        raise ZeroDivisionError
    assert torch.equal(torch.random.get_rng_state(), before)
    with seeded(1, "dropout", 2):
        assert not torch.equal(torch.rand(4), first)


def test_a_generator_does_not_touch_the_global_state():
    before = torch.random.get_rng_state()
    torch.rand(4, generator=generator(1))
    assert torch.equal(torch.random.get_rng_state(), before)
