"""Statistics with noise: what a row can move, how much noise there is, and what is written down."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedelta.algorithms.parts import Clear
from fedelta.core.errors import BadInput, BudgetSpent, TooFewSites
from fedelta.core.examples import Examples
from fedelta.core.messages import Reply, Request
from fedelta.core.noise import SeededNoise
from fedelta.core.program import SiteData
from fedelta.core.release import Budget
from fedelta.fleet.local import Local
from fedelta.privacy.accounting import epsilon
from fedelta.privacy.discrete_gaussian import concentrated
from fedelta.privacy.ledger import MemoryLedger
from fedelta.secure.aggregation import SecureAggregation
from fedelta.statistics.columns import Category, Column, Number, rows_of
from fedelta.statistics.private import Vectors, most, noisy, share
from fedelta.statistics.program import Statistics, summarise
from fedelta.statistics.summary import CategorySummary, NumberSummary

COLUMNS: tuple[Column, ...] = (
    Number(name="x", low=-1.0, high=3.0),
    Number(name="y", low=0.0, high=1e6),
    Category(name="z", values=("a", "b")),
)
VECTORS = Vectors(columns=COLUMNS, bins=5)
BUDGET = Budget(epsilon=1.0, delta=1e-5)


def rows(x: Sequence[float | None], y: Sequence[float | None], z: Sequence[str | None]) -> Examples:
    return rows_of(pandas.DataFrame({"x": x, "y": y, "z": z}).astype({"x": "float64", "y": "float64"}), COLUMNS)


def many(size: int, seed: int) -> Examples:
    generator = np.random.default_rng(seed)
    x = np.where(generator.random(size) < 0.1, np.nan, generator.normal(1, 1, size))
    return rows(
        x.tolist(), generator.uniform(0, 1e6, size).tolist(), generator.choice(["a", "b", "c", "?"], size).tolist()
    )


def program(**changes: Any) -> Statistics:
    return Statistics(**{"columns": COLUMNS, "privacy": BUDGET, "bins": 5, "seed": 1, **changes})


def over(given: Statistics, sites: Sequence[Examples | SiteData]) -> Any:
    found = {f"s{place}": site for place, site in enumerate(sites)}
    return summarise(given, Local(given, found.__getitem__, list(found)))


@settings(max_examples=100, deadline=None)
@given(
    x=st.one_of(st.none(), st.floats(-5, 5), st.sampled_from([-1.0, 1.0, 3.0])),
    y=st.one_of(st.none(), st.floats(-1e6, 2e6), st.sampled_from([0.0, 5e5, 1e6])),
    z=st.sampled_from([None, "a", "b", "other"]),
)
def test_no_row_moves_the_vector_by_more_than_the_distance(x: float | None, y: float | None, z: str | None) -> None:
    one = VECTORS.of(rows([x], [y], [z]))
    assert len(one) == VECTORS.size
    assert np.linalg.norm(one.astype(np.float64)) <= VECTORS.distance
    before, after = rows([0.5], [7.0], ["b"]), rows([0.5, x], [7.0, y], ["b", z])
    assert (VECTORS.of(after) - VECTORS.of(before) == one).all()


def test_the_distance_is_reached_but_for_rounding() -> None:
    one = VECTORS.of(rows([3.0], [1e6], ["a"])).astype(np.float64)
    assert np.linalg.norm(one) == pytest.approx(VECTORS.distance, rel=1e-3)


def test_without_noise_a_vector_says_what_the_rows_are() -> None:
    found = many(5000, 0)
    read = VECTORS.read(torch.from_numpy(VECTORS.of(found)).double(), 0.0, (0.1, 0.5, 0.9))
    assert (read.rows, read.deviation) == (5000, 0)
    x, y, z = read.columns
    assert isinstance(x, NumberSummary)
    assert isinstance(y, NumberSummary)
    assert isinstance(z, CategorySummary)
    values = found.inputs["x"].numpy()
    inside = values[(values >= -1) & (values <= 3)]
    assert (x.missing, x.below, x.above) == (np.isnan(values).sum(), (values < -1).sum(), (values > 3).sum())
    assert x.within == len(inside)
    assert x.bins is not None
    assert list(x.bins.counts) == np.histogram(inside, np.array(x.bins.edges))[0].tolist()
    assert x.mean == pytest.approx(inside.mean(), abs=1e-3)
    assert x.variance == pytest.approx(inside.var(), abs=1e-2)
    for q, own in x.quantiles.items():
        assert own.low <= np.quantile(inside, q) <= own.low + 0.8
        assert own.high == pytest.approx(np.quantile(inside, q), abs=0.05)
    assert y.mean == pytest.approx(found.inputs["y"].numpy().mean(), rel=1e-3)
    assert sum([z.missing, *z.counts.values(), z.other]) == 5000


def test_shares_of_the_fewest_sites_are_enough_and_no_more_than_that() -> None:
    rho = most(replace(BUDGET, accountant="rdp"), ())
    for honest in (1, 3, 20):
        own = share(VECTORS, honest, rho)
        variance = float(own.variance)
        hides = concentrated(distance=VECTORS.distance, size=VECTORS.size, variance=variance, count=honest)
        assert own.rho == hides**2 / 2 <= rho
        assert own.rho >= 0.99 * rho
        assert variance == pytest.approx(VECTORS.distance**2 / (2 * rho * honest), rel=0.01)
    with pytest.raises(BadInput, match="honest"):
        share(VECTORS, 0, rho)


def test_the_noise_of_a_site_has_its_variance() -> None:
    own = share(VECTORS, 3, 0.05)
    empty = rows([], [], [])
    drawn = torch.cat([noisy(VECTORS, empty, own.variance, SeededNoise(5, turn)) for turn in range(150)])
    assert (drawn == drawn.round()).all()
    low, high = chi2.ppf([1e-6, 1 - 1e-6], len(drawn))
    assert low <= float((drawn**2).sum() / float(own.variance)) <= high


@pytest.mark.parametrize(("collect", "honest"), [(Clear(), 1), (SecureAggregation(), 2)])
def test_a_summary_tells_the_noise_that_is_in_it(collect: Any, honest: int) -> None:
    sites = [many(size, size) for size in (300, 500, 400, 1000)]
    exact = sum(VECTORS.of(site) for site in sites)
    found = over(program(collect=collect), sites)
    variance = float(share(VECTORS, honest, most(replace(BUDGET, accountant="rdp"), ())).variance)
    assert found.noise == pytest.approx(math.sqrt(4 * variance) / 4096)
    assert abs(found.rows - 2200) <= 6 * found.noise
    x = found["x"]
    assert abs(x.missing - exact[1] / 4096) <= 6 * found.noise
    assert 0 < abs(x.mean - 1) <= 6 * x.mean_noise + 0.1
    assert found.rounds == 1
    assert found.to_plain()["privacy"]["unit"] == "row"


def test_noise_is_drawn_anew_unless_there_is_a_seed() -> None:
    sites = [many(50, place) for place in range(3)]
    assert over(program(), sites) == over(program(), sites)
    assert over(program(seed=None), sites) != over(program(seed=None), sites)


def test_what_is_released_is_in_the_ledgers() -> None:
    ledger, own = MemoryLedger(), MemoryLedger()
    sites = [many(50, 1), many(60, 2), SiteData(train=many(70, 3), ledger=own)]
    found = over(program(ledger=ledger), sites)
    (release,), (at_site,) = ledger.releases(), own.releases()
    assert release.event == at_site.event == {"concentrated": {"rho": found.rho}}
    assert (release.unit, release.relation, release.of, at_site.of) == ("example", "add_or_remove_one", None, "s2")
    spent = epsilon(ledger.releases(), delta=1e-5, accountant="rdp", unit="example")
    assert 0.97 <= spent <= 1
    with pytest.raises(BudgetSpent, match="epsilon 1"):
        over(program(ledger=ledger), sites)
    assert len(ledger.releases()) == 1
    more = over(program(ledger=ledger, privacy=Budget(epsilon=2.0, delta=1e-5)), sites)
    assert more.rho > found.rho
    assert epsilon(ledger.releases(), delta=1e-5, accountant="rdp", unit="example") <= 2


def test_nothing_is_spent_where_too_few_sites_are_there() -> None:
    ledger = MemoryLedger()
    with pytest.raises(TooFewSites, match="2 sites were asked"):
        over(program(ledger=ledger), [many(50, 1), many(60, 2)])
    assert not ledger.releases()


def test_a_site_adds_no_less_noise_than_the_budget_needs() -> None:
    site = many(50, 0)
    given = program(collect=Clear())
    rho = most(replace(BUDGET, accountant="rdp"), ())
    for told, refused in ((rho, False), (1.01 * rho, True), (math.nan, True), (0.0, True)):
        fleet = Local(given, lambda _: site, ["s0"])
        shared = {"rho": torch.tensor(told, dtype=torch.float64), "sites": torch.tensor(1)}
        fleet.submit(Request(to="s0", op="statistics", round=1, shared=shared))
        reply = fleet.next_reply()
        assert isinstance(reply, Reply)
        assert (reply.error is not None) == refused


def test_the_number_of_sites_that_noise_was_made_for_is_checked_under_masks() -> None:
    sites = {f"s{place}": many(50, place) for place in range(4)}
    given = program()
    fleet = Local(given, sites.__getitem__, list(sites))
    requests = {"rho": torch.tensor(1e-3, dtype=torch.float64), "sites": torch.tensor(40)}
    fleet.submit(Request(to="s0", op="statistics/keys", round=1, shared={"cohort": torch.tensor(4)}))
    fleet.next_reply()
    fleet.submit(Request(to="s0", op="statistics", round=1, shared=requests))
    reply = fleet.next_reply()
    assert isinstance(reply, Reply)
    assert "noise is for a sum over 40 sites, and 4 were asked" in (reply.error or "")


def test_who_is_lost_takes_none_of_the_noise_that_is_needed() -> None:
    sites: list[Any] = [many(50, place) for place in range(4)]
    sites[2] = Examples({"other": torch.zeros(1)}, torch.zeros(1))
    found = over(program(), sites)
    assert found.absent.keys() == {"s2"}
    variance = float(share(VECTORS, 2, most(replace(BUDGET, accountant="rdp"), ())).variance)  # one may be who looks
    assert found.noise == pytest.approx(math.sqrt(3 * variance) / 4096)


def test_a_range_that_is_looked_for_is_refused() -> None:
    with pytest.raises(BadInput, match="'w' has no range"):
        program(columns=[*COLUMNS, Number(name="w")])


@pytest.mark.parametrize("round", [1, 2])
def test_noisy_counts_leave_a_site_once(round: int) -> None:
    sites = {f"s{place}": many(50, place) for place in range(4)}
    given = program(collect=Clear())
    fleet = Local(given, sites.__getitem__, list(sites))
    told = {"rho": torch.tensor(1e-3, dtype=torch.float64), "sites": torch.tensor(4)}
    errors = []
    for attempt, number in enumerate((1, round)):
        fleet.submit(Request(to="s0", op="statistics", round=number, attempt=attempt, shared=told))
        reply = fleet.next_reply()
        assert isinstance(reply, Reply)
        errors.append(reply.error)
    assert errors[0] is None
    assert "twice would be twice the epsilon" in str(errors[1])


@pytest.mark.parametrize(
    ("delta", "said"), [(1e-5, "raise epsilon, or look at fewer columns"), (1e-9, "raise epsilon")]
)
def test_an_epsilon_for_which_there_is_no_room_is_refused_before_anything_is_spent(delta: float, said: str) -> None:
    ledger = MemoryLedger()
    tight = program(privacy=Budget(epsilon=1e-6, delta=delta), ledger=ledger)
    with pytest.raises(BadInput, match=said):
        over(tight, [many(5, seed) for seed in range(3)])
    assert not ledger.releases()
