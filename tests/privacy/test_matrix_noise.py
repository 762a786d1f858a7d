"""Correlated noise: against dense matrices, all participation patterns, and the best factorisation that there is."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz
from scipy.optimize import check_grad, minimize
from torch import Tensor

from fedelta.core import snapshot
from fedelta.core.errors import BadInput, BudgetSpent, CannotResume
from fedelta.core.noise import SeededNoise, SystemNoise
from fedelta.privacy.matrix_noise import NoiseState, Strategy, _log_error, optimised, square_root

Matrix = npt.NDArray[np.float64]


@st.composite
def strategies(draw: st.DrawFn, most: int = 9) -> Strategy:
    """Any Toeplitz matrix, also with negative and growing coefficients."""
    rounds = draw(st.integers(1, most))
    tail = draw(st.lists(st.floats(-2, 2), max_size=rounds - 1))
    return Strategy(coefficients=(1.0, *tail), rounds=rounds)


def dense(strategy: Strategy) -> Matrix:
    column = np.zeros(strategy.rounds)
    column[: strategy.bands] = strategy.coefficients
    return np.asarray(toeplitz(column, np.zeros(strategy.rounds)))


def streamed(strategy: Strategy, size: int, seed: int, std: float, dtype: torch.dtype = torch.float64) -> Matrix:
    """The noise of all rounds [rounds, size]."""
    noise, state, rows = SeededNoise(seed), strategy.start(size, dtype), []
    for _ in range(strategy.rounds):
        row, state = strategy.next(state, torch.zeros(size), noise, std)
        rows.append(row.numpy())
    return np.stack(rows)


def drawn(strategy: Strategy, size: int, seed: int, std: float) -> Matrix:
    """The independent draws behind it."""
    noise, rows = SeededNoise(seed), torch.zeros(strategy.rounds, size, dtype=torch.float64)
    for row in rows:
        noise.add_normal(row, std)
    return rows.numpy()


def patterns(rounds: int, separation: int, participations: int) -> Iterator[tuple[int, ...]]:
    """All sets of rounds in which a site may take part."""
    for count in range(1, participations + 1):
        for chosen in itertools.combinations(range(rounds), count):
            if all(b - a >= separation for a, b in itertools.pairwise(chosen)):
                yield chosen


@given(strategy=strategies(), seed=st.integers(0, 2**32))
def test_streamed_noise_solves_the_dense_system(strategy: Strategy, seed: int) -> None:
    expected = np.linalg.solve(dense(strategy), drawn(strategy, 3, seed, std=0.7))
    np.testing.assert_allclose(streamed(strategy, 3, seed, std=0.7), expected, rtol=1e-9, atol=1e-9)


def test_single_precision_stays_close_over_many_rounds() -> None:
    strategy = optimised(rounds=2000, bands=40, separation=40)
    rows = streamed(strategy, 5, 1, std=1.0, dtype=torch.float32).astype(np.float64)
    noise, exact = SeededNoise(1), torch.zeros(2000, 5)
    for row in exact:
        noise.add_normal(row, 1.0)
    np.testing.assert_allclose(dense(strategy) @ rows, exact.double().numpy(), atol=1e-5)


@settings(max_examples=200)
@given(strategy=strategies(), separation=st.integers(1, 9), participations=st.integers(1, 9))
def test_sensitivity_is_that_of_the_worst_pattern(strategy: Strategy, separation: int, participations: int) -> None:
    matrix = dense(strategy)
    worst = 0.0
    for chosen in patterns(strategy.rounds, separation, participations):
        if len(chosen) > 1 and strategy.bands > separation:
            with pytest.raises(BadInput, match="bands a site's turns must be"):
                strategy.sensitivity(separation, participations)
            return
        for signs in itertools.product((-1.0, 1.0), repeat=len(chosen)):
            worst = max(worst, float(np.linalg.norm(matrix[:, chosen] @ signs)))
    assert strategy.sensitivity(separation, participations) == pytest.approx(worst, rel=1e-12)


def test_contributions_of_any_direction_move_no_further() -> None:
    strategy = optimised(rounds=20, bands=5, separation=5)
    matrix, most = dense(strategy), strategy.sensitivity(5)
    random = np.random.default_rng(0)
    reached = 0.0
    for _ in range(200):
        moved = np.zeros((20, 3))
        moved[random.integers(5) :: 5] = 1
        moved *= random.normal(size=(20, 3))
        moved /= np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
        reached = max(reached, float(np.linalg.norm(matrix @ moved)))
    assert 0.999 * most < reached <= most * (1 + 1e-12)


def test_without_a_limit_a_site_takes_part_whenever_it_can() -> None:
    strategy = square_root(rounds=23, bands=4)
    assert strategy.sensitivity(5) == strategy.sensitivity(5, 5) == strategy.sensitivity(5, 99)
    assert strategy.sensitivity(5, 4) < strategy.sensitivity(5)


@given(strategy=strategies())
def test_error_is_that_of_the_dense_factorisation(strategy: Strategy) -> None:
    factor = np.tri(strategy.rounds) @ np.linalg.inv(dense(strategy))
    np.testing.assert_allclose(strategy.spread, np.linalg.norm(factor, axis=1), rtol=1e-9)
    expected = strategy.sensitivity(1, 1) * np.linalg.norm(factor) / math.sqrt(strategy.rounds)
    assert strategy.error(1, 1) == pytest.approx(expected)


def test_sums_of_noise_have_the_covariance_of_the_factorisation() -> None:
    samples, std = 40_000, 1.5
    strategy = optimised(rounds=12, bands=4, separation=4)
    sums = np.cumsum(streamed(strategy, samples, 3, std), axis=0)
    factor = np.tri(12) @ np.linalg.inv(dense(strategy)) * std
    expected = factor @ factor.T
    found = sums @ sums.T / samples
    variances = np.diag(expected)
    spread = np.sqrt((np.outer(variances, variances) + expected**2) / samples)
    assert np.abs((found - expected) / spread).max() < 5  # of 78 entries: exceeded once in some 20,000 seeds


def test_one_band_is_independent_noise() -> None:
    strategy = optimised(rounds=100, bands=1, separation=20)
    assert strategy.coefficients == (1.0,)
    np.testing.assert_array_equal(streamed(strategy, 2, 5, 1.0), drawn(strategy, 2, 5, 1.0))
    # five turns of a site, and t independent draws in the sum of t rounds
    assert strategy.error(20) == pytest.approx(math.sqrt(5 * 101 / 2))


def test_square_root_has_landaus_constants_as_its_largest_error() -> None:
    # the sum of the squared coefficients (Landau 1913), and its asymptote (Watson 1930)
    for rounds, constant in ((1, 1.0), (2, 1.25), (3, 1.390625)):
        strategy = square_root(rounds=rounds, bands=rounds)
        assert strategy.sensitivity(rounds) * strategy.spread[-1] == pytest.approx(constant)
    strategy = square_root(rounds=1000, bands=1000)
    asymptote = (math.log(1000) + np.euler_gamma + 4 * math.log(2)) / math.pi
    assert strategy.sensitivity(1000) * strategy.spread[-1] == pytest.approx(asymptote, abs=1e-3)
    np.testing.assert_allclose(dense(strategy) @ dense(strategy), np.tri(1000), atol=1e-12)


@pytest.mark.parametrize(
    ("rounds", "bands", "separation"),
    [(12, 4, 4), (24, 6, 6), (100, 5, 20), (100, 20, 20), (97, 7, 9), (2000, 100, 100)],
)
def test_optimised_beats_the_square_root_and_independent_noise(rounds: int, bands: int, separation: int) -> None:
    best = optimised(rounds=rounds, bands=bands, separation=separation)
    assert best == optimised(rounds=rounds, bands=bands, separation=separation)
    assert best.bands == bands
    error = best.error(separation)
    assert error < square_root(rounds=rounds, bands=bands).error(separation)
    assert error < 0.8 * square_root(rounds=rounds, bands=1).error(separation)
    fewer = optimised(rounds=rounds, bands=bands - 1, separation=separation)
    assert error < fewer.error(separation)


@pytest.mark.parametrize(("rounds", "separation", "times"), [(30, 6, 5), (30, 7, 2), (9, 9, 1)])
def test_gradient_is_that_of_finite_differences(rounds: int, separation: int, times: int) -> None:
    seen = np.array([sum(rounds - turn * separation > j for turn in range(times)) for j in range(6)], dtype=np.float64)
    at = np.array(square_root(rounds=rounds, bands=6).coefficients[1:]) * 0.7
    off = check_grad(lambda x: _log_error(x, rounds, seen)[0], lambda x: _log_error(x, rounds, seen)[1], at)
    assert off < 1e-6


def best_dense_error(rounds: int, bands: int, separation: int, participations: int) -> float:
    """The least error of all lower triangular C with that many bands (Choquette-Choo et al., NeurIPS 2023).

    No pattern's columns, which are orthogonal, may have more than length 1 together. As a problem in C^T C it is
    convex, so that what a local search finds is the least of all.
    """
    rows, columns = np.array([(i, j) for i in range(rounds) for j in range(max(0, i - bands + 1), i + 1)]).T
    workload = np.tri(rounds).T @ np.tri(rounds)
    inside = np.array([np.isin(columns, chosen) for chosen in patterns(rounds, separation, participations)])

    def objective(entries: Matrix) -> tuple[float, Matrix]:
        c = np.zeros((rounds, rounds))
        c[rows, columns] = entries
        inverse = np.linalg.inv(c)
        noise = inverse.T @ workload @ inverse
        return math.log(np.trace(noise)), -2 * (noise @ inverse.T)[rows, columns] / np.trace(noise)

    found = minimize(
        objective,
        np.where(rows == columns, 1 / math.sqrt(participations), 0.0),
        jac=True,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda c: 1 - inside @ c**2, "jac": lambda c: -2 * inside * c},
        options={"maxiter": 1000, "ftol": 1e-9},
    )
    assert found.success, found.message
    return math.sqrt(math.exp(found.fun) / rounds)


@pytest.mark.parametrize(("rounds", "bands", "separation"), [(16, 16, 16), (12, 4, 4), (12, 3, 4), (14, 5, 5)])
def test_optimised_is_close_to_the_best_of_all_matrices(rounds: int, bands: int, separation: int) -> None:
    best = best_dense_error(rounds, bands, separation, -(-rounds // separation))
    ours = optimised(rounds=rounds, bands=bands, separation=separation).error(separation)
    assert best < ours < 1.06 * best


@pytest.mark.parametrize("rounds", [16, 100, 500])
def test_nothing_beats_the_nuclear_norm(rounds: int) -> None:
    # ||A||_* <= ||B||_F ||C||_F for each A = B C, and the columns of C are at most as long as its sensitivity. The
    # singular values of the matrix of prefix sums are known (Elliott 1953).
    bound = sum(0.5 / math.sin((2 * i - 1) * math.pi / (4 * rounds + 2)) for i in range(1, rounds + 1)) / rounds
    assert np.linalg.norm(np.tri(rounds), "nuc") / rounds == pytest.approx(bound)
    best = optimised(rounds=rounds, bands=rounds, separation=rounds).error(rounds)
    assert bound < best < 1.08 * bound


def test_optimised_beats_tree_aggregation() -> None:
    rounds, levels = 64, 6
    nodes = [(i * 2**k, (i + 1) * 2**k) for k in range(levels + 1) for i in range(rounds >> k)]
    tree = np.array([[first <= t < end for t in range(rounds)] for first, end in nodes], dtype=np.float64)
    ends = np.array([end for _, end in nodes])
    plain = refined = 0.0
    for t in range(1, rounds + 1):
        plain += t.bit_count()  # nodes that make up the sum of t rounds (Kairouz et al., ICML 2021, section 3)
        known = tree[ends <= t]  # the best use of all nodes that are complete: no less than Honaker's
        refined += float(np.sum((np.tri(rounds)[t - 1] @ np.linalg.pinv(known)) ** 2))
    sensitivity = math.sqrt(levels + 1)  # a round is in one node of each level
    errors = [sensitivity * math.sqrt(total / rounds) for total in (refined, plain)]
    assert optimised(rounds=rounds, bands=rounds, separation=rounds).error(rounds) < errors[0] < errors[1]


def test_a_saved_state_goes_on_where_it_was(tmp_path: Path) -> None:
    strategy, noise = optimised(rounds=9, bands=4, separation=4), SeededNoise(2)
    state = strategy.start(6)
    for _ in range(5):
        row, state = strategy.next(state, torch.zeros(6), noise, 1.0)
        row.zero_()  # the caller's own
    snapshot.save(tmp_path / "state", state)
    again, _ = snapshot.load(tmp_path / "state", strategy.start(6))
    assert isinstance(again, NoiseState)
    assert (again.rounds, again.strategy) == (5, strategy)
    kept = state.before.clone()
    first, _ = strategy.next(state, torch.zeros(6), SeededNoise(3), 1.0)
    second, _ = again.strategy.next(again, torch.zeros(6), SeededNoise(3), 1.0)
    assert torch.equal(first, second)
    assert torch.equal(state.before, kept)
    expected: Tensor = torch.zeros(6, dtype=torch.float64)
    SeededNoise(3).add_normal(expected, 1.0)
    assert not torch.equal(first, expected)


def test_it_is_added_to_the_values_and_no_bit_of_theirs_is_left_below_it() -> None:
    """Of the operating system's noise, which is rounded to a grid; in all rounds, corrected or not."""
    strategy, state = optimised(rounds=6, bands=3, separation=3), None
    grid = 2.0**-21  # for std = 1
    for round in range(6):
        state = strategy.start(400) if state is None else state
        values = torch.randn(400, generator=torch.Generator().manual_seed(round)) / 3
        noised, state = strategy.next(state, values, SystemNoise(), 1.0)
        assert torch.equal(noised / grid, (noised / grid).round())
        torch.testing.assert_close(state.before[0].double(), noised - values, atol=1e-6, rtol=0)


def test_noise_ends_with_its_rounds() -> None:
    strategy, noise = square_root(rounds=2, bands=2), SeededNoise(0)
    state = strategy.start(1)
    for _ in range(2):
        _, state = strategy.next(state, torch.zeros(1), noise, 1.0)
    with pytest.raises(BudgetSpent, match="the noise is for 2 rounds, and they are over"):
        strategy.next(state, torch.zeros(1), noise, 1.0)
    with pytest.raises(CannotResume, match="for 2 rounds with 2 bands, and noise for 3 rounds with 2 bands does not"):
        square_root(rounds=3, bands=2).next(state, torch.zeros(1), noise, 1.0)


def test_what_makes_no_sense_is_refused() -> None:
    for coefficients in ((2.0, 1.0), (1.0, math.nan), (0.0,)):
        with pytest.raises(BadInput, match="finite coefficients and the first is 1"):
            Strategy(coefficients=coefficients, rounds=5)
    for bands in (0, 6):
        with pytest.raises(BadInput, match=f"needs 1 <= bands <= rounds, got {bands} bands for 5 rounds"):
            optimised(rounds=5, bands=bands, separation=5)
    with pytest.raises(BadInput, match="turns must be 5 or more rounds apart, got 4"):
        optimised(rounds=9, bands=5, separation=4)
    with pytest.raises(BadInput, match="separation of a site's rounds must be at least 1, got 0"):
        optimised(rounds=9, bands=1, separation=0)
    with pytest.raises(BadInput, match="got participations=0"):
        square_root(rounds=9, bands=1).sensitivity(1, 0)
    strategy = square_root(rounds=5, bands=1)
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(BadInput, match="standard deviation must be > 0 and finite"):
            strategy.next(strategy.start(1), torch.zeros(1), SeededNoise(0), std)
