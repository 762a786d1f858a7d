"""The sampler against the distribution's exact table and a slow twin, and the guarantee against formulas of others."""

import math
import random
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq, minimize_scalar

from fedelta.core.errors import BadInput
from fedelta.core.noise import SeededNoise, SystemNoise
from fedelta.core.release import Release
from fedelta.privacy import events
from fedelta.privacy.accounting import epsilon
from fedelta.privacy.discrete_gaussian import (
    _accepted,
    _exponential,
    _Words,
    concentrated,
    discrete_gaussian,
    exact_variance,
)

CHANCE = 1e-3  # of a test to fail with another seed; with this one, none does


def table(variance: float, most: int) -> npt.NDArray[np.float64]:
    """P(-most), ..., P(most), to float64; the tails are counted with both ends."""
    wide = np.arange(-most - int(12 * math.sqrt(variance)) - 12, most + int(12 * math.sqrt(variance)) + 13)
    weights = np.exp(-(wide.astype(np.float64) ** 2) / (2 * variance))
    weights /= weights.sum()
    inner = weights[np.abs(wide) <= most]
    inner[[0, -1]] += weights[wide > most].sum()
    return inner


def goodness(samples: npt.NDArray[np.int64], variance: float) -> float:
    """p-value of a chi-square test; what is expected fewer than 20 times is one bin at each end."""
    most = 0
    while len(samples) * table(variance, most + 1)[0] > 20:
        most += 1
    counts = np.bincount(np.clip(samples, -most, most) + most, minlength=2 * most + 1)
    return float(stats.chisquare(counts, len(samples) * table(variance, most)).pvalue)


# The sampler


@pytest.mark.parametrize(
    "variance",
    [Fraction(1, 16), Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(935, 128), Fraction(30**2)],
    ids=str,
)
def test_samples_are_those_of_the_exact_distribution(variance: Fraction) -> None:
    samples = discrete_gaussian(SeededNoise(1, "exact"), 200_000, variance)
    assert samples.dtype == torch.int64
    assert goodness(samples.numpy(), float(variance)) > CHANCE


def test_the_test_sees_a_variance_that_is_off_by_three_percent() -> None:
    samples = discrete_gaussian(SeededNoise(1, "exact"), 200_000, Fraction(9))
    assert goodness(samples.numpy(), 9.0) > CHANCE
    assert goodness(samples.numpy(), 9.27) < 1e-6


@pytest.mark.parametrize("std", [2.0**10, 2.0**20, 2.0**26])
def test_wide_noise_is_like_a_gaussian(std: float) -> None:
    samples = discrete_gaussian(SeededNoise(1, "wide"), 100_000, Fraction(int(std**2))).numpy()
    assert stats.kstest(samples / std, "norm").pvalue > CHANCE
    assert abs(np.mean(samples % 2) - 0.5) < 4 / math.sqrt(4 * len(samples))  # and its lowest bit is even


def slow(variance: Fraction, rng: random.Random) -> int:
    """Algorithms 1 to 3 of Canonne, Kamath & Steinke, in fractions, one by one."""

    def bernoulli(chance: Fraction) -> bool:
        return rng.randrange(chance.denominator) < chance.numerator

    def exponential(x: Fraction) -> bool:
        while x > 1:
            if not exponential(Fraction(1)):
                return False
            x -= 1
        k = 1
        while bernoulli(x / k):
            k += 1
        return k % 2 == 1

    def laplace(scale: int) -> int:
        while True:
            rest = rng.randrange(scale)
            if not exponential(Fraction(rest, scale)):
                continue
            whole = 0
            while exponential(Fraction(1)):
                whole += 1
            size, negative = rest + scale * whole, rng.randrange(2)
            if not (negative and size == 0):
                return -size if negative else size

    scale = math.isqrt(variance.numerator // variance.denominator) + 1
    while True:
        proposed = laplace(scale)
        if exponential((abs(proposed) - variance / scale) ** 2 / (2 * variance)):
            return proposed


@pytest.mark.parametrize("variance", [Fraction(1, 2), Fraction(27, 4)], ids=str)
def test_a_slow_twin_draws_from_the_same_distribution(variance: Fraction) -> None:
    rng = random.Random(5)
    twins = np.array([slow(variance, rng) for _ in range(4000)])
    samples = discrete_gaussian(SeededNoise(1, "twin"), 40_000, variance).numpy()
    assert goodness(twins, float(variance)) > CHANCE
    most = int(3 * math.sqrt(variance)) + 1
    both = [np.bincount(np.clip(some, -most, most) + most, minlength=2 * most + 1) for some in (twins, samples)]
    assert stats.chi2_contingency(both).pvalue > CHANCE


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(5, 2), Fraction(10**6), Fraction(2**52)], ids=str)
@pytest.mark.parametrize("scales", [0.0, 0.4, 1.3, 2.0, 3.1])
def test_a_proposal_is_kept_with_the_probability_of_the_paper(variance: Fraction, scales: float) -> None:
    """Rare ones, too, for which the exponent is taken apart into all four products."""
    n, scale = 40_000, math.isqrt(int(variance)) + 1
    proposed = round(scales * scale)
    places = _accepted(
        _Words(SeededNoise(2, "kept"), 2**15),
        np.full(n, proposed, dtype=np.int64),
        scale,
        variance.numerator,
        variance.denominator,
    )
    exponent = (proposed - variance / scale) ** 2 / (2 * variance)
    assert stats.binomtest(len(places), n, math.exp(-exponent)).pvalue > CHANCE
    assert len(set(places.tolist())) == len(places)


def test_no_proposal_overflows() -> None:
    words = _Words(SeededNoise(3, "far"), 2**15)
    for variance in (exact_variance(0.25), exact_variance(7.77), Fraction(2**52), Fraction(2**54 - 1)):
        scale = math.isqrt(int(variance)) + 1
        assert 127 * variance.denominator * scale**2 + variance.numerator < 2**63
        far = np.arange(100, 128, dtype=np.int64) * scale
        assert len(_accepted(words, far, scale, variance.numerator, variance.denominator)) == 0


@pytest.mark.parametrize("share", [0, 1, 5, 8])
def test_exponential_coins(share: int) -> None:
    words, n = _Words(SeededNoise(4, "coins"), 2**10), 50_000

    def eighths(of: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return words.take(len(of)) % 8 < share

    coins = _exponential(words, np.arange(n), eighths)
    assert stats.binomtest(int(coins.sum()), n, math.exp(-share / 8)).pvalue > CHANCE


@pytest.mark.parametrize("below", [1, 2, 3, 2**61 + 1, 2**62])
def test_numbers_below_a_limit_are_uniform(below: int) -> None:
    """Also where half of all words are beyond the last multiple."""
    words = _Words(SeededNoise(5, "below"), 2**10)
    drawn, each = words.below(30_000, below)
    numbers = drawn // each
    assert numbers.min() >= 0
    assert numbers.max() < below
    sixths = np.bincount((numbers.astype(object) * 6 // below).astype(int), minlength=6)
    possible = np.unique([part * 6 // below for part in range(min(below, 6))]) if below < 6 else np.arange(6)
    assert stats.chisquare(sixths[possible]).pvalue > CHANCE or below == 1


def test_noise_repeats_with_its_seed_and_not_from_the_system() -> None:
    once, again = (discrete_gaussian(SeededNoise(7, "site"), 1000, Fraction(900)) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, discrete_gaussian(SeededNoise(8, "site"), 1000, Fraction(900)))
    source = SystemNoise()
    first, second = (discrete_gaussian(source, 1000, Fraction(900)) for _ in range(2))
    assert int((first == second).sum()) < 100  # 10 are expected
    assert discrete_gaussian(source, 0, Fraction(900)).tolist() == []


@pytest.mark.parametrize("variance", [Fraction(0), Fraction(-1), Fraction(1, 3), Fraction(2**56), Fraction(1, 2**60)])
def test_a_variance_out_of_range_is_refused(variance: Fraction) -> None:
    with pytest.raises(BadInput, match="exact_variance"):
        discrete_gaussian(SystemNoise(), 3, variance)


@given(at_least=st.floats(0.25, 2.0**52))
def test_a_variance_is_rounded_up_by_a_thousandth_at_most(at_least: float) -> None:
    variance = exact_variance(at_least)
    assert Fraction(at_least) <= variance <= Fraction(at_least) * Fraction(1001, 1000)
    assert variance.denominator.bit_count() == 1
    assert len(discrete_gaussian(SeededNoise(1, "any"), 3, variance)) == 3


@pytest.mark.parametrize("at_least", [0.2, 2.0**53, math.nan, math.inf])
def test_a_variance_that_cannot_be_is_refused(at_least: float) -> None:
    with pytest.raises(BadInput, match="must be from 1/4 to"):
        exact_variance(at_least)


# What sums guarantee


def tau_of(variance: float, count: int) -> float:
    return 10 * sum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, count))


@pytest.mark.parametrize(("variance", "count"), [(0.25, 2), (0.25, 9), (1.0, 1), (4.0, 60), (0.5, 6)])
def test_a_sum_is_as_close_to_a_discrete_gaussian_as_the_theorem_says(variance: float, count: int) -> None:
    """The exact convolution; the logarithms of probabilities differ by tau / 2 at most."""
    most = 40 + int(12 * math.sqrt(variance * count))
    k = np.arange(-most, most + 1)
    one = np.exp(-(k**2) / (2 * variance))
    one /= one.sum()
    total = np.array([1.0])
    for _ in range(count):
        total = np.convolve(total, one)
    middle = len(total) // 2
    near = np.arange(-int(4 * math.sqrt(variance * count)) - 1, int(4 * math.sqrt(variance * count)) + 2)
    gaussian = np.exp(-(near**2) / (2 * variance * count))
    wide = np.arange(-most, most + 1)
    gaussian /= np.exp(-(wide**2) / (2 * variance * count)).sum()
    apart = np.abs(np.log(total[middle + near] / gaussian)).max()
    assert apart <= tau_of(variance, count) / 2 + 1e-12


@pytest.mark.parametrize(("variance", "count"), [(100.0, 50), (9.0, 1), (0.25, 1)])
def test_without_an_excess_it_is_a_gaussian_mechanism(variance: float, count: int) -> None:
    expected = 7.0 / math.sqrt(count * variance)
    assert concentrated(distance=7.0, size=1000, variance=variance, count=count) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("variance", "count", "size"), [(0.25, 3, 10), (0.5, 100, 1000), (0.7, 5000, 10**6), (1, 9, 4)]
)
def test_the_formula_of_the_paper(variance: float, count: int, size: int) -> None:
    distance, tau = 5000.0, tau_of(variance, count)  # so large that every element may differ
    apart = distance / math.sqrt(count * variance)
    expected = min(math.sqrt(apart**2 + 2 * tau * size), apart + tau * math.sqrt(size))
    found = concentrated(distance=distance, size=size, variance=variance, count=count)
    assert found == pytest.approx(expected, rel=1e-9 if count < 4096 else 1e-3)  # beyond, terms are bounded together
    assert found >= expected * (1 - 1e-12)
    # two that differ by 1 differ in one element only, however many there are
    assert concentrated(distance=1.0, size=size, variance=variance, count=count) == concentrated(
        distance=1.0, size=1, variance=variance, count=count
    )


@pytest.mark.parametrize(("variance", "count", "distance"), [(0.25, 2, 1), (0.25, 6, 2), (0.5, 3, 3), (2.0, 10, 4)])
def test_renyi_divergences_of_sums_keep_it(variance: float, count: int, distance: int) -> None:
    """The exact distribution of a sum against the same, shifted."""
    k = np.arange(-30, 31)
    one = np.exp(-(k**2) / (2 * variance))
    one /= one.sum()
    total = np.array([1.0])
    for _ in range(count):
        total = np.convolve(total, one)
    total = total[total > 1e-60]  # the rest adds next to nothing to the sums below
    p, q = total[distance:], total[:-distance]
    rho = concentrated(distance=float(distance), size=1, variance=variance, count=count) ** 2 / 2
    for order in (1.01, 1.5, 2.0, 4.0):
        divergence = math.log(float(np.sum(p**order * q ** (1 - order)))) / (order - 1)
        assert divergence <= rho * order * (1 + 1e-9)


@given(
    variance=st.floats(0.25, 100),
    count=st.integers(1, 10**6),
    size=st.integers(1, 10**6),
    distance=st.floats(0.1, 1e4),
)
def test_more_noise_hides_more(variance: float, count: int, size: int, distance: float) -> None:
    found = concentrated(distance=distance, size=size, variance=variance, count=count)
    assert concentrated(distance=distance, size=size, variance=1.1 * variance, count=count) < found
    assert concentrated(distance=1.1 * distance, size=size, variance=variance, count=count) > found
    assert concentrated(distance=distance, size=size + 1, variance=variance, count=count) >= found
    assert found >= distance / math.sqrt(count * variance)


@pytest.mark.parametrize(
    "bad", [{"variance": 0.2}, {"variance": math.nan}, {"distance": 0.0}, {"size": 0}, {"count": 0}], ids=str
)
def test_numbers_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="a sum of discrete Gaussians hides"):
        concentrated(**{"distance": 1.0, "size": 1, "variance": 1.0, "count": 1} | bad)  # type: ignore[arg-type]


# Through the ledger


def ledger_epsilon(hidden: float, count: int, delta: float) -> float:
    event = events.concentrated(hidden**2 / 2)
    release = Release(event=event, unit="site", relation="replace_special")
    return epsilon([release] * count, delta=delta, accountant="rdp", unit="site")


def canonne(rho: float, delta: float) -> float:
    """The epsilon for which inf over alpha > 1 of the delta of Canonne et al., Proposition 12, is `delta`."""

    def least(limit: float) -> float:
        def log_delta(order: float) -> float:
            return (order - 1) * (order * rho - limit) + (order - 1) * math.log1p(-1 / order) - math.log(order)

        return float(minimize_scalar(lambda x: log_delta(1 + math.exp(x)), bounds=(-8, 8), method="bounded").fun)

    return float(brentq(lambda limit: least(limit) - math.log(delta), 1e-6, 1e4))


@pytest.mark.parametrize(("hidden", "count"), [(0.1, 1), (0.5, 1), (1.0, 20), (2.0, 3)])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_the_ledger_converts_as_canonne_kamath_and_steinke_do(hidden: float, count: int, delta: float) -> None:
    expected = canonne(count * hidden**2 / 2, delta)
    # the ledger has a list of orders, and may be above by the coarseness of that
    assert expected - 1e-6 <= ledger_epsilon(hidden, count, delta) <= 1.01 * expected


@pytest.mark.parametrize(
    ("sites", "bits", "target"), [(100, 12, 0.75), (100, 16, 3.0), (1000, 14, 6.0), (1000, 16, 1.0)]
)
def test_settings_of_the_authors_spend_what_they_were_made_for(sites: int, bits: int, target: float) -> None:
    """Mean estimation, google-research/federated, distributed_dp/dme_run.py: norm 10, 250 numbers padded to 256, delta
    1e-5, beta exp(-1/2), two standard deviations fit into the modulus; `ddgauss_params` solves for granularity and
    noise, with the Renyi divergences of Proposition 14 at whole orders.
    """
    norm, size, delta = 10.0, 256, 1e-5
    orders = np.array([*range(2, 129), 256], dtype=np.float64)

    def square(step: float) -> float:
        return (norm / step) ** 2 + size / 4 + norm / step + math.sqrt(size) / 2

    def their_epsilon(step: float, std: float) -> float:
        tau = tau_of(std**2, sites)
        l2 = math.sqrt(square(step) / sites) / std
        l1 = l2 * min(math.sqrt(size), math.sqrt(square(step)))
        forms = [
            orders / 2 * l2**2 + tau * size,
            orders / 2 * (l2**2 + 2 * l1 * tau + tau**2 * size),
            orders / 2 * (l2 + math.sqrt(size) * tau) ** 2,
        ]
        spent = np.min(forms, axis=0)
        return float(np.min(spent + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)))

    def std_of(step: float) -> float:
        return float(brentq(lambda std: their_epsilon(step, std) - target, 0.3, 1e6))

    def room(step: float) -> float:
        spread = (norm * sites) ** 2 / size + sites * step**2 * (0.25 + std_of(step) ** 2)
        return 2 * 2 * math.sqrt(spread) / step - 2.0**bits

    step = float(brentq(room, 1e-3, 10.0))
    std = std_of(step)
    hidden = concentrated(distance=math.sqrt(square(step)), size=size, variance=std**2, count=sites)
    assert ledger_epsilon(hidden, 1, delta) == pytest.approx(target, rel=0.01)
