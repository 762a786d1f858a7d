"""Noise that is correlated across rounds: matrix factorisation for the sums of all rounds so far (DP-FTRL).

The model after t rounds is the start plus the sum of t released aggregates, so that the noise in these prefix sums is
what matters, and noise of one round that later rounds take away again costs little. With G the rounds' exact sums as
rows, W independent Gaussian rows and C a lower triangular matrix, the rounds release G + C^-1 W = C^-1 (C G + W): one
Gaussian mechanism on C G, and post-processing (Denisov et al., NeurIPS 2022: also where later rows of G depend on what
was released). C is Toeplitz with b bands, C[t, t - j] = c_j for j < b, so that row t of the noise needs the b - 1 rows
before it. Kairouz et al., ICML 2021 (DP-FTRL); Choquette-Choo et al., "(Amplified) banded matrix factorization",
NeurIPS 2023 (bands, participation, sensitivity); Fichtenberger, Henzinger & Upadhyay, ICML 2023, and Kalinin & Lampert,
NeurIPS 2024 (square root, cut to b bands).

The guarantee. Neighbours differ in one site, whose updates (L2 norm at most `clip`) become zero in all rounds: who is
asked when is public and the same for both ("replace_special"). The whole run of `rounds` rounds is one Gaussian
mechanism with the noise multiplier z, where next() gets std = z * clip * sensitivity(...). It is charged in full before
the first release, and the rounds after it add nothing. Nothing is amplified by sampling, and none has to be trusted.

It holds only if the caller sees to this:
- Two rounds whose sums hold updates of the same site are at least `separation` apart, and there are at most
  `participations` of them.
- next() is called once in every round, also in one that nobody answers: a step left out brings turns closer together.
- A round's noise is used for one sum. A run that goes on from an earlier state with other draws is charged in full
  again: it releases a second sum for rounds that were released.

Limits: a state holds the noise of the last b - 1 rounds: whoever reads one (a snapshot, too) can take that noise away
again. It is b - 1 vectors as long as the model. The draws are floating-point numbers, not discrete Gaussians.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedelta.core.errors import BadInput, BudgetSpent, CannotResume
from fedelta.core.noise import Noise

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """C as its first column without the zeros. c_0 is 1: the scale of C is a matter of the standard deviation."""

    coefficients: tuple[float, ...]
    rounds: int

    def __post_init__(self) -> None:
        _check_sizes(self.rounds, self.bands)
        if self.coefficients[0] != 1 or not all(map(math.isfinite, self.coefficients)):
            raise BadInput(
                f"a strategy has finite coefficients and the first is 1, got {self.coefficients[:4]}; divide by it"
            )

    @property
    def bands(self) -> int:
        return len(self.coefficients)

    def sensitivity(self, separation: int, participations: int | None = None) -> float:
        """How far C G moves, in L2 norm, when all updates of one site, each of norm <= 1, become zero.

        It takes part at most `participations` times (None: as often as it can), in rounds that are `separation` or
        more apart. Raises BadInput if columns of C for two of its rounds overlap: their angle would matter.
        """
        times = _times(self.rounds, separation, participations)
        if times > 1 and self.bands > separation:
            raise BadInput(
                f"with noise of {self.bands} bands a site's turns must be {self.bands} or more rounds apart, got "
                f"{separation}; give fewer bands, or let sites wait longer"
            )
        seen = _seen(self.rounds, self.bands, separation, times)
        return math.sqrt(float(seen @ np.square(self.coefficients)))

    @cached_property
    def spread(self) -> Numbers:
        """The standard deviation of the noise in the sum of the first 1, 2, ... rounds, for std = 1."""
        first_column = _solve(np.array(self.coefficients), np.ones(self.rounds))
        spread: Numbers = np.sqrt(np.cumsum(first_column**2))
        return spread

    def error(self, separation: int, participations: int | None = None) -> float:
        """Root mean square, over all rounds, of the noise in the sum so far; per unit of multiplier times clip.

        It compares strategies at the same guarantee.
        """
        return self.sensitivity(separation, participations) * float(np.sqrt(np.mean(self.spread**2)))

    def start(self, size: int, dtype: torch.dtype = torch.float32) -> "NoiseState":
        """The state before the first round, for vectors of `size` numbers."""
        return NoiseState(strategy=self, before=torch.zeros(self.bands - 1, size, dtype=dtype))

    def next(self, state: "NoiseState", values: Tensor, noise: Noise, std: float) -> tuple[Tensor, "NoiseState"]:
        """The sum of a round's updates, `values` [size], with its noise, in float64; and the state after it.

        `std` is that of the independent draws W, the same in all rounds. They come last, on top of all else: where a
        source rounds what it gives (core/noise.py: SystemNoise), no bit of the values is left below that. Raises
        BudgetSpent after `rounds` rounds, and CannotResume for the state of another strategy.
        """
        if state.strategy != self:
            raise CannotResume(
                f"the noise so far is for {state.strategy.rounds} rounds with {state.strategy.bands} bands, and noise "
                f"for {self.rounds} rounds with {self.bands} bands does not continue it; begin a new run"
            )
        if state.rounds >= self.rounds:
            raise BudgetSpent(f"the noise is for {self.rounds} rounds, and they are over; begin a new run for more")
        if not 0 < std < math.inf:
            raise BadInput(f"the noise's standard deviation must be > 0 and finite, got {std}")
        corrected = torch.tensor(self.coefficients[1:], dtype=state.before.dtype) @ state.before
        noised = values.double() - corrected
        noise.add_normal(noised, std)
        before = torch.cat(((noised - values).to(state.before).unsqueeze(0), state.before))[: self.bands - 1]
        return noised, NoiseState(strategy=self, before=before, rounds=state.rounds + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseState:
    """The noise of the rounds before, newest first [bands - 1, size], and how many rounds there were."""

    strategy: Strategy
    before: Tensor
    rounds: int = 0


def square_root(*, rounds: int, bands: int) -> Strategy:
    """The first bands of the square root of the matrix of prefix sums: c_j = binom(2j, j) / 4^j.

    With all bands and one participation its largest error is the least of all Toeplitz matrices (Dvijotham et al.,
    FOCS 2024).
    """
    _check_sizes(rounds, bands)
    steps = np.arange(1, bands)
    return Strategy(coefficients=(1.0, *np.cumprod((2 * steps - 1) / (2 * steps)).tolist()), rounds=rounds)


def optimised(*, rounds: int, bands: int, separation: int, participations: int | None = None) -> Strategy:
    """The Toeplitz matrix with `bands` bands that has the least `Strategy.error`. Deterministic; no more than seconds.

    More bands, up to `separation`, are never worse; 1 is independent noise. A matrix that is not Toeplitz could have an
    error that is a few per cent less. Raises BadInput where `Strategy.sensitivity` does.
    """
    from scipy.optimize import minimize

    start = square_root(rounds=rounds, bands=bands)
    start.sensitivity(separation, participations)
    if bands == 1:
        return start
    seen = _seen(rounds, bands, separation, _times(rounds, separation, participations))
    found = minimize(
        _log_error,
        start.coefficients[1:],
        args=(rounds, seen),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-8},
    )
    return Strategy(coefficients=(1.0, *found.x.tolist()), rounds=rounds)


def _log_error(tail: Numbers, rounds: int, seen: Numbers) -> tuple[float, Numbers]:
    """The logarithm of `rounds` times the squared error for c = (1, *tail), and its gradient by the adjoint.

    The matrix of prefix sums times C^-1 is Toeplitz. Its first column v solves C v = (1, ..., 1), and v_t is in n - t
    of its n rows.
    """
    c = np.concatenate(([1.0], tail))
    v = _solve(c, np.ones(rounds))
    weighted = np.arange(rounds, 0, -1) * v
    adjoint = _solve(c, weighted, transposed=True)
    noise, sensitivity = float(weighted @ v), float(seen @ c**2)
    by_noise = np.array([-2 * (adjoint[j:] @ v[: rounds - j]) for j in range(1, len(c))])
    return math.log(noise) + math.log(sensitivity), by_noise / noise + 2 * seen[1:] * tail / sensitivity


def _solve(c: Numbers, right: Numbers, transposed: bool = False) -> Numbers:
    """x of C x = right, or of its transpose, in O(rounds * bands)."""
    from scipy.linalg.blas import dtbsv

    diagonals = np.repeat(c, len(right)).reshape(len(c), len(right))
    solved: Numbers = dtbsv(len(c) - 1, diagonals, right, lower=1, trans=int(transposed))
    return solved


def _times(rounds: int, separation: int, participations: int | None) -> int:
    """How often a site takes part at most. Raises BadInput for numbers below 1."""
    if separation < 1:
        raise BadInput(f"the separation of a site's rounds must be at least 1, got {separation}")
    if participations is not None and participations < 1:
        raise BadInput(f"a site takes part at least once, got participations={participations}")
    possible = -(-rounds // separation)
    return possible if participations is None else min(participations, possible)


def _seen(rounds: int, bands: int, separation: int, times: int) -> Numbers:
    """How often each c_j is in the columns of the worst site's rounds [bands].

    The columns of C end with it, so that later ones are shorter: the worst site starts at once and never waits longer
    than it has to. The columns do not overlap, so that signs do not matter.
    """
    left = rounds - separation * np.arange(times)
    seen: Numbers = (left[:, None] > np.arange(bands)).sum(axis=0, dtype=np.float64)
    return seen


def _check_sizes(rounds: int, bands: int) -> None:
    if not 1 <= bands <= rounds:
        raise BadInput(f"correlated noise needs 1 <= bands <= rounds, got {bands} bands for {rounds} rounds")
