"""Which rows are taken in which step, against one site at a time."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.seeds import permutations
from fedelta.learning.batches import Steps, batches

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)
lengths = st.one_of(st.tuples(st.integers(1, 4), st.none()), st.tuples(st.none(), st.integers(1, 30)))


@given(sizes, st.integers(1, 12), lengths)
def test_sites_side_by_side_take_the_batches_that_each_takes_alone(
    sizes: list[int], batch: int, length: tuple[int | None, int | None]
) -> None:
    seeds = [1000 + i for i in range(len(sizes))]
    schedule = Steps.of(sizes, batch, *length, seeds)
    for i, n in enumerate(sizes):
        alone = list(batches(n, batch, *length, seeds[i]))
        counts = schedule.counts[i]
        assert counts[: len(alone)].tolist() == [len(rows) for rows in alone]
        assert not counts[len(alone) :].any()
        for t, rows in enumerate(alone):
            assert torch.equal(schedule.rows[i, t, : len(rows)], rows)
            assert schedule.rows[i, t].max() < n  # padding is a row of the same site


@given(sizes, st.integers(1, 12), st.integers(1, 3))
def test_another_order_of_sites_changes_nothing_for_each(sizes: list[int], batch: int, epochs: int) -> None:
    schedule = Steps.of(sizes, batch, epochs, None, range(len(sizes)))
    order = torch.randperm(len(sizes))
    laid_out = schedule.laid_out(order, sizes)
    first = np.cumsum([0, *sizes[:-1]])
    for place, site in enumerate(order.tolist()):
        assert torch.equal(laid_out.rows[place], schedule.rows[site] + int(first[site]))
        assert torch.equal(laid_out.counts[place], schedule.counts[site])


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 3))
def test_an_epoch_takes_every_row_once(n: int, batch: int, epochs: int) -> None:
    taken = torch.cat(list(batches(n, batch, epochs, None, 7)))
    assert torch.equal(taken.bincount(minlength=n), torch.full((n,), epochs))


def test_what_is_left_of_an_epoch_can_be_too_few() -> None:
    assert [len(rows) for rows in batches(9, 4, 2, None, 1, least=2)] == [4, 4, 4, 4]
    assert [len(rows) for rows in batches(9, 4, None, 5, 1, least=2)] == [4, 4, 4, 4, 4]


def test_permutations_are_uniform() -> None:
    """All 24 orders of 4 rows, over 48,000 seeds: chi-squared below its 99.99% quantile for 23 degrees of freedom."""
    rows = permutations(np.arange(48_000, dtype=np.uint64), np.full(48_000, 4))
    _, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 2000) ** 2 / 2000).sum() < 58.0


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.data())
def test_a_permutation_depends_on_its_own_seed_and_size_alone(seeds: list[int], data: st.DataObject) -> None:
    n = np.array(data.draw(st.lists(st.integers(1, 20), min_size=len(seeds), max_size=len(seeds))))
    together = permutations(np.array(seeds, dtype=np.uint64), n)
    for i, seed in enumerate(seeds):
        alone = permutations(np.array([seed], dtype=np.uint64), n[i : i + 1])[0]
        assert np.array_equal(together[i, : n[i]], alone)
        assert sorted(alone) == list(range(n[i]))
