"""The discrete Gaussian distribution: exact samples, and what sums of them guarantee.

N_Z(0, variance) gives each whole number k a probability proportional to exp(-k^2 / (2 variance)). Sampling: Canonne,
Kamath & Steinke, NeurIPS 2020 (arXiv 2004.00010), Algorithms 1 to 3: rejection from a discrete Laplace distribution,
with Bernoulli(exp(-x)) from uniform numbers. All decisions are made in whole numbers: nothing is rounded, and the
samples have the distribution exactly, as far as the words of the source are uniform and independent.

Sums: Kairouz, Liu & Steinke, ICML 2021 (arXiv 2102.06387). A sum of discrete Gaussians is not a discrete Gaussian, but
so close to one that it hides almost as well.

Limits: the time that sampling takes depends on what is drawn.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedelta.core.errors import BadInput
from fedelta.core.noise import Noise

Whole = npt.NDArray[np.int64]
Coins = npt.NDArray[np.bool_]

LEAST_VARIANCE = Fraction(1, 4)  # of the theorem about sums
MOST_VARIANCE = Fraction(2**52)
CLOSE = Fraction(1, 1000)  # how far above a wanted variance `exact_variance` may be, relatively
_AT_ONCE = 2**15  # proposals: what is worked on stays in the cache
_MOST_UNITS = 2**55  # of q t^2 and p (see _accepted)
_FARTHEST = 126  # in scales of the Laplace distribution: with it, q t |Y| stays below 2^62
_EXACT_TERMS = 4096  # of tau


def exact_variance(at_least: float) -> Fraction:
    """The wanted variance, rounded up by at most 0.1 %, with a power of two as its denominator, as small as it can be.

    Raises BadInput outside 1/4 .. 2^52.
    """
    if not LEAST_VARIANCE <= at_least <= MOST_VARIANCE:
        raise BadInput(f"the variance of discrete Gaussian noise must be from 1/4 to 2**52, got {at_least}")
    wanted, q = Fraction(at_least), 1
    while math.ceil(wanted * q) > (1 + CLOSE) * wanted * q:
        q *= 2
    return Fraction(math.ceil(wanted * q), q)


def discrete_gaussian(noise: Noise, n: int, variance: Fraction) -> Tensor:
    """n independent samples (int64) of N_Z(0, variance).

    `variance` is p / q, above 0, with q a power of two; p and q (floor(sqrt(p / q)) + 1)^2 are at most 2^55. All that
    `exact_variance` returns is within that. A sample is at most 127 (sqrt(variance) + 1) in magnitude: of what lies
    beyond, none would be drawn in 10^3000 years.

    Raises BadInput for another variance, or n < 0.
    """
    p, q = variance.numerator, variance.denominator
    scale = math.isqrt(p // q) + 1 if p > 0 else 1
    if not 0 < p <= _MOST_UNITS or q & (q - 1) or q * scale**2 > _MOST_UNITS or n < 0:
        raise BadInput(
            f"discrete Gaussian noise needs n >= 0 and a variance > 0 within 2**55 units whose denominator is a power "
            f"of two, got n {n} and variance {variance}; exact_variance() rounds one to what is possible"
        )
    words = _Words(noise, min(_AT_ONCE, 256 + 8 * n))
    samples, found = np.empty(n, dtype=np.int64), 0
    while found < n:
        # about half of the proposals are kept where the variance is large
        proposed = _laplace(words, min(_AT_ONCE, 64 + 2 * (n - found)), scale)
        kept = proposed[_accepted(words, proposed, scale, p, q)][: n - found]
        samples[found : found + len(kept)] = kept
        found += len(kept)
    return torch.from_numpy(samples)


def concentrated(*, distance: float, size: int, variance: float, count: int) -> float:
    """Epsilon of the 1/2 epsilon^2-concentrated DP of a sum with `count` independent N_Z(0, variance) in each element.

    For vectors of `size` whole numbers that differ by at most `distance` in L2 norm (a bound above 0). rho is
    epsilon^2 / 2.

    With tau = 10 * sum_{k=1}^{count-1} exp(-2 pi^2 variance k / (k + 1)), the logarithm of the sum's probability of a
    number differs from that of N_Z(0, count * variance) by at most tau / 2 (Kairouz, Liu & Steinke, section 3, for
    variance >= 1/4). With s = distance / sqrt(count * variance), and m the number of elements that differ, this gives
    Renyi divergences of at most alpha s^2 / 2 + tau m, and epsilon = s + tau sqrt(m): the first and the last form of
    their Proposition 14, which has m = size. Whole numbers that differ by `distance` do so in at most distance^2
    elements. The result is the smaller of sqrt(s^2 + 2 tau m), which bounds the former for all alpha >= 1, and the
    latter.

    Raises BadInput for a variance below 1/4, or a number out of range.
    """
    if not (distance > 0 and size >= 1 and count >= 1 and LEAST_VARIANCE <= variance < math.inf):
        raise BadInput(
            f"a sum of discrete Gaussians hides a distance above 0, with a variance of at least 1/4, got distance "
            f"{distance}, size {size}, variance {variance}, count {count}; scale the vectors up"
        )
    apart = distance / math.sqrt(count * variance)
    tau, differ = _tau(variance, count), min(float(size), distance**2)
    return min(math.sqrt(apart**2 + 2 * tau * differ), apart + tau * math.sqrt(differ))


def _tau(variance: float, count: int) -> float:
    """Exact for the first terms; all others are counted as the largest of them."""
    k = np.arange(1, min(count, _EXACT_TERMS), dtype=np.float64)
    terms = float(np.exp(-2 * math.pi**2 * variance * (k / (k + 1))).sum())
    share = _EXACT_TERMS / (_EXACT_TERMS + 1)
    return 10 * (terms + max(0, count - _EXACT_TERMS) * math.exp(-2 * math.pi**2 * variance * share))


class _Words:
    """Words of 63 bits, of which many are drawn at a time; what is left over is thrown away."""

    def __init__(self, noise: Noise, at_once: int) -> None:
        self._noise = noise
        self._at_once = at_once
        self._left: Whole = np.empty(0, dtype=np.int64)

    def take(self, n: int) -> Whole:
        """n independent uniform numbers in 0 .. 2^63 - 1."""
        if n > len(self._left):
            self._left = self._noise.words(max(n, self._at_once)).numpy() & (2**63 - 1)
        taken, self._left = self._left[:n], self._left[n:]
        return taken

    def below(self, n: int, b: int) -> tuple[Whole, int]:
        """n uniform numbers in 0 .. b * each - 1, and `each`, the largest for which 63 bits hold them; b <= 2^62."""
        if b == 1:
            return np.zeros(n, dtype=np.int64), 1
        each = 2**63 // b
        last = b * each - 1
        drawn = self.take(n)
        while (again := (drawn > last).nonzero()[0]).size:
            drawn[again] = self.take(len(again))
        return drawn, each


def _accepted(words: _Words, proposed: Whole, scale: int, p: int, q: int) -> Whole:
    """The places of those Y that Bernoulli(exp(-(|Y| - p / (q t))^2 q / (2 p))) keeps: Algorithm 3, t being the scale.

    The exponent is N^2 / (2 p q t^2) with N = | |Y| q t - p |. Its numerator would not fit into 64 bits, hence it is
    taken as a product of N / (q t^2) = i + f and N / (2 p) = j + g, with whole i, j and fractions f, g, and
    exp(-(i + f)(j + g)) as the product of the four probabilities exp(-i j), exp(-i g), exp(-f j) and exp(-f g).
    """
    n = np.abs(np.abs(proposed) * (q * scale) - p)
    first, second = q * scale**2, 2 * p
    i, f = np.divmod(n, first)
    j, g = np.divmod(n, second)

    def both(of: Whole) -> Coins:
        coins = _coins(words, f[of], first)
        coins[coins] = _coins(words, g[of[coins]], second)
        return coins

    alive = np.arange(len(n))
    alive = alive[_repeated(words, alive, i * j, _certain)]
    alive = alive[_repeated(words, alive, i, lambda of: _coins(words, g[of], second))]
    alive = alive[_repeated(words, alive, j, lambda of: _coins(words, f[of], first))]
    return alive[_exponential(words, alive, both)]


def _laplace(words: _Words, n: int, scale: int) -> Whole:
    """Discrete Laplace numbers, P(x) proportional to exp(-|x| / scale): of n proposals those that were kept.

    Algorithm 2 without its second number (s = 1).
    """
    rest = _below(words, n, scale)
    rest = rest[_exponential(words, np.arange(n), lambda of: _coins(words, rest[of], scale))]
    whole = np.zeros(len(rest), dtype=np.int64)
    alive = np.arange(len(rest))
    while len(alive):
        alive = alive[_exponential(words, alive, _certain)]
        whole[alive] += 1
    size = rest + scale * whole
    negative = (words.take(len(size)) & 1) == 0
    kept = ~(negative & (size == 0)) & (whole <= _FARTHEST)
    laplace: Whole = np.where(negative, -size, size)[kept]
    return laplace


def _repeated(words: _Words, of: Whole, times: Whole, chance: Callable[[Whole], Coins]) -> Coins:
    """Bernoulli(exp(-times[i] * x_i)) for each i in `of`, where chance(some) draws Bernoulli(x_i) for some of them."""
    kept = np.ones(len(of), dtype=np.bool_)
    alive, turn = times[of].nonzero()[0], 0
    while len(alive):
        coins = _exponential(words, of[alive], chance)
        kept[alive[~coins]] = False
        turn += 1
        alive = alive[coins & (times[of[alive]] > turn)]
    return kept


def _exponential(words: _Words, of: Whole, chance: Callable[[Whole], Coins]) -> Coins:
    """Bernoulli(exp(-x_i)) for each i in `of`, where chance(some) draws Bernoulli(x_i) for some of them; 0 <= x_i <= 1.

    Algorithm 1: draw Bernoulli(x / k) for k = 1, 2, ... until one fails; whether it fails at an odd k. Bernoulli(x / k)
    is Bernoulli(x) and Bernoulli(1 / k).
    """
    odd = np.zeros(len(of), dtype=np.bool_)
    alive, k = np.arange(len(of)), 1
    while len(alive):
        lasts = chance(of[alive])
        if k > 1:
            lasts[lasts] = _below(words, int(lasts.sum()), k) == 0
        if k % 2:
            odd[alive[~lasts]] = True
        alive, k = alive[lasts], k + 1
    return odd


def _certain(of: Whole) -> Coins:
    """Bernoulli(1)."""
    return np.ones(len(of), dtype=np.bool_)


def _coins(words: _Words, a: Whole, b: int) -> Coins:
    """Bernoulli(a / b) for 0 <= a < b."""
    drawn, each = words.below(len(a), b)
    coins: Coins = drawn < a * each
    return coins


def _below(words: _Words, n: int, b: int) -> Whole:
    """Uniform in 0 .. b - 1."""
    drawn, each = words.below(n, b)
    below: Whole = drawn // each
    return below
