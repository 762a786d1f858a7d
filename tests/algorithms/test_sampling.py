"""Cohorts: who is in, how often, and that seed and round decide it."""

import math
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.algorithms.sampling import All, Cyclic, Fixed, Poisson, Sampling
from fedelta.core.errors import BadInput

SITES = [f"site-{i}" for i in range(10)]
ROUNDS = 4000


@given(
    parties=st.lists(st.text(), unique=True, min_size=3, max_size=30),
    round=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
    sampling=st.sampled_from([All(), Fixed(size=3), Poisson(rate=0.4), Cyclic(groups=3)]),
)
def test_a_cohort_is_a_subset_in_the_order_of_the_parties(
    parties: list[str], round: int, seed: int, sampling: Sampling
) -> None:
    cohort = sampling(tuple(parties), round, seed)
    assert cohort == [party for party in parties if party in set(cohort)]
    assert cohort == sampling(parties, round, seed)


def test_all_asks_every_site() -> None:
    assert All()(SITES, 3, 0) == SITES
    assert All()([], 3, 0) == []


def test_fixed_takes_every_subset_equally_often() -> None:
    sites = SITES[:5]
    counts = Counter(tuple(Fixed(size=2)(sites, round, 7)) for round in range(ROUNDS))
    subsets = list(combinations(sites, 2))
    assert set(counts) == set(subsets)
    expected = ROUNDS / len(subsets)
    chi_square = sum((counts[subset] - expected) ** 2 / expected for subset in subsets)
    assert chi_square < 33.7  # 9 degrees of freedom: exceeded once in 10,000 seeds


def test_poisson_draws_each_site_by_itself() -> None:
    rate = 0.3
    cohorts = [Poisson(rate=rate)(SITES, round, 7) for round in range(ROUNDS)]
    counts = Counter(party for cohort in cohorts for party in cohort)
    spread = 5 * math.sqrt(ROUNDS * rate * (1 - rate))
    for site in SITES:
        assert abs(counts[site] - ROUNDS * rate) < spread
    together = rate**2
    for pair in combinations(SITES, 2):
        both = sum(pair[0] in cohort and pair[1] in cohort for cohort in cohorts)
        assert abs(both - ROUNDS * together) < 5 * math.sqrt(ROUNDS * together * (1 - together))


def test_poisson_may_choose_nobody_or_everybody() -> None:
    assert any(Poisson(rate=0.05)(SITES, round, 0) == [] for round in range(100))
    assert all(Poisson(rate=1.0)(SITES, round, 0) == SITES for round in range(100))


@given(
    sites=st.integers(1, 40),
    groups=st.integers(1, 40),
    first=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_cyclic_asks_everybody_once_in_every_so_many_rounds(
    sites: int, groups: int, first: int, seed: int, data: st.DataObject
) -> None:
    groups = min(groups, sites)
    parties = [f"site-{i}" for i in range(sites)]
    cyclic = Cyclic(groups=groups)
    turn = [cyclic(parties, round, seed) for round in range(first, first + groups)]
    assert sorted(party for cohort in turn for party in cohort) == sorted(parties)
    assert {len(cohort) for cohort in turn} <= {sites // groups, -(-sites // groups)}
    assert cyclic(parties, first + groups, seed) == turn[0]
    shuffled = data.draw(st.permutations(parties))
    assert set(cyclic(shuffled, first, seed)) == set(turn[0])  # registered in another order: the same groups


def test_cyclic_deals_by_the_seed() -> None:
    cohorts = Counter(tuple(Cyclic(groups=2)(SITES, 0, seed)) for seed in range(ROUNDS))
    assert len(cohorts) == math.comb(10, 5)
    expected = ROUNDS / len(cohorts)
    chi_square = sum((count - expected) ** 2 / expected for count in cohorts.values())
    assert chi_square < 342  # 251 degrees of freedom: exceeded once in 10,000 runs


@pytest.mark.parametrize("sampling", [Fixed(size=5), Poisson(rate=0.5)])
def test_rounds_and_seeds_differ(sampling: Sampling) -> None:
    by_round = {tuple(sampling(SITES, round, 1)) for round in range(50)}
    by_seed = {tuple(sampling(SITES, 1, seed)) for seed in range(50)}
    assert min(len(by_round), len(by_seed)) > 35  # of 50 draws among 252 or more subsets


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(BadInput, match="11 sites a round were asked for and only 10 are registered"):
        Fixed(size=11)(SITES, 0, 0)
    with pytest.raises(BadInput, match=r"Fixed.size must be at least 1, got 0"):
        Fixed(size=0)
    with pytest.raises(BadInput, match="11 groups were asked for and only 10 sites are registered; ask for fewer"):
        Cyclic(groups=11)(SITES, 0, 0)
    with pytest.raises(BadInput, match=r"Cyclic.groups must be at least 1, got 0"):
        Cyclic(groups=0)
    for rate in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(BadInput, match=r"Poisson.rate must be in \(0, 1\]"):
            Poisson(rate=rate)
    assert Fixed(size=10)(SITES, 0, 0) == SITES
