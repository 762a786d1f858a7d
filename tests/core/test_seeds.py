import contextlib
import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.seeds import derive, derive_each, generator, seeded

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


@given(st.lists(parts, max_size=2), st.lists(parts, max_size=5), st.lists(parts, max_size=2))
def test_seeds_for_each_are_those_of_one_after_the_other(before, each, after):
    assert derive_each((3, *before), each, after) == [derive(3, *before, part, *after) for part in each]


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


def test_a_generator_is_the_mersenne_twister_with_the_words_of_the_path():
    framed = b"".join(kind + n.to_bytes(8, "big") + text for kind, n, text in ((b"i", 1, b"7"), (b"s", 1, b"a")))
    words = np.frombuffer(hashlib.shake_256(framed).digest(4 * 624), "<u4")
    reference = np.random.RandomState()
    reference.set_state(("MT19937", words, 624))
    expected = reference.randint(0, 2**32, size=2000, dtype=np.uint32) % 2**24  # PyTorch takes 24 bits for a float
    assert np.array_equal(torch.rand(2000, generator=generator(7, "a")).numpy() * 2**24, expected)


def test_streams_differ_although_their_seeds_agree_in_the_bits_that_pytorch_keeps():
    seen = {}
    for n in itertools.count():  # by the birthday bound, some 80 000 paths
        low = derive(0, n) & 0xFFFFFFFF
        if low in seen:
            break
        seen[low] = n
    one, other = (torch.rand(8, generator=generator(0, path)) for path in (n, seen[low]))
    assert not torch.equal(one, other)
    with seeded(0, n):
        one = torch.rand(8)
    with seeded(0, seen[low]):
        assert not torch.equal(torch.rand(8), one)


def test_seeded_draws_what_the_generator_draws():
    with seeded(3, "x"):
        drawn = torch.randn(40), torch.randperm(50), torch.rand(3), torch.nn.functional.dropout(torch.ones(99))
    assert torch.equal(drawn[0], torch.randn(40, generator=generator(3, "x")))
    torch.random.set_rng_state(generator(3, "x").get_state())
    again = torch.randn(40), torch.randperm(50), torch.rand(3), torch.nn.functional.dropout(torch.ones(99))
    assert all(map(torch.equal, drawn, again))
    assert torch.equal(drawn[1].sort().values, torch.arange(50))
    assert 0 < int((drawn[3] == 0).sum()) < 99


def test_first_draws_over_paths_are_uniform_and_normal():
    """Kolmogorov and Smirnov's test at a level of 1e-6, of what never changes."""
    first = np.sort([torch.rand(2, generator=generator(1, n))[0].item() for n in range(3000)])
    long = np.sort(torch.rand(100_000, generator=generator(2)).numpy())
    probability = np.sort(torch.special.ndtr(torch.randn(100_000, generator=generator(3)).double()).numpy())
    for sample in (first, long, probability):
        steps = np.arange(len(sample)) / len(sample)
        assert np.abs(sample - steps).max() * len(sample) ** 0.5 < 2.7


def test_seeding_leaves_cuda_as_it_is():
    """In a process of its own: worker processes are forked only while CUDA is not in use."""
    code = (
        "import torch; from fedelta.core.seeds import generator, seeded\n"
        "with seeded(1): generator(2)\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
