"""The exact mean: order, grouping and absence against a reference in fractions."""

import math
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedelta.aggregation.mean import Accumulator, Mean
from fedelta.aggregation.rule import ManyRule, Rule
from fedelta.core.errors import BadInput, TooFewSites
from fedelta.core.messages import Kind, Update, Updates
from fedelta.core.parameters import Layout, Parameters

HALF_ULP = {torch.float32: Fraction(1, 2**24), torch.float64: Fraction(1, 2**53)}
LEAST = {torch.float32: Fraction(1, 2**149), torch.float64: Fraction(1, 2**1074)}


def update(
    values: list[float] | Tensor, weight: float = 1.0, dtype: torch.dtype = torch.float32, count: int = 1, **sums: float
) -> Update:
    vector = torch.as_tensor(values, dtype=dtype)
    return Update(values=Parameters(Layout.of({"w": vector}), vector), weight=weight, count=count, sums=sums)


def bits(total: Update) -> tuple[bytes, str, str, dict[str, str], int]:
    """All that is in an update, to the last bit."""
    sums = {name: number.hex() for name, number in total.sums.items()}
    return total.values.vector.numpy().tobytes(), total.kind, total.weight.hex(), sums, total.count


def elements(bound: float, dtype: torch.dtype) -> st.SearchStrategy[float]:
    return st.floats(-bound, bound, width=32 if dtype is torch.float32 else 64)


@st.composite
def cohorts(draw: st.DrawFn, mean: Mean | None = None) -> list[Update]:
    """1 to 8 updates of one form, within the bounds of `mean`; at least one weight is not tiny."""
    rule = Mean() if mean is None else mean
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    size = draw(st.integers(0, 6))
    vectors = st.lists(elements(rule.bound, dtype), min_size=size, max_size=size)
    sums = st.floats(-(2.0**512), 2.0**512)
    weights = [draw(st.floats(2.0**-10, rule.weight_bound))]
    weights += draw(st.lists(st.floats(0, rule.weight_bound), max_size=7))
    return [update(draw(vectors), weight, dtype, 1, loss=draw(sums), correct=draw(sums)) for weight in weights]


def grouped(updates: list[Update], cohort: int, chance: Random) -> Accumulator:
    """The updates added up in a random tree."""
    accumulator = Accumulator(Mean(), cohort)
    if len(updates) > 1 and chance.random() < 0.7:
        cut = chance.randrange(len(updates) + 1)
        parts = [updates[:cut], updates[cut:]]
        chance.shuffle(parts)
        for part in parts:
            accumulator.merge(grouped(part, cohort, chance) if len(part) < len(updates) else streamed(part, cohort))
        return accumulator
    return streamed(updates, cohort)


def streamed(updates: list[Update], cohort: int) -> Accumulator:
    accumulator = Accumulator(Mean(), cohort)
    for each in updates:
        accumulator.add(each)
    return accumulator


@given(updates=cohorts(), chance=st.randoms(use_true_random=False))
def test_no_order_and_no_grouping_changes_a_bit(updates: list[Update], chance: Random) -> None:
    expected = bits(Mean()(updates, len(updates)))
    shuffled = chance.sample(updates, len(updates))
    assert bits(Mean()(iter(shuffled), len(updates))) == expected
    assert bits(grouped(shuffled, len(updates), chance).total()) == expected


@given(updates=cohorts(), chance=st.randoms(use_true_random=False))
def test_sites_that_drop_out_leave_no_trace(updates: list[Update], chance: Random) -> None:
    cohort = len(updates) + 3
    arrived = [updates[0], *(each for each in updates[1:] if chance.random() < 0.5)]
    expected = bits(Mean()(arrived, cohort))
    assert bits(grouped(chance.sample(arrived, len(arrived)), cohort, chance).total()) == expected


def check_against_fractions(mean: Mean, updates: list[Update], cohort: int) -> None:
    """The documented bound, in exact arithmetic."""
    total = mean(updates, cohort)
    weight = sum((Fraction(each.weight) for each in updates), Fraction())
    dtype = updates[0].values.vector.dtype
    assert total.values.vector.dtype == dtype
    assert Fraction(total.weight) == Fraction(float(weight))
    for name in updates[0].sums:
        assert total.sums[name] == float(sum(Fraction(each.sums[name]) for each in updates))
    rows = [each.values.vector.tolist() for each in updates]
    largest = max([Fraction(), *(abs(Fraction(x)) for row in rows for x in row)])
    limit = len(updates) * Fraction(mean.resolution(cohort)) / (2 * weight) + largest / 2**50
    limit += HALF_ULP[dtype] * (largest + limit) + LEAST[dtype]
    for element, result in enumerate(total.values.vector.tolist()):
        exact = sum(Fraction(each.weight) * Fraction(row[element]) for each, row in zip(updates, rows, strict=True))
        assert abs(Fraction(result) - exact / weight) <= limit


@given(updates=cohorts(), absent=st.integers(0, 1000))
def test_the_mean_is_within_its_documented_error(updates: list[Update], absent: int) -> None:
    check_against_fractions(Mean(), updates, len(updates) + absent)


ODD = Mean(bound=3 * 2.0**-10, weight_bound=1.3e-2)


@given(updates=cohorts(ODD))
def test_bounds_that_are_no_powers_of_two(updates: list[Update]) -> None:
    check_against_fractions(ODD, updates, len(updates))


def test_products_go_to_the_nearest_point_of_the_grid_and_halves_to_the_even_one() -> None:
    quarters = list(range(-9, 10))
    unit = Mean().resolution(1)
    total = Mean()([update([0.25 * unit * quarter for quarter in quarters], dtype=torch.float64)], 1)
    assert total.values.vector.tolist() == [unit * round(Fraction(quarter, 4)) for quarter in quarters]


@given(
    weight=st.just(2.0**12) | st.floats(2.0**10, 2.0**16),
    values=st.lists(st.floats(-1, 1) | st.integers(-40, 40).map(lambda i: i * 2.0**-14 * Mean().resolution(1))),
)
def test_a_large_neighbour_does_not_change_how_a_value_is_rounded(weight: float, values: list[float]) -> None:
    """The two ways to round: all products within 2**51, and one beyond."""
    small = Mean()([update(values, weight, torch.float64)], 1)
    large = Mean()([update([*values, 200.0], weight, torch.float64)], 1)
    assert torch.equal(small.values.vector, large.values.vector[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_vector_agrees_with_float64(dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(0)
    size, weights = 1_500_001, [17.0, 600.0, 0.25]  # many chunks and a rest, among threads where there are cores
    vectors = [torch.randn(size, generator=chance, dtype=torch.float64).to(dtype) for _ in weights]
    total = Mean()([update(v, w, dtype) for v, w in zip(vectors, weights, strict=True)], 3)
    plain = torch.stack([w * v.double() for v, w in zip(vectors, weights, strict=True)]).sum(0) / sum(weights)
    torch.testing.assert_close(total.values.vector, plain.to(dtype), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("bound", "weight_bound"), [(2.0**8, 2.0**20), (3.0, 1e6), (2.0**100, 2.0**100), (1e-30, 1e-30)]
)
@pytest.mark.parametrize("cohort", [1, 2, 7, 64])
def test_values_at_the_bounds_do_not_wrap(sign: float, bound: float, weight_bound: float, cohort: int) -> None:
    extreme = update([sign * bound], weight_bound, torch.float64)
    total = Mean(bound=bound, weight_bound=weight_bound)([extreme] * cohort, cohort)
    assert total.values.vector.item() == pytest.approx(sign * bound, rel=2.0**-48)


def test_the_sum_at_the_bounds_fits_int64_for_every_cohort() -> None:
    mean = Mean(bound=5.0, weight_bound=3.0)
    for cohort in (*range(1, 200), 2**31 - 1, 2**52 + 1):
        largest = round(Fraction(15) / Fraction(mean.resolution(cohort)))
        assert cohort * largest < 2**63


def test_a_mean_of_several_sites_counts_as_so_many() -> None:
    pair = update([2.0], weight=2.0 * Mean().weight_bound, count=2, loss=3.0)
    total = Mean()([pair, update([8.0], weight=Mean().weight_bound, loss=1.0)], 3)
    assert (total.count, total.sums["loss"]) == (3, 4.0)
    assert total.values.vector.item() == 4.0
    with pytest.raises(BadInput, match="3 sites in a mean over a cohort of 2"):
        Mean()([pair, update([8.0])], 2)
    assert Mean().refuse(update([2.0], weight=2.1 * Mean().weight_bound, count=2)) is not None


def test_a_merge_beyond_the_cohort_is_refused() -> None:
    full = streamed([update([1.0])] * 3, 3)
    with pytest.raises(BadInput, match="4 sites in a mean over a cohort of 3"):
        full.merge(streamed([update([1.0])], 3))


def test_merging_leaves_the_other_as_it_was() -> None:
    one, two = streamed([update([1.0])], 3), streamed([update([3.0])], 3)
    empty = Accumulator(Mean(), 3)
    empty.merge(one)
    empty.merge(two)
    one.merge(Accumulator(Mean(), 3))
    assert empty.total().values.vector.item() == 2.0
    assert one.total().values.vector.item() == 1.0
    assert two.total().values.vector.item() == 3.0


def test_an_update_that_is_refused_adds_nothing() -> None:
    accumulator = streamed([update([1.0, 5.0])], 3)
    for bad in (update([1.0, math.nan]), update([1.0, 1e9]), update([1.0, 1.0], loss=math.nan)):
        with pytest.raises(BadInput):
            accumulator.add(bad)
    assert accumulator.count == 1
    assert accumulator.total().values.vector.tolist() == [1.0, 5.0]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (update([0.0, math.nan]), "'w' holds nan"),
        (update([0.0, math.inf]), "'w' holds inf"),
        (update([0.0, -math.inf]), "'w' holds inf"),
        (update([0.0, -256.5]), "'w' holds 256.5"),
        (update([0.0], weight=math.nan), "weight nan"),
        (update([0.0], weight=math.inf), "weight inf"),
        (update([0.0], weight=-1.0), "weight -1.0"),
        (update([0.0], weight=2.0**20 + 1), "weight 1048577.0"),
        (update([0.0], weight=0.0, count=0), "count of 0"),
        (update([0.0], loss=math.nan), "sum 'loss' is nan"),
        (update([0.0], loss=-math.inf), "sum 'loss' is -inf"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_the_reason(bad: Update, says: str) -> None:
    refusal = Mean().refuse(bad)
    assert refusal is not None
    assert says in refusal
    with pytest.raises(BadInput, match=says):
        Mean()([bad], 1)


def test_what_is_within_bounds_is_not_refused() -> None:
    for good in (update([256.0, -256.0], weight=2.0**20), update([0.0], weight=0.0), update([])):
        assert Mean().refuse(good) is None


class Counting(nn.Module):
    """A module as BatchNorm is: float parameters, an integer buffer between float ones."""

    def __init__(self, weight: float, batches: int, mean: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.register_buffer("batches", torch.tensor(batches))
        self.register_buffer("mean", torch.tensor([mean]))


def test_counts_in_buffers_may_exceed_the_bound() -> None:
    sites = [
        Update(values=Parameters.of(Counting(2.0, 400_000, 0.5)), kind="value", weight=3.0),
        Update(values=Parameters.of(Counting(4.0, 400_004, 1.5)), kind="value", weight=1.0),
    ]
    total = Mean()(sites, 2).values
    assert [total[name].item() for name in ("weight", "batches", "mean")] == [2.5, 400_001.0, 0.75]
    refusal = Mean().refuse(Update(values=Parameters.of(Counting(2.0, 1, 300.0))))
    assert refusal is not None
    assert "'mean' holds 300.0" in refusal


def test_updates_that_differ_in_form_do_not_add() -> None:
    values = Parameters.zeros(Layout.of({"w": torch.zeros(2)}))
    with pytest.raises(BadInput, match=r"a value in torch\.float32 cannot be added to a difference"):
        Mean()([Update(values=values), Update(values=values, kind="value")], 2)
    with pytest.raises(BadInput, match=r"torch\.float64 cannot be added to a difference in torch\.float32"):
        Mean()([update([1.0]), update([1.0], dtype=torch.float64)], 2)
    with pytest.raises(BadInput, match="different layouts"):
        Mean()([update([1.0]), update([1.0, 2.0])], 2)
    with pytest.raises(BadInput, match="different layouts"):
        streamed([update([1.0])], 2).merge(streamed([update([1.0, 2.0])], 2))
    with pytest.raises(BadInput, match="only sums on one grid"):
        Accumulator(Mean(), 2).merge(Accumulator(Mean(), 3))
    with pytest.raises(BadInput, match="only sums on one grid"):
        Accumulator(Mean(), 2).merge(Accumulator(Mean(bound=1.0), 2))


@pytest.mark.parametrize("kind", ["difference", "value"])
def test_the_kind_stays(kind: Kind) -> None:
    values = Parameters.zeros(Layout.of({"w": torch.zeros(2)}))
    assert Mean()([Update(values=values, kind=kind)], 1).kind == kind


def test_there_is_no_mean_of_nothing() -> None:
    with pytest.raises(TooFewSites, match="no update arrived"):
        Mean()([], 5)
    with pytest.raises(TooFewSites, match=r"all weights \(2 sites\) are zero"):
        Mean()([update([1.0], weight=0.0)] * 2, 5)


def test_sums_of_sites_that_name_different_ones() -> None:
    total = Mean()([update([1.0], loss=2.0), update([1.0], loss=0.5, correct=7.0)], 2)
    assert list(total.sums.items()) == [("correct", 7.0), ("loss", 2.5)]  # their order is no trace of an arrival


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf, 2.0**101])
def test_bounds_are_checked(bound: float) -> None:
    with pytest.raises(BadInput, match=r"Mean.bound must be"):
        Mean(bound=bound)
    with pytest.raises(BadInput, match=r"Mean.weight_bound must be"):
        Mean(weight_bound=bound)
    with pytest.raises(BadInput, match="at least 1 site"):
        Accumulator(Mean(), 0)


def test_tiny_weights_give_a_finite_mean() -> None:
    rule: Rule = Mean()
    total = rule([update([200.0], weight=5e-324), update([100.0], weight=5e-324)], 2)
    assert math.isfinite(total.values.vector.item())


def test_updates_are_taken_and_let_go_one_at_a_time() -> None:
    vectors: list[weakref.ref[Tensor]] = []

    def arriving() -> Iterator[Update]:
        for _ in range(3):
            assert all(vector() is None for vector in vectors)
            each = update([1.0])
            vectors.append(weakref.ref(each.values.vector))
            yield each
            del each

    assert Mean()(arriving(), 3).count == 3
    assert len(vectors) == 3


sites = st.lists(
    st.tuples(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), st.floats(0.5, 500, width=32)),
    min_size=1,
    max_size=9,
)


def side_by_side(rows: list[tuple[list[float], float]]) -> Updates:
    values = torch.tensor([row for row, _ in rows])
    return Updates(
        senders=[f"site-{i}" for i in range(len(rows))],
        layout=Layout.of({"w": values[0]}),
        values=values,
        weights=torch.tensor([weight for _, weight in rows], dtype=torch.float64),
        sums={"loss": values.double().sum(1)},
    )


@given(sites)
def test_updates_side_by_side_combine_to_their_mean(rows: list[tuple[list[float], float]]) -> None:
    updates = side_by_side(rows)
    assert isinstance(Mean(), ManyRule)
    assert Mean().refuse_many(updates) == {}
    combined = Mean().combine(updates)
    expected = Mean()(iter(updates), len(rows))
    torch.testing.assert_close(combined.values.vector, expected.values.vector, rtol=1e-5, atol=1e-4)
    assert combined.count == len(rows)
    assert combined.weight == pytest.approx(expected.weight, rel=1e-12)
    assert combined.sums == pytest.approx(expected.sums, rel=1e-12, abs=1e-10)  # of numbers up to 2,700
    # the parts of a cohort, summed one by one, are the whole again
    parts = [Mean().combine(side_by_side(rows[i : i + 2])) for i in range(0, len(rows), 2)]
    whole = Mean()(iter(parts), len(rows))
    torch.testing.assert_close(whole.values.vector, expected.values.vector, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda u: u.values[1].fill_(math.nan), "nan"),
        (lambda u: u.values[1].fill_(-300.0), "at most 256"),
        (lambda u: u.weights[1].fill_(-1.0), "weight -1"),
        (lambda u: u.weights[1].fill_(2.0**21), "weight"),
        (lambda u: u.weights[1].fill_(math.nan), "weight nan"),
        (lambda u: u.sums["loss"][1].fill_(math.inf), "sum 'loss' is inf"),
    ],
)
def test_one_of_many_is_refused_as_it_would_be_alone(spoil: Callable[[Updates], Tensor], reason: str) -> None:
    updates = side_by_side([([1.0, 2.0, 3.0], 2.0)] * 3)
    spoil(updates)
    assert Mean().refuse_many(updates) == {1: Mean().refuse(list(updates)[1])}
    assert reason in Mean().refuse_many(updates)[1]
    kept = updates.without({1})
    assert kept.senders == ["site-0", "site-2"]
    assert Mean().refuse_many(kept) == {}
    assert kept.sums["loss"].tolist() == [6.0, 6.0]


def test_weights_of_zero_combine_to_nothing() -> None:
    combined = Mean().combine(side_by_side([([1.0, 2.0, 3.0], 0.0)] * 2))
    assert combined.weight == 0
    with pytest.raises(TooFewSites, match="zero"):
        Mean()([combined], 2)
