"""Laws of the partitioners: disjoint, complete, reproducible, and as skewed as they say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core.errors import BadInput
from fedelta.data.partition import IID, Dirichlet, Partitioner, Quantity, Shards, by_column

ALL: list[Partitioner] = [IID(), Dirichlet(alpha=0.5), Shards(), Shards(per_site=1), Quantity(alpha=0.5)]
partitioners = st.sampled_from(ALL)
label_lists = st.lists(st.integers(-3, 5), min_size=40, max_size=200)


@settings(max_examples=50)
@given(partitioners, label_lists, st.integers(1, 6), st.integers(0, 2**40))
def test_every_row_is_at_exactly_one_site(part: Partitioner, labels: list[int], sites: int, seed: int) -> None:
    rows = part(labels, sites, seed)
    assert len(rows) == sites
    assert all(own.dtype == np.int64 and len(own) > 0 and (np.diff(own) > 0).all() for own in rows)
    assert sorted(np.concatenate(rows)) == list(range(len(labels)))


@pytest.mark.parametrize("part", ALL, ids=str)
def test_rows_depend_on_the_seed_and_on_nothing_else(part: Partitioner) -> None:
    labels = np.arange(400) % 7
    first, again, other = part(labels, 5, 1), part(labels.copy(), 5, 1), part(labels, 5, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("part", ALL, ids=str)
def test_labels_may_be_of_any_kind(part: Partitioner) -> None:
    labels = np.arange(300) % 4
    expected = part(labels, 5, 3)
    as_names = np.array(["a", "b", "c", "d"])[labels]
    for same in (torch.tensor(labels), labels.tolist(), as_names, as_names.astype(object), labels.astype(np.float32)):
        assert all(np.array_equal(a, b) for a, b in zip(part(same, 5, 3), expected, strict=True))


@given(label_lists, st.integers(1, 40))
def test_iid_sizes_differ_by_at_most_one(labels: list[int], sites: int) -> None:
    sizes = [len(own) for own in IID()(labels, sites, 0)]
    assert max(sizes) - min(sizes) <= 1


def test_iid_is_not_in_the_order_of_the_rows() -> None:
    means = [own.mean() for own in IID()(np.zeros(10_000), 4, 0)]
    # The mean of 2,500 rows drawn from 0..9999 has a standard deviation of 50.
    assert all(abs(mean - 4999.5) < 250 for mean in means)


@given(st.sampled_from([Dirichlet, Quantity]), st.integers(1, 20), st.integers(0, 1000))
def test_minimum_is_respected(kind: type[Dirichlet] | type[Quantity], minimum: int, seed: int) -> None:
    rows = kind(alpha=1.0, minimum=minimum)(np.arange(600) % 10, 6, seed)
    assert min(map(len, rows)) >= minimum


@pytest.mark.parametrize("sites", [10, 100])
def test_dirichlet_with_a_large_alpha_has_the_pooled_proportions(sites: int) -> None:
    labels = np.repeat([0, 1, 2], [6000, 3000, 1000])
    for own in Dirichlet(alpha=1e6)(labels, sites, 0):
        counts = np.bincount(labels[own], minlength=3)
        # Each share is 1/sites to within 0.1% (a standard deviation), each end is rounded by at most 0.5.
        assert np.allclose(counts, np.array([6000, 3000, 1000]) / sites, rtol=0.01, atol=1.0)


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    labels, sites, alpha = np.repeat(np.arange(500), 200), 5, 0.5
    shares = (
        np.stack([np.bincount(labels[own], minlength=500) for own in Dirichlet(alpha=alpha)(labels, sites, 0)]) / 200
    )
    assert np.allclose(shares.sum(axis=0), 1)
    variance = (1 / sites) * (1 - 1 / sites) / (alpha * sites + 1)
    # 500 independent classes: the standard errors are 0.0096 of the mean and about 0.003 of the variance.
    assert np.allclose(shares.mean(axis=1), 1 / sites, atol=0.05)
    assert np.allclose(shares.var(axis=1), variance, atol=0.015)


def test_dirichlet_with_a_small_alpha_puts_a_class_at_one_site() -> None:
    labels = np.repeat(np.arange(200), 100)
    shares = np.stack([np.bincount(labels[own], minlength=200) for own in Dirichlet(alpha=0.01)(labels, 4, 0)]) / 100
    assert (shares.max(axis=0) > 0.9).mean() > 0.9


def test_rounding_favours_no_site() -> None:
    # One row per class and equal shares: rounding alone decides who gets it.
    sizes = [len(own) for own in Dirichlet(alpha=1e6)(np.arange(4000), 4, 0)]
    assert all(abs(size - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75) for size in sizes)


@given(label_lists, st.integers(1, 8), st.integers(1, 5), st.integers(0, 100))
def test_shards_hold_few_classes(labels: list[int], sites: int, per_site: int, seed: int) -> None:
    rows = Shards(per_site=per_site)(labels, sites, seed)
    values = np.array(labels)
    # Every border between two classes falls into at most one shard, which then holds one class more.
    pairs = sum(len(np.unique(values[own])) for own in rows)
    assert pairs <= sites * per_site + len(np.unique(values)) - 1
    sizes = [len(own) for own in rows]
    assert max(sizes) - min(sizes) <= per_site


def test_shards_as_in_mcmahan_et_al() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
    rows = Shards(per_site=2)(labels, 100, 0)
    assert {len(own) for own in rows} == {60}
    assert {len(np.unique(labels[own])) for own in rows} == {1, 2}


def test_quantity_skews_sizes_and_not_labels() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1], 50_000))
    rows = Quantity(alpha=0.5, minimum=500)(labels, 10, 0)
    sizes = np.array([len(own) for own in rows])
    assert sizes.max() > 4 * sizes.min()
    for own in rows:
        assert abs(labels[own].mean() - 0.5) < 5 * 0.5 / np.sqrt(len(own))


@pytest.mark.parametrize("part", ALL, ids=str)
@pytest.mark.parametrize(
    ("labels", "sites", "message"),
    [
        ([0, 1, 0], 4, "4 sites"),
        ([0, 1, 0], 0, "must be >= 1, got 0"),
        ([], 2, "no rows"),
        ([[0, 1], [1, 0]], 1, r"shape \(2, 2\)"),
        ([0.0, float("nan"), 1.0, 0.0], 1, "first in row 1"),
        (["a", "b", None, "a"], 1, "first in row 2"),
    ],
)
def test_wrong_arguments(part: Partitioner, labels: list[object], sites: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        part(labels, sites, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e10])
def test_wrong_alpha(alpha: float) -> None:
    with pytest.raises(BadInput, match="alpha must be > 0"):
        Dirichlet(alpha=alpha)
    with pytest.raises(BadInput, match="alpha must be > 0"):
        Quantity(alpha=alpha)


def test_wrong_counts() -> None:
    with pytest.raises(BadInput, match="per_site must be >= 1, got 0"):
        Shards(per_site=0)
    with pytest.raises(BadInput, match="minimum must be >= 1, got 0"):
        Quantity(alpha=1, minimum=0)
    with pytest.raises(BadInput, match="need at least 12 rows, got 10"):
        Shards(per_site=3)(range(10), 4, 0)


def test_an_impossible_minimum_is_refused_at_once_and_an_unlikely_one_after_many_draws() -> None:
    with pytest.raises(BadInput, match="need 60 rows, got 50"):
        Dirichlet(alpha=1, minimum=12)(np.arange(50) % 2, 5, 0)
    with pytest.raises(BadInput, match=r"1000 draws.*larger alpha"):
        Dirichlet(alpha=0.01, minimum=10)(np.arange(50) % 2, 5, 0)
    with pytest.raises(BadInput, match=r"1000 draws.*larger alpha"):
        Quantity(alpha=0.01, minimum=10)(np.arange(50), 5, 0)


def test_dirichlet_refuses_labels_that_are_no_classes() -> None:
    with pytest.raises(BadInput, match="have fractions"):
        Dirichlet(alpha=1)(np.linspace(0, 1, 20), 2, 0)


@given(st.lists(st.sampled_from(["rome", "Oslo", "lima", "bern"]), min_size=1, max_size=60))
def test_by_column_groups_equal_values(values: list[str]) -> None:
    rows = by_column(values)
    assert list(rows) == sorted(set(values))
    for name, own in rows.items():
        assert own.dtype == np.int64
        assert own.tolist() == [row for row, value in enumerate(values) if value == name]


def test_by_column_names_whole_numbers_alike() -> None:
    for values in ([3, 1, 3], [3.0, 1.0, 3.0], ["3", "1", "3"], torch.tensor([3, 1, 3])):
        assert {name: own.tolist() for name, own in by_column(values).items()} == {"1": [1], "3": [0, 2]}


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  "])
def test_by_column_says_which_rows_have_no_site(missing: object) -> None:
    with pytest.raises(BadInput, match=r"2 of 4 rows .*rows 1, 3, counted from 0"):
        by_column(["a", missing, "b", missing])
    with pytest.raises(BadInput, match=r"7 of 8 rows .*rows 1, 2, 3, 4, 5, \.\.\.,"):
        by_column(["a"] + [missing] * 7)


def test_by_column_needs_rows() -> None:
    with pytest.raises(BadInput, match="no rows"):
        by_column([])
