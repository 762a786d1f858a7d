"""Every source of noise draws what the `Noise` protocol promises.

SystemNoise cannot be seeded, so the statistical tests may fail by chance: each of them looks at p-values that fall
below 1e-8 in one of 10^8 runs, or at 6 standard deviations (2e-9), and all of them together fail in fewer than one of
10^6 runs.
"""

import copy
import math
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fedelta.core import noise
from fedelta.core.children import started_quietly
from fedelta.core.errors import BadInput
from fedelta.core.noise import Noise, SeededNoise, SystemNoise
from fedelta.core.seeds import generator

N = 100_000
CHANCE = 1e-8
SIGMAS = 6.0
SIZES = [1, 2, 15, 16, 17, noise._PIECE - 1, noise._PIECE, noise._PIECE + 15, noise._PIECE + 16, 2 * noise._PIECE + 7]


@pytest.fixture(params=[lambda: SeededNoise(3, "test"), SystemNoise], ids=["seeded", "system"])
def source(request: pytest.FixtureRequest) -> Noise:
    make: Callable[[], Noise] = request.param
    return make()


def normals(source: Noise, n: int = N, std: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.zeros(n, dtype=dtype)
    source.add_normal(values, std)
    return values


def correlated(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation in standard deviations of what independent ones have."""
    return abs(float(np.corrcoef(x.numpy(), y.numpy())[0, 1])) * math.sqrt(len(x))


@pytest.mark.parametrize(("dtype", "std"), [(torch.float64, 1.0), (torch.float64, 3e-9), (torch.float32, 250.0)])
def test_it_adds_gaussians_of_that_deviation(source: Noise, dtype: torch.dtype, std: float) -> None:
    values = torch.full((N,), 5 * std, dtype=dtype)
    source.add_normal(values, std)
    assert values.dtype == dtype
    z = (values.double() / std - 5).numpy()
    assert stats.kstest(z, "norm").pvalue > CHANCE
    assert abs(z.mean()) * math.sqrt(N) < SIGMAS
    assert abs((z**2).mean() - 1) * math.sqrt(N / 2) < SIGMAS
    assert abs((z**4).mean() - 3) * math.sqrt(N / 96) < SIGMAS  # the variance of z^4 is 96
    for edge in (2.0, 3.0, 3.8):
        beyond = int((np.abs(z) > edge).sum())
        assert stats.binomtest(beyond, N, 2 * stats.norm.sf(edge)).pvalue > CHANCE


def test_all_draws_are_independent(source: Noise) -> None:
    first, second = normals(source), normals(source)
    half = noise._PIECE // 2  # what is that far apart comes from the same two words
    for x, y in (
        (first, second),
        (first[:-1], first[1:]),
        (first[:half], first[half : 2 * half]),
        (first[: noise._PIECE], first[noise._PIECE : 2 * noise._PIECE]),
    ):
        assert correlated(x, y) < SIGMAS
        assert correlated(x.square(), y.square()) < SIGMAS
        assert correlated(x, y.square()) < SIGMAS
        angles = torch.atan2(y, x).numpy()
        assert stats.kstest(angles, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > CHANCE


@pytest.mark.parametrize("n", SIZES)
def test_every_element_gets_noise_whatever_the_size(source: Noise, n: int) -> None:
    values = normals(source, n)
    assert int((values == 0).sum()) < 6  # with probability 4e-7 each, for what is rounded to a grid
    assert len(values.unique()) > 0.9 * n - 1  # 4 million multiples of the grid within 2 standard deviations
    assert values.abs().max() < 9.5


def test_an_empty_vector_and_no_noise_at_all(source: Noise) -> None:
    assert normals(source, 0).tolist() == []
    values = torch.tensor([0.1, -3e-12])
    source.add_normal(values, 0)
    assert values.tolist() == torch.tensor([0.1, -3e-12]).tolist()


def test_values_in_any_layout_are_changed_in_place(source: Noise) -> None:
    weights = torch.nn.Parameter(torch.zeros(2, 3, 50, 50).to(memory_format=torch.channels_last))
    rows = torch.zeros(100, 40)
    for values in (weights, rows.T[::2], torch.zeros(4, 5), torch.zeros(())):
        source.add_normal(values, 1.0)
        assert torch.count_nonzero(values) >= min(values.numel(), max(1, values.numel() - 5))
    assert torch.count_nonzero(rows[:, 1::2]) == 0


@pytest.mark.parametrize("values", [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, device="meta")])
def test_other_values_are_refused(source: Noise, values: Tensor) -> None:
    with pytest.raises(BadInput, match=r"noise is added to float32 or float64 on the CPU, not to torch\."):
        source.add_normal(values, 1.0)


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, 1e-40])
def test_a_deviation_that_is_none_is_refused(source: Noise, std: float) -> None:
    with pytest.raises(BadInput, match=r"must be 0 or from 1e-30 to 1e30, got"):
        source.add_normal(torch.zeros(3), std)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_rate_that_is_none_is_refused(source: Noise, rate: float) -> None:
    with pytest.raises(BadInput, match="a rate must be from 0 to 1, got"):
        source.chosen(3, rate)


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 0.5, 0.999])
def test_each_is_chosen_with_the_rate_and_by_itself(source: Noise, rate: float) -> None:
    first, second = source.chosen(N, rate), source.chosen(N, rate)
    for chosen in (first, second):
        assert chosen.dtype == torch.int64
        assert torch.equal(chosen, chosen.unique())
        assert chosen[0] >= 0
        assert chosen[-1] < N
        assert stats.binomtest(len(chosen), N, rate).pvalue > CHANCE
        assert stats.kstest((chosen + 0.5) / N, "uniform").pvalue > CHANCE
    both = np.intersect1d(first.numpy(), second.numpy())
    assert stats.binomtest(len(both), N, rate**2).pvalue > CHANCE
    neighbours = int((first.diff() == 1).sum())
    assert abs(neighbours - N * rate**2) < SIGMAS * math.sqrt(4 * N * rate**2) + SIGMAS**2  # variance < 4 of the mean


def test_none_and_all_are_chosen_for_certain(source: Noise) -> None:
    for n in (0, 1, noise._PIECE + 1):
        assert source.chosen(n, 0.0).tolist() == []
        assert source.chosen(n, 1.0).tolist() == list(range(n))
        assert source.chosen(n, 0.5).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_seeded_noise_is_what_torch_draws_at_once(n: int, dtype: torch.dtype) -> None:
    source, drawn = SeededNoise(7, "noise", n), generator(7, "noise", n)
    for std in (1.0, 0.3):  # the second call goes on where the first one ended
        values = torch.linspace(-1, 1, n, dtype=dtype)
        expected = values + std * torch.randn(n, generator=drawn, dtype=dtype)
        source.add_normal(values, std)
        torch.testing.assert_close(values, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=1e-7)


def test_seeded_noise_is_a_function_of_seed_and_path() -> None:
    assert torch.equal(normals(SeededNoise(1, "a", 2)), normals(SeededNoise(1, "a", 2)))
    for other in (SeededNoise(1, "a2"), SeededNoise(2, "a", 2), SeededNoise(1, "a", 3)):
        assert correlated(normals(SeededNoise(1, "a", 2)), normals(other)) < SIGMAS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1.0, 0.7, 1.9999, 3e-5, 1e-30, 1e30])
def test_system_noise_leaves_no_bits_below_a_grid_that_depends_on_std_alone(dtype: torch.dtype, std: float) -> None:
    hidden = [0.0, 1 / 3, -2 / 3 * 2**20, 1e-20]  # in units of std; exponents and low bits of all kinds
    for value in hidden:
        values = torch.full((1000,), value * std, dtype=dtype)
        SystemNoise().add_normal(values, std)
        grid = 2.0 ** (math.floor(math.log2(std)) - 20)
        multiples = values.double() / grid
        assert torch.equal(multiples, multiples.round())
        odd = multiples[multiples.abs() < (2**24 if dtype == torch.float32 else 2**53)].remainder(2)
        assert len(odd) == 0 or 0.3 < odd.mean() < 0.7  # none: where float32 has a coarser grid of its own


def test_system_noise_draws_nothing_twice_in_a_copy_or_a_fork() -> None:
    source = SystemNoise()
    mine, copied = normals(source, 50), normals(copy.deepcopy(source), 50)
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=draw, args=(source, sending))
    with started_quietly():
        child.start()
    forked = torch.tensor(receiving.recv(), dtype=torch.float64)
    child.join()
    for x, y in ((mine, copied), (mine, forked), (normals(source, 50), forked)):
        assert len(torch.cat([x, y]).unique()) > 90


def draw(source: SystemNoise, pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send(normals(source, 50).tolist())


@pytest.mark.parametrize("n", [0, 1, 3 * noise._PIECE + 5])
def test_words_are_uniform_in_every_bit(source: Noise, n: int) -> None:
    words = source.words(n)
    assert words.dtype == torch.int64
    assert words.shape == (n,)
    assert len(words.unique()) == n  # two of 100,000 are the same in one of 10^9 runs
    if n > 1:
        for bit in range(64):
            assert stats.binomtest(int((words >> bit & 1).sum()), n, 0.5).pvalue > CHANCE
        again = source.words(n)
        assert stats.kstest(words.double().numpy() / 2.0**64 + 0.5, "uniform").pvalue > CHANCE
        for x, y in ((words, again), (words[1:], words[:-1]), (words[: noise._PIECE], words[-noise._PIECE :])):
            assert correlated(x.double(), y.double()) < SIGMAS
            assert abs(int(((x ^ y) & 1).sum()) * 2 - len(x)) < SIGMAS * math.sqrt(len(x))


def test_seeded_words_are_a_function_of_seed_and_path() -> None:
    assert torch.equal(SeededNoise(1, "a").words(9), SeededNoise(1, "a").words(9))
    assert not torch.equal(SeededNoise(1, "a").words(9), SeededNoise(2, "a").words(9))
