"""Vectors as whole numbers modulo 2^bits with discrete Gaussian noise, and a sum of them as a vector again.

The distributed discrete Gaussian mechanism (Kairouz, Liu & Steinke, ICML 2021, arXiv 2102.06387, Algorithms 1 and 2):
each site rotates its vector at random, scales it, rounds it to whole numbers at random, adds discrete Gaussian noise
and reduces the result modulo 2^bits. Secure aggregation adds modulo 2^bits, and whoever reads the sum scales and
rotates it back. What is released is the sum with the noise of all sites; nobody needs to be trusted with less.

The rotation makes all elements about equally large, so that few bits are enough. It is a random sign for each element
and then an orthonormal discrete cosine transform (type 2), which has any length; the paper's Walsh-Hadamard transform
needs a power of two. No entry of the transform is above sqrt(2 / size), so that over the signs each element of a
rotated vector x is sub-Gaussian with the variance proxy 2 |x|^2 / size (Hoeffding), twice that of Walsh-Hadamard.
Nothing is kept secret by it: its seed may be public. It has to be drawn independently of the vectors for the sums to
stay in range, which is a matter of usefulness and not of privacy.

The guarantee rests on one check: a rounded vector, in whole numbers, has at most the squared norm `distance`^2, which
is computed without error. Randomised rounding is repeated until that holds (conditional rounding). With X the norm in
whole numbers the bound is X^2 + size / 4 + X + sqrt(size) / 2, the paper's for beta = exp(-1/2), with which a vector
passes with a probability of 1 - beta or more. The paper takes the smaller one of it and (X + sqrt(size))^2, which is
never smaller at this beta.

Limits: conditional rounding is not quite unbiased: see `Discretisation.deviation`. A sum that wraps around is not
noticed; `discretisation` makes it improbable. How often a vector is rounded, and how long noise takes to draw, shows in
the time of `at_site`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedelta.core.errors import BadInput
from fedelta.core.noise import Noise
from fedelta.core.seeds import generator
from fedelta.privacy.discrete_gaussian import (
    LEAST_VARIANCE,
    MOST_VARIANCE,
    concentrated,
    discrete_gaussian,
    exact_variance,
)

TOLERANCE = 1e-4  # how far above its bound a norm may be, relatively, and is scaled down to it: sums in float32 round
FINEST = 1e-4  # rounding that adds less than this, relatively, to the squared distance does not matter
COARSEST = 2.0  # the noise may be larger than without rounding by this factor at most
# The mean of an error of conditional rounding, as a vector, is at most this long, in whole numbers. Under independent
# rounding each element of the error is sub-Gaussian with the proxy 1/4 (Hoeffding), so that by Donsker and Varadhan a
# mean m under another distribution has 2 |m|^2 <= KL, and conditioning on an event E has KL = log(1 / P(E)).
BIAS = math.sqrt(-math.log(-math.expm1(-0.5)) / 2)
_MOST_SQUARE = 2.0**62  # of a rounded vector's norm, so that int64 holds it
_DIGITS = 53  # binary digits of the uniform numbers that decide on rounding

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Discretisation:
    """How a vector becomes whole numbers modulo 2^bits, with noise, and a sum of them a vector again."""

    size: int  # of a vector: numbers
    norm: float  # L2 bound that vectors keep, in their units
    granularity: float  # one whole number is so much, in units of the vectors
    variance: Fraction  # of the noise of one site, in whole numbers squared
    bits: Literal[16, 32]

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.norm < math.inf or not 0 < self.granularity < math.inf:
            raise BadInput(
                f"a discretisation needs size >= 1, and norm and granularity above 0, got {self.size}, {self.norm} and "
                f"{self.granularity}"
            )
        _check_bits(self.bits)
        if not LEAST_VARIANCE <= self.variance <= MOST_VARIANCE:
            raise BadInput(f"the variance of one site's noise must be from 1/4 to 2**52, got {self.variance}")
        if not _most_square(self.norm / self.granularity, self.size) < _MOST_SQUARE:
            raise BadInput(
                f"vectors of norm {self.norm} are too large in steps of {self.granularity}; use a larger granularity"
            )

    @cached_property
    def most_square(self) -> int:
        """The bound on the squared norm of a rounded vector, in whole numbers."""
        return math.floor(_most_square(self.norm / self.granularity, self.size))

    @property
    def distance(self) -> float:
        """The L2 norm that a rounded vector keeps, in whole numbers: how far one site can move the sum."""
        return _length(self.most_square)

    def rho(self, honest: int) -> float:
        """Of the zero-concentrated DP of a sum in which `honest` sites have added their noise, for one site's vector.

        Where the vector counts as 0 in the other data set. In place of another vector: 4 rho.
        """
        return _epsilon(self.distance, self.size, float(self.variance), honest) ** 2 / 2

    def at_site(self, vector: Tensor, noise: Noise, seed: int) -> Tensor:
        """What a site sends: whole numbers in [-2^(bits-1), 2^(bits-1)), float64 [size].

        `vector` is [size], float32 or float64, on the CPU. All sites of a sum take the same `seed`.
        Raises BadInput if the vector has another form, is not finite, or has a norm above `norm` (up to 1e-4 of it
        is taken for rounding, and scaled away).
        """
        rotated = _rotated(self._checked(vector), seed)
        rounded = self._rounded(rotated / self.granularity, noise)
        rounded += discrete_gaussian(noise, self.size, self.variance).numpy()
        return torch.from_numpy(centred(rounded, self.bits).astype(np.float64))

    def decoded(self, total: Tensor, seed: int) -> Tensor:
        """The estimate of the sum of the vectors, float64 [size].

        `total` is the sum of what sites sent, modulo 2^bits and centred as what they sent is. Raises BadInput for
        another number of elements.
        """
        if total.shape != (self.size,):
            raise BadInput(f"the sum must be of {self.size} numbers, got {tuple(total.shape)}")
        return torch.from_numpy(_rotated_back(total.double().numpy() * self.granularity, seed))

    def deviation(self, count: int) -> float:
        """How far `decoded` is from the sum of `count` vectors: root mean square over elements, in their units.

        The noise, and a bound for the rounding, as long as no sum wraps around: a variance of at most 1/4 for each site
        and element, and a bias of at most BIAS for each site, which is the length of a whole vector.
        """
        spread = count * (float(self.variance) + 0.25) + (BIAS * count) ** 2 / self.size
        return math.sqrt(spread) * self.granularity

    def _checked(self, vector: Tensor) -> Floats:
        if vector.shape != (self.size,) or vector.dtype not in (torch.float32, torch.float64):
            raise BadInput(
                f"a vector to be made discrete must be float32 or float64 with {self.size} numbers, got {vector.dtype} "
                f"with {tuple(vector.shape)}"
            )
        values: Floats = vector.detach().double().numpy()
        norm = float(np.linalg.norm(values))
        if not norm <= self.norm * (1 + TOLERANCE):  # also catches NaN
            raise BadInput(f"the norm of a vector is above its bound {self.norm}; clip it")  # by how much is private
        return values * (self.norm / norm) if norm > self.norm else values

    def _rounded(self, values: Floats, noise: Noise) -> Whole:
        """Up or down at random, so that the mean is kept, again and again until the norm is kept, too."""
        down = np.floor(values)
        up = ((values - down) * 2.0**_DIGITS).astype(np.int64)
        low = down.astype(np.int64)
        while True:
            rounded: Whole = low + ((noise.words(self.size).numpy() & (2**_DIGITS - 1)) < up)
            if int(rounded @ rounded) <= self.most_square:
                return rounded


def discretisation(
    *,
    size: int,
    norm: float,
    multiplier: float,
    cohort: int,
    honest: int,
    bits: Literal[16, 32] = 16,
    overflow: float = 1e-6,
) -> Discretisation:
    """The finest discretisation of vectors with which a sum over `cohort` sites fits into `bits` bits.

    Its noise is such that the noise of `honest` sites alone hides the vector of one as a Gaussian mechanism does with
    the noise multiplier `multiplier`: rho <= 1 / (2 multiplier^2), where the vector counts as 0 in the other data set.

    A sum wraps around in any element with a probability of at most `overflow`, whatever the vectors: the worst are all
    the same, with the norm `norm`. Nothing is gained by steps so fine that rounding no longer matters (FINEST), hence
    these are not made finer.

    Raises BadInput if no granularity fits, or rounding would make the noise more than twice as large.
    """
    _check_bits(bits)
    _check_mechanism(size, norm, multiplier)
    _check_sum(cohort, honest, overflow)
    room = (2.0 ** (bits - 1) - BIAS * cohort) / math.sqrt(2 * math.log(2 * size / overflow))

    def fits(steps: float) -> bool:
        variance = _variance(steps, size, multiplier, honest)
        return variance <= MOST_VARIANCE and _spread(steps, size, exact_variance(variance), cohort) <= room

    coarsest, finest = (_steps(size, over) for over in (COARSEST**2 - 1, FINEST))
    if not fits(coarsest):
        raise BadInput(
            f"sums over {cohort} sites of {size:,} numbers with a noise multiplier of {multiplier:.4g} (kept by "
            f"{honest} sites) do not fit into {bits} bits; "
            + ("use bits=32, " if bits == 16 else "ask ")
            + "fewer sites or less noise, or train fewer parameters"
        )
    steps = _largest(fits, coarsest, finest)
    return Discretisation(
        size=size,
        norm=norm,
        granularity=norm / steps,
        variance=exact_variance(_variance(steps, size, multiplier, honest)),
        bits=bits,
    )


def centred(values: Whole, bits: int) -> Whole:
    """Modulo 2^bits, in [-2^(bits-1), 2^(bits-1))."""
    half = 2 ** (bits - 1)
    reduced: Whole = ((values + half) & (2**bits - 1)) - half
    return reduced


def _most_square(steps: float, size: int) -> float:
    """The bound on the squared norm of a rounded vector, where the norm was `steps` before."""
    return steps**2 + size / 4 + steps + math.sqrt(size) / 2


def _length(square: int) -> float:
    """Its root, rounded up."""
    return math.nextafter(math.sqrt(square), math.inf)


def _steps(size: int, over: float) -> float:
    """The norm in whole numbers, X, with which the bound on the square is (1 + over) X^2: over X^2 - X - c = 0."""
    return (1 + math.sqrt(1 + 4 * over * (size / 4 + math.sqrt(size) / 2))) / (2 * over)


def _spread(steps: float, size: int, variance: Fraction, cohort: int) -> float:
    """The root of the variance proxy of an element of a sum of equal vectors with a norm of so many whole numbers.

    The element is the sum of what is rotated, with the proxy 2 (cohort * steps)^2 / size, of what rounding adds to its
    mean (which is at most cohort * BIAS), with cohort / 4, and of the noise, with cohort * variance: a discrete
    Gaussian is sub-Gaussian with its parameter (Canonne, Kamath & Steinke).
    """
    return math.sqrt(2 * (cohort * steps) ** 2 / size + cohort * (0.25 + float(variance)))


def _epsilon(distance: float, size: int, variance: float, honest: int) -> float:
    return concentrated(distance=distance, size=size, variance=variance, count=honest)


def _variance(steps: float, size: int, multiplier: float, honest: int) -> float:
    """The least variance of one site's noise, to 1e-9, with which `honest` of them are enough."""
    distance = _length(math.floor(_most_square(steps, size)))
    low = max(float(LEAST_VARIANCE), (distance * multiplier) ** 2 / honest)  # less is not enough even without tau

    def enough(variance: float) -> bool:
        return _epsilon(distance, size, variance, honest) <= 1 / multiplier

    if enough(low):
        return low
    high = 2 * low
    while not enough(high):
        low, high = high, 2 * high
    while high > low * (1 + 1e-9):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number, to 1e-6, from low, which fits, to high, that fits: beyond one that does not, none does."""
    if fits(high):
        return high
    while high > low * (1 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _rotated(values: Floats, seed: int) -> Floats:
    from scipy.fft import dct

    rotated: Floats = dct(values * _signs(len(values), seed), type=2, norm="ortho")
    return rotated


def _rotated_back(values: Floats, seed: int) -> Floats:
    from scipy.fft import idct

    back: Floats = idct(values, type=2, norm="ortho") * _signs(len(values), seed)
    return back


def _signs(size: int, seed: int) -> Floats:
    bits = torch.randint(0, 2, (size,), generator=generator(seed, "signs"), dtype=torch.int8).numpy()
    return 1.0 - 2.0 * bits


def _check_bits(bits: int) -> None:
    if bits not in (16, 32):
        raise BadInput(f"whole numbers are added modulo 2**16 or 2**32, got {bits} bits")


def _check_mechanism(size: int, norm: float, multiplier: float) -> None:
    if size < 1 or not 0 < norm < math.inf or not 1e-3 <= multiplier <= 1e3:
        raise BadInput(
            f"a discretisation needs size >= 1, norm > 0 and a noise multiplier from 0.001 to 1000, got {size}, {norm} "
            f"and {multiplier}"
        )


def _check_sum(cohort: int, honest: int, overflow: float) -> None:
    if not 1 <= honest <= cohort or not 0 < overflow < 1:
        raise BadInput(
            f"a sum needs 1 <= honest <= cohort and an overflow probability in (0, 1), got honest {honest}, cohort "
            f"{cohort} and overflow {overflow}"
        )
