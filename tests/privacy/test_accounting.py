"""Epsilon against published figures, against formulas and libraries of others, and its laws."""

import math
import subprocess
import sys

import dp_accounting as dp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from fedelta.core.errors import BadInput, BudgetSpent, UnsoundCombination
from fedelta.core.messages import PartyId
from fedelta.core.release import Budget, Relation, Release, Unit
from fedelta.privacy.accounting import Account, epsilon, noise_multiplier
from fedelta.privacy.events import Event, concentrated, gaussian, poisson_gaussian, steps, without_replacement_gaussian

NON_PRIVATE: Event = {"non_private": {}}


def release(
    event: Event, relation: Relation = "replace_special", unit: Unit = "example", of: PartyId | None = None
) -> Release:
    return Release(event=event, unit=unit, relation=relation, of=of)


def spent(
    *events: Event, relation: Relation = "replace_special", delta: float = 1e-5, accountant: str = "pld"
) -> float:
    releases = [release(event, relation) for event in events]
    return epsilon(releases, delta=delta, accountant=accountant, unit="example")  # type: ignore[arg-type]


# Published figures.

# TensorFlow Privacy, compute_dp_sgd_privacy_test.py: (rate, noise, steps, delta, accountant, epsilon).
TF_PRIVACY = [
    (150 / 60_000, 1.3, 15 * 400, 1e-5, "rdp", 0.7242234026109595),
    (100 / 100_000, 1.0, 30 * 1000, 1e-7, "rdp", 1.4154988495444842),
    (64 / 10_000, 2.0 / 2, 782, 1e-6, "rdp", 1.616),  # with microbatches, which double the sensitivity
    (64 / 10_000, 2.0 / 2, 782, 1e-6, "pld", 1.199),
    (1e-2, 0.7, 120, 1e-5, "rdp", 3.2392676),
    (1e-2, 0.7, 120, 1e-5, "pld", 2.4612381),
    (1.0, 0.7, 2, 1e-5, "rdp", 10.8602036),
    (1.0, 0.7, 2, 1e-5, "pld", 10.1224946),
]


@pytest.mark.parametrize(("rate", "noise", "count", "delta", "accountant", "figure"), TF_PRIVACY)
def test_published_epsilon(rate: float, noise: float, count: int, delta: float, accountant: str, figure: float) -> None:
    assert spent(steps(rate, noise, count), delta=delta, accountant=accountant) == pytest.approx(figure, rel=0.01)


# dp-accounting, pld/accountant_test.py: (event, count, epsilon, delta, noise over sensitivity).
DP_ACCOUNTING = [
    (gaussian, 1, 1.0, 0.78760074, 1 / 3),
    (gaussian, 25, 1.0, 0.78760074, 10 / 6),
    (lambda z: poisson_gaussian(0.01, z), 1, 1.0, 1e-5, 0.67379294682),
    pytest.param(lambda z: poisson_gaussian(0.001, z), 25, 1.0, 1e-5, 3.20956502598 / 6, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("event", "count", "limit", "delta", "figure"), DP_ACCOUNTING)
def test_published_noise(event, count: int, limit: float, delta: float, figure: float) -> None:  # type: ignore[no-untyped-def]
    budget = Budget(epsilon=limit, delta=delta)
    noise = noise_multiplier(event, "add_or_remove_one", budget, unit="example", count=count)
    assert noise == pytest.approx(figure, rel=0.002)
    done = [release(event(noise), "add_or_remove_one")] * count
    assert epsilon(done, delta=delta, unit="example") <= limit


# References: what the mechanisms really leak.


def exact_gaussian(noise: float, delta: float) -> float:
    """Balle and Wang, ICML 2018, Theorem 8."""

    def over(eps: float) -> float:
        return norm.cdf(0.5 / noise - eps * noise) - math.exp(eps) * norm.cdf(-0.5 / noise - eps * noise) - delta

    return float(brentq(over, 0, 200, xtol=1e-12))


def leaked(share: float, distance: float, noise: float, eps: float) -> float:
    """Delta of one round in which a unit, if it is in the sample, moves the sum by +-distance / 2: it is replaced."""

    def density(x: float, side: float) -> float:
        return float((1 - share) * norm.pdf(x, 0, noise) + share * norm.pdf(x, side * distance / 2, noise))

    def over(x: float) -> float:
        return max(0.0, density(x, 1) - math.exp(eps) * density(x, -1))

    return float(quad(over, -12 * noise - distance, 12 * noise + distance, limit=400, points=[0.0])[0])


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special", "replace_one"])
@pytest.mark.parametrize(("noise", "count"), [(0.8, 1), (3.0, 4), (40.0, 300)])
def test_gaussians_are_composed_exactly(relation: Relation, noise: float, count: int) -> None:
    exact = exact_gaussian(noise / math.sqrt(count), 1e-5)
    assert spent(*[gaussian(noise)] * count, relation=relation) == pytest.approx(exact, rel=1e-6)
    renyi = spent(*[gaussian(noise)] * count, relation=relation, accountant="rdp")
    assert exact <= renyi <= 1.3 * exact


def test_poisson_samples_of_replaced_units_leak_what_is_computed() -> None:
    share, noise, delta = 0.1, 0.7, 1e-4
    eps = spent(poisson_gaussian(share, noise), relation="replace_one", delta=delta)
    assert leaked(share, 2.0, 2 * noise, eps) == pytest.approx(delta, rel=1e-3)  # clipped to 1: noise is relative to 2


@pytest.mark.parametrize(("size", "of"), [(9, 10), (1, 5), (7, 7)])
def test_noise_without_replacement_is_relative_to_the_replaced_distance(size: int, of: int) -> None:
    noise, delta = 0.7, 1e-3
    eps = spent(without_replacement_gaussian(size, of, noise), relation="replace_one", delta=delta, accountant="rdp")
    assert leaked(size / of, 2.0, noise * 2.0, eps) <= delta
    if size > 1:  # relative to the norm instead, the same event would promise too much
        assert leaked(size / of, 2.0, noise * 1.0, eps) > delta


def test_the_bound_without_replacement_is_at_least_as_tight_as_theorem_9() -> None:
    share, noise, count, delta = 0.02, 2.0, 50, 1e-5

    def theorem_9(order: int) -> float:
        def gauss(j: int) -> float:
            return j / (2 * noise**2)

        least = min(4 * math.expm1(gauss(2)), 2 * math.exp(gauss(2)))
        total = 1 + share**2 * math.comb(order, 2) * least
        for j in range(3, order + 1):
            total += share**j * math.comb(order, j) * 2 * math.exp((j - 1) * gauss(j))
        return math.log(total) / (order - 1)

    orders = range(2, 64)
    bound, _ = dp.rdp.compute_epsilon(orders, [count * theorem_9(order) for order in orders], delta)
    event = without_replacement_gaussian(20, 1000, noise)
    ours = spent(*[event] * count, relation="replace_one", delta=delta, accountant="rdp")
    assert 0.8 * bound < ours <= bound * (1 + 1e-9)


@pytest.mark.parametrize(("rate", "noise", "count"), [(0.01, 1.0, 100), (0.3, 2.0, 20)])
def test_opacus_computes_the_same(rate: float, noise: float, count: int) -> None:
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    orders = [float(order) for order in dp.rdp.RdpAccountant().orders if order < 64]
    curve = compute_rdp(q=rate, noise_multiplier=noise, steps=count, orders=orders)
    theirs, _ = get_privacy_spent(orders=orders, rdp=curve, delta=1e-5)
    ours = spent(steps(rate, noise, count), accountant="rdp")
    assert ours == pytest.approx(theirs, rel=1e-3)  # their series for fractional orders ends sooner
    assert spent(steps(rate, noise, count)) <= ours


def test_gaussians_on_one_sample_are_one() -> None:
    both: Event = {"poisson_sampled": {"rate": 0.1, "event": {"composed": [gaussian(3.0), gaussian(4.0)]}}}
    assert spent(both, accountant="rdp") == pytest.approx(spent(poisson_gaussian(0.1, 2.4), accountant="rdp"))


# For whom.


def test_nothing_costs_nothing_and_what_is_not_private_everything() -> None:
    assert spent() == 0
    assert spent({"no_op": {}}, poisson_gaussian(0.0, 1.0)) == 0
    for accountant in ("pld", "rdp"):
        assert spent(gaussian(5.0), NON_PRIVATE, accountant=accountant) == math.inf


def test_an_example_is_hidden_by_what_hides_its_site_at_twice_the_sensitivity() -> None:
    site = release(gaussian(3.0), "add_or_remove_one", "site")
    assert epsilon([site], delta=1e-5, unit="site") == pytest.approx(exact_gaussian(3.0, 1e-5))
    assert epsilon([site], delta=1e-5, unit="example") == pytest.approx(exact_gaussian(1.5, 1e-5))
    sampled = release(poisson_gaussian(0.2, 2.0), "add_or_remove_one", "site")
    replaced = release(poisson_gaussian(0.2, 1.0), "replace_one", "site")
    assert epsilon([sampled], delta=1e-4, unit="example") == pytest.approx(
        epsilon([replaced], delta=1e-4, unit="site"), rel=1e-6
    )


def test_a_site_is_not_hidden_by_what_hides_its_examples() -> None:
    assert epsilon([release(gaussian(100.0))], delta=1e-5, unit="site") == math.inf


def test_sites_are_composed_in_parallel() -> None:
    releases = [
        release(gaussian(8.0)),
        release(gaussian(3.0), of="a"),
        release(gaussian(4.0), of="b"),
        release(gaussian(4.0), of="b"),
    ]
    expected = {
        "a": exact_gaussian((1 / 64 + 1 / 9) ** -0.5, 1e-5),
        "b": exact_gaussian((1 / 64 + 2 / 16) ** -0.5, 1e-5),
        "c": exact_gaussian(8.0, 1e-5),
    }
    for site, exact in expected.items():
        assert epsilon(releases, delta=1e-5, unit="example", of=site) == pytest.approx(exact)
    assert epsilon(releases, delta=1e-5, unit="example") == pytest.approx(max(expected.values()))


def test_one_replaced_makes_all_replaced() -> None:
    mixed = [release(gaussian(4.0), "add_or_remove_one"), release(gaussian(3.0), "replace_one")]
    expected = exact_gaussian((1 / 4 + 1 / 9) ** -0.5, 1e-5)
    assert epsilon(mixed, delta=1e-5, unit="example") == pytest.approx(expected)
    special = [release(gaussian(4.0), "add_or_remove_one"), release(gaussian(3.0), "replace_special")]
    assert epsilon(special, delta=1e-5, unit="example") == pytest.approx(exact_gaussian(2.4, 1e-5))


@pytest.mark.parametrize(
    ("accountant", "releases", "cure"),
    [
        ("pld", [release(without_replacement_gaussian(1, 9, 1.0), "replace_one")], "use accountant 'rdp'"),
        ("rdp", [release(without_replacement_gaussian(1, 9, 1.0), "add_or_remove_one")], "state that relation"),
        ("rdp", [release(poisson_gaussian(0.1, 1.0), "replace_one")], "use accountant 'pld'"),
        (
            "rdp",
            [
                release(without_replacement_gaussian(1, 9, 1.0), "replace_one"),
                release(poisson_gaussian(0.1, 1.0), "add_or_remove_one"),
            ],
            "the same sampling",
        ),
        ("pld", [release({"tree_aggregation": {"noise_multiplier": 1.0, "steps": 8}})], "use accountant 'rdp'"),
        ("rdp", [release({"tree_aggregation": {"noise_multiplier": 1.0, "steps": 8}}, "replace_one")], "state that"),
        ("pld", [release(concentrated(0.5))], "discrete Gaussian noise.*; use accountant 'rdp'$"),
        ("pld", [release(gaussian(2.0)), release(concentrated(0.5))], "use accountant 'rdp'"),
    ],
)
def test_what_cannot_be_composed_is_refused(accountant: str, releases: list[Release], cure: str) -> None:
    with pytest.raises(UnsoundCombination, match=cure):
        epsilon(releases, delta=1e-5, accountant=accountant, unit="example")  # type: ignore[arg-type]


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special", "replace_one"])
def test_what_is_concentrated_is_the_gaussian_mechanism_with_the_same_rho(relation: Relation) -> None:
    """Alone, repeated, beside others, where units are replaced, and for the examples of a site."""
    noise, other = 3.0, gaussian(4.0)
    event = concentrated(0.5 / noise**2)
    pairs: list[tuple[Event, Event]] = [
        (event, gaussian(noise)),
        ({"self_composed": {"count": 5, "event": event}}, gaussian(noise / math.sqrt(5))),
        ({"composed": [event, other]}, {"composed": [gaussian(noise), other]}),
    ]
    for unit in ("example", "site"):
        for ours, same in pairs:
            found, expected = (
                epsilon(
                    [release(one, relation, unit), release(other, "replace_one", unit)],
                    delta=1e-5,
                    accountant="rdp",
                    unit="example",
                )
                for one in (ours, same)
            )
            assert found == pytest.approx(expected, rel=1e-12)


def test_rho_is_four_times_as_large_where_units_are_replaced() -> None:
    beside = Release(event=gaussian(1e6), unit="example", relation="replace_one")
    for unit in ("example", "site"):  # what hides a site hides an example that is replaced
        one = release(concentrated(0.1), unit=unit)
        mixed = epsilon([one, beside], delta=1e-5, accountant="rdp", unit="example")
        assert mixed == pytest.approx(spent(concentrated(0.4), accountant="rdp"), rel=1e-4)


def test_noise_is_solved_for_what_is_concentrated() -> None:
    budget = Budget(epsilon=4.0, delta=1e-5, accountant="rdp")
    found = noise_multiplier(lambda z: concentrated(0.5 / z**2), "replace_special", budget, unit="site", count=30)
    same = noise_multiplier(gaussian, "replace_special", budget, unit="site", count=30)
    assert found == pytest.approx(same, rel=1e-6)


def test_a_tree_is_the_gaussian_mechanism_of_its_depth() -> None:
    tree: Event = {"tree_aggregation": {"noise_multiplier": 6.0, "steps": 7}}
    expected = spent(gaussian(6.0 / math.sqrt(3)), accountant="rdp")
    assert spent(tree, accountant="rdp") == pytest.approx(expected)


# Laws, by RDP: it is quick.

ROUNDS = st.lists(
    st.tuples(st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.6, 1.0, 4.0])), min_size=1, max_size=6
)


def spent_on(rounds: list[tuple[float, float]]) -> float:
    return spent(*(poisson_gaussian(*settings) for settings in rounds), accountant="rdp")


@settings(max_examples=25, deadline=None)
@given(rounds=ROUNDS, data=st.data())
def test_epsilon_grows_with_rounds_and_rate_and_falls_with_noise(
    rounds: list[tuple[float, float]], data: st.DataObject
) -> None:
    eps = spent_on(rounds)
    at = data.draw(st.integers(0, len(rounds) - 1))
    (rate, noise), others = rounds[at], rounds[:at] + rounds[at + 1 :]
    assert spent_on(others) <= eps
    assert spent_on([*others, (rate / 2, noise)]) <= eps
    assert spent_on([*others, (rate, noise * 2)]) <= eps
    assert spent_on([*others, (rate, noise), (rate, noise)]) >= eps


@settings(max_examples=25, deadline=None)
@given(rounds=ROUNDS, data=st.data())
def test_order_and_nesting_are_irrelevant(rounds: list[tuple[float, float]], data: st.DataObject) -> None:
    eps = spent_on(rounds)
    assert spent_on(data.draw(st.permutations(rounds))) == pytest.approx(eps, rel=1e-9)
    together: Event = {"composed": [poisson_gaussian(*one) for one in rounds]}
    assert spent(together, accountant="rdp") == pytest.approx(eps, rel=1e-9)
    thrice: Event = {"self_composed": {"count": 3, "event": together}}
    assert spent(thrice, accountant="rdp") == pytest.approx(spent_on(rounds * 3), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    rounds=st.lists(st.tuples(st.sampled_from([0.1, 1.0]), st.sampled_from([2.0, 8.0]), st.sampled_from([None, "a"]))),
    limit=st.floats(0.3, 6.0),
)
def test_fits_agrees_with_epsilon(rounds: list[tuple[float, float, str | None]], limit: float) -> None:
    budget = Budget(epsilon=limit, delta=1e-5, accountant="rdp")
    account = Account(budget=budget, unit="example")
    done: list[Release] = []
    for rate, noise, site in rounds:
        new = release(poisson_gaussian(rate, noise), of=site)
        within = epsilon([*done, new], delta=1e-5, accountant="rdp", unit="example") <= limit
        assert account.fits([new]) == Account(budget=budget, unit="example", releases=done).fits([new]) == within
        account.add([new])
        done.append(new)
    assert account.epsilon() == pytest.approx(epsilon(done, delta=1e-5, accountant="rdp", unit="example"), rel=1e-9)


def test_a_run_ends_with_the_last_round_that_fits() -> None:
    budget = Budget(epsilon=1.0, delta=1e-5)
    account = Account(budget=budget, unit="site")
    new = release(gaussian(60.0), "add_or_remove_one", "site")
    rounds = 0
    while account.fits([new]):
        account.add([new])
        rounds += 1
    assert exact_gaussian(60.0 / math.sqrt(rounds), 1e-5) <= 1.0 < exact_gaussian(60.0 / math.sqrt(rounds + 1), 1e-5)


# Noise.


@pytest.mark.parametrize(
    ("event", "relation", "accountant"),
    [
        (lambda z: poisson_gaussian(0.05, z), "add_or_remove_one", "rdp"),
        (lambda z: without_replacement_gaussian(5, 100, z), "replace_one", "rdp"),
        (gaussian, "replace_special", "pld"),
    ],
)
def test_noise_is_the_least_that_keeps_the_budget(event, relation: Relation, accountant: str) -> None:  # type: ignore[no-untyped-def]
    budget = Budget(epsilon=1.5, delta=1e-5, accountant=accountant)  # type: ignore[arg-type]
    before = [release(gaussian(9.0), relation)]
    noise = noise_multiplier(event, relation, budget, unit="example", count=30, before=before)

    def total(z: float) -> float:
        done = [*before, *[release(event(z), relation)] * 30]
        return epsilon(done, delta=1e-5, accountant=budget.accountant, unit="example")

    assert total(noise) <= 1.5 < total(noise * (1 - 3e-3))
    account = Account(budget=budget, unit="example", releases=before)
    assert account.fits([release(event(noise), relation)] * 30)


def test_noise_that_cannot_be_found() -> None:
    before = [release(gaussian(1.0), of="a")]
    budget = Budget(epsilon=1.0, delta=1e-5)
    with pytest.raises(BudgetSpent, match="no noise makes room"):
        noise_multiplier(gaussian, "replace_special", budget, unit="example", before=before, of="a")
    assert noise_multiplier(gaussian, "replace_special", budget, unit="example", before=before, of="b") > 0
    with pytest.raises(BadInput, match="no noise up to"):
        noise_multiplier(gaussian, "replace_special", Budget(epsilon=1e-9, delta=1e-15), unit="example", count=10**9)
    with pytest.raises(BadInput, match="1 or more"):
        noise_multiplier(gaussian, "replace_special", budget, unit="example", count=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0, "delta": 1e-5},
        {"epsilon": math.inf, "delta": 1e-5},
        {"epsilon": math.nan, "delta": 1e-5},
        {"epsilon": 1.0, "delta": 0.0},
        {"epsilon": 1.0, "delta": 1.0},
        {"epsilon": 1.0, "delta": 1e-5, "accountant": "moments"},
    ],
)
def test_a_budget_is_checked(bad: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        Budget(**bad)  # type: ignore[arg-type]


def test_a_hostile_ledger_is_bounded_in_time_and_range() -> None:
    for noise in (1e-6, 1e-3, 1e6):
        for count in (1, 10**9):
            for event in (gaussian(noise), poisson_gaussian(0.5, noise)):
                many: Event = {"self_composed": {"count": count, "event": event}}
                assert spent(many) >= 0
    nested: Event = gaussian(1.0)
    for _ in range(50_000):
        nested = {"composed": [nested]}
    with pytest.raises(BadInput, match="nested"):
        spent(nested)
    while "composed" in nested:  # or freeing it would recurse
        (nested,) = nested["composed"]  # type: ignore[misc, assignment]


def test_the_accountants_are_loaded_when_they_are_needed() -> None:
    code = "import sys, fedelta, fedelta.privacy.accounting; sys.exit('dp_accounting' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_noise_is_found_for_an_epsilon_that_renyi_divergences_do_not_get_to() -> None:
    """dp-accounting's own solution for one Gaussian mechanism, which is analytic."""
    budget = Budget(epsilon=1e-3, delta=1e-5)
    found = noise_multiplier(gaussian, "add_or_remove_one", budget, unit="site")
    assert found == pytest.approx(dp.get_sigma_gaussian(1e-3, 1e-5), rel=3e-3)
