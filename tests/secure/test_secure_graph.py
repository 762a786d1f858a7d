"""The graph's shape, against exact fractions and scipy's hypergeometric tails; the laws of quorum and threshold."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedelta.core.errors import BadInput
from fedelta.secure.graph import Shape, quorum, shape

SECURITY, FAILURE = Fraction(1, 2**40), Fraction(1, 2**30)


def tail(population, marked, drawn, least):
    """P[Hypergeometric(population, marked, drawn) >= least], exactly."""
    ways = sum(
        math.comb(marked, x) * math.comb(population - marked, drawn - x)
        for x in range(max(least, 0), min(marked, drawn) + 1)
    )
    return Fraction(ways, math.comb(population, drawn))


def correct(listed, lost, k, t):
    return listed * tail(listed - 1, lost, k, k - t + 1) <= FAILURE


def secret(sites, listed, corrupt, k, t):
    """The union bound over groups cut off, exactly; stops as soon as it is too large."""
    total = Fraction()
    for s in range(1, min(sites // 3, listed) + 1):
        marked = min(corrupt + s - 1, listed - 1)
        total += math.comb(listed, s) * tail(listed - 1, marked, k, t) ** s
        if total > SECURITY:
            return False
    return True


def reference(sites, listed, corrupt, lost):
    """The least k < listed - 1 for which some t will do, with the largest t; None if there is none. By trying all."""
    for k in range(1, listed - 1):
        for t in range(k, 0, -1):
            if correct(listed, lost, k, t):
                if secret(sites, listed, corrupt, k, t):
                    return k, t
                break  # a smaller t is no more secret
    return None


@given(st.integers(65, 110), st.integers(0, 12), st.integers(0, 12), st.integers(0, 8))
@settings(max_examples=25, deadline=None)
def test_shape_is_the_least_by_exact_fractions(sites, corrupt, lost, missing):
    listed = max(65, sites - missing)
    expected = reference(sites, listed, corrupt, max(0, lost - (sites - listed)))
    if expected is None:
        expected = listed - 1, min(listed - 1, quorum(sites) - 1)
    colluding, dropouts = (math.nextafter(count / sites, 1) for count in (corrupt, lost))
    assert shape(sites, colluding, dropouts, listed=listed) == Shape(*expected)


@pytest.mark.parametrize(
    ("sites", "colluding", "dropouts"),
    [(500, 0.05, 0.05), (800, 0.1, 0.1), (600, 0.3, 0.05), (2000, 0.05, 0.05)],
)
def test_shape_of_many_sites_by_tails_of_scipy(sites, colluding, dropouts):
    found = shape(sites, colluding, dropouts)
    corrupt, lost = round(sites * colluding), round(sites * dropouts)
    groups = np.arange(1, sites // 3 + 1)
    ways = [math.log(math.comb(sites, s)) for s in groups.tolist()]

    def fails(k, t):
        return (math.log(sites) + stats.hypergeom(sites - 1, lost, k).logsf(k - t)) / math.log(2)

    def leaks(k, t):
        each = stats.hypergeom(sites - 1, corrupt + groups - 1, k).logsf(t - 1)
        return np.logaddexp.reduce(ways + groups * each) / math.log(2)

    k, t = found.neighbours, found.threshold
    assert fails(k, t) <= -30 < fails(k, t + 1)  # t is the largest
    assert leaks(k, t) <= -40
    largest = t if fails(k - 1, t) <= -30 else t - 1
    assert fails(k - 1, largest) <= -30 < fails(k - 1, largest + 1)
    assert leaks(k - 1, largest) > -40  # so k - 1 will not do


def test_figures():
    assert shape(100, 0.1, 0.1) == Shape(24, 14)
    assert shape(10_000, 0.05, 0.05) == Shape(37, 20)


@pytest.mark.parametrize("sites", range(2, 65))
def test_up_to_64_sites_the_graph_is_complete(sites):
    assert shape(sites, 0.0, 0.0) == Shape(sites - 1, math.floor(Fraction(2 * sites, 3)))
    assert shape(200, 0.0, 0.0, listed=max(2, sites)).neighbours == max(2, sites) - 1


@given(st.integers(2, 64), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_a_complete_graph_bears_what_it_accepts_and_refuses_the_rest(sites, corrupt, lost):
    k, t, q = sites - 1, quorum(sites) - 1, quorum(sites)
    corrupt, lost = min(corrupt, sites), min(lost, sites)
    bears = (
        t > corrupt  # who collude have too few shares of either secret
        and sites - lost >= q  # and the survivors are a quorum
        and 2 * q - sites > corrupt  # two quorums share an honest site
    )
    colluding, dropouts = corrupt / sites, lost / sites
    if Fraction(str(colluding)) * sites < corrupt:
        colluding = math.nextafter(colluding, 2)
    if Fraction(str(dropouts)) * sites < lost:
        dropouts = math.nextafter(dropouts, 2)
    if bears:
        assert shape(sites, colluding, dropouts) == Shape(k, t)
    else:
        with pytest.raises(BadInput, match="lower"):
            shape(sites, colluding, dropouts)


@given(st.integers(2, 10_000))
def test_two_quorums_share_more_than_a_third_of_the_sites(sites):
    q = quorum(sites)
    assert q == math.floor(Fraction(2, 3) * sites) + 1
    assert q <= sites
    assert Fraction(2 * q - sites, sites) > Fraction(1, 3)


def test_shares_of_sites_are_counted_by_their_decimals():
    for share in (0.07, 0.14, 0.28, 0.29):  # each times 100 is less than its count in floats, or more
        above = math.nextafter(share, 1)
        assert shape(100, share, 0.01) == shape(100, above, 0.01)
        assert shape(100, 0.01, share / 2) == shape(100, 0.01, math.nextafter(share / 2, 1))
    assert math.floor(0.29 * 100) == 28
    assert shape(100, 0.29, 0.0) != shape(100, 0.28, 0.0)


def test_who_sent_no_keys_counts_as_dropped_out_and_the_colluding_stay():
    assert shape(120, 0.1, 0.1, listed=108) == shape(108, 12 / 108 + 1e-9, 0.0, listed=None)
    assert shape(120, 0.1, 0.1, listed=120) == shape(120, 0.1, 0.1)


def test_more_to_bear_takes_more_neighbours():
    by_colluding = [shape(300, share, 0.05).neighbours for share in (0.0, 0.1, 0.2, 0.3)]
    by_dropouts = [shape(300, 0.05, share).neighbours for share in (0.0, 0.1, 0.2)]
    assert by_colluding == sorted(set(by_colluding))
    assert by_dropouts == sorted(set(by_dropouts))


@pytest.mark.parametrize(
    ("sites", "colluding", "dropouts", "message"),
    [
        (1, 0.0, 0.0, "2 sites at least"),
        (0, 0.0, 0.0, "2 sites at least"),
        (10, -0.1, 0.0, "colluding must be from 0 to 1, got -0.1"),
        (10, 0.0, 1.5, "dropouts must be from 0 to 1, got 1.5"),
        (10, math.nan, 0.0, "colluding must be from 0 to 1, got nan"),
        (1000, 0.4, 0.0, "bears 333 that collude at most, got 400; lower colluding"),
        (1000, 0.0, 0.4, "bears the loss of 333 at most, got 400; lower dropouts"),
        (3, 0.67, 0.0, "no graph among 3 of 3 sites bears 2 that collude"),
    ],
)
def test_what_no_graph_bears_is_refused_with_the_cure(sites, colluding, dropouts, message):
    with pytest.raises(BadInput, match=message):
        shape(sites, colluding, dropouts)


@pytest.mark.parametrize("listed", [0, 1, 11])
def test_a_list_of_too_few_or_of_more_than_were_asked_is_refused(listed):
    with pytest.raises(BadInput, match=f"got {listed} of 10"):
        shape(10, 0.0, 0.0, listed=listed)


@pytest.mark.parametrize(("neighbours", "threshold"), [(3, 0), (3, 4), (0, 0), (-1, -2)])
def test_a_threshold_beyond_the_neighbours_is_refused(neighbours, threshold):
    with pytest.raises(BadInput, match="from 1 to the number of neighbours"):
        Shape(neighbours, threshold)
