import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.linalg import polar
from sklearn.linear_model import RidgeClassifier

from fedelta.aggregation.mean import Mean
from fedelta.core.errors import BadInput
from fedelta.core.messages import Update
from fedelta.core.noise import SeededNoise
from fedelta.data.tables import read_table, text_and_labels
from fedelta.learning.closed_form import Ridge, moments
from fedelta.learning.features import features
from fedelta.learning.lora import LoRA
from fedelta.learning.objectives import Classification
from fedelta.learning.plan import Plan
from fedelta.learning.pretrained import Pretrained, tokenizer
from fedelta.learning.private_moments import VARIANCE, PrivateMoments, private_layout, row_sums
from fedelta.learning.task import Task
from fedelta.learning.text import encode

CLASSES = 3


def rows(seed: int, n: int, width: int):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=g)
    y[:CLASSES] = torch.arange(CLASSES)
    return torch.randn(n, width, generator=g) + 0.7 * y[:, None], y


def mean(updates: list[Update]) -> Update:
    """The weighted mean, in float64."""
    weight = sum(update.weight for update in updates)
    vector = sum(update.weight * update.values.vector for update in updates) / weight
    sums = {name: sum(update.sums[name] for update in updates) for name in updates[0].sums}
    values = updates[0].values.like(vector)
    return Update(values=values, kind="value", weight=weight, sums=sums, count=len(updates))


def through_sites(private: PrivateMoments, x, y, sites: int, seed: int = 0) -> Update:
    """What the coordinator has of rows that are sorted by class and cut among sites."""
    order = torch.tensor_split(y.argsort(stable=True), sites)
    updates = [private.at_site(x[r], y[r], CLASSES, SeededNoise(seed, i)) for i, r in enumerate(order)]
    assert [private.refuse(update) for update in updates] == [None] * sites
    return private.on_total(mean(updates), SeededNoise(seed, "all"))


def explicit(x, y, norm: float) -> torch.Tensor:
    """The vector of each row with all of x x^T, and no triangle packed: [n, c d + d d]."""
    wide = x.double()
    cut = wide * (norm / wide.norm(dim=1, keepdim=True)).clamp(max=1) / norm
    first = math.sqrt(0.75) * torch.einsum("nc,nd->ncd", torch.nn.functional.one_hot(y, CLASSES).double(), cut)
    second = 0.5 * torch.einsum("ni,nj->nij", cut, cut)
    return torch.cat([first.flatten(1), second.flatten(1)], dim=1)


@given(st.integers(0, 2**31), st.integers(20, 60), st.integers(2, 9), st.integers(1, 5), st.floats(0.2, 8))
def test_without_noise_it_is_scikit_learns_ridge_on_the_rows_cut_to_the_norm(seed, n, width, sites, norm):
    x, y = rows(seed, n, width)
    private = PrivateMoments(noise=0.0, unit="example", feature_norm=norm)
    found = private.solve(through_sites(private, x, y, sites), penalty=0.5)
    wide = x.double()
    cut = wide * (norm / wide.norm(dim=1, keepdim=True)).clamp(max=1)
    reference = RidgeClassifier(alpha=0.5, fit_intercept=False, solver="svd").fit(cut.numpy(), y.numpy())
    np.testing.assert_allclose(found.numpy(), reference.coef_, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**31), st.sampled_from([50.0, 1e3]))
def test_without_noise_and_cut_it_is_the_head_that_is_not_private(seed, norm):
    x, y = rows(seed, 50, 6)
    private = PrivateMoments(noise=0.0, unit="example", feature_norm=norm)
    plain, _ = Ridge(penalty=2.0).solve(moments(x, y, CLASSES), 50, intercept=False)
    torch.testing.assert_close(private.solve(through_sites(private, x, y, 4), 2.0), plain, rtol=1e-6, atol=1e-8)


def test_at_site_level_uncut_sites_are_rows_of_equal_weight():
    x, y = rows(0, 40, 5)
    x = 3 * x / x.norm(dim=1, keepdim=True)
    private = PrivateMoments(noise=0.0, unit="site", feature_norm=3.0, site_norm=1.0)
    found = private.solve(through_sites(private, x, y, 4), penalty=1.0)  # four sites of ten rows
    plain, _ = Ridge(penalty=10.0).solve(moments(x, y, CLASSES), 40, intercept=False)
    torch.testing.assert_close(found, plain)


values = st.one_of(
    st.floats(-10, 10, width=32), st.sampled_from([1e-30, 1e30, -3e38, math.inf, -math.inf, math.nan, 0.0])
)


@given(st.lists(st.tuples(st.lists(values, min_size=4, max_size=4), st.integers(0, 2)), min_size=1), st.data())
def test_a_row_that_counts_as_nothing_moves_the_sum_by_one_at_most(found, data):
    x, y = torch.tensor([row for row, _ in found]), torch.tensor([label for _, label in found])
    norm, gone = data.draw(st.floats(1e-3, 1e3)), data.draw(st.integers(0, len(y) - 1))
    without = x.clone()
    without[gone] = 0
    moved = row_sums(x, y, CLASSES, norm).vector - row_sums(without, y, CLASSES, norm).vector
    assert float(moved.norm()) <= 1 + 1e-12
    others = torch.arange(len(y)) != gone
    left_out = row_sums(x[others], y[others], CLASSES, norm).vector
    torch.testing.assert_close(row_sums(without, y, CLASSES, norm).vector, left_out)


@given(st.integers(0, 2**31), st.floats(0.2, 8))
def test_a_row_is_as_long_as_with_all_of_its_second_moment(seed, norm):
    x, y = rows(seed, 10, 5)
    each = torch.stack([row_sums(x[i : i + 1], y[i : i + 1], CLASSES, norm).vector for i in range(10)])
    full = explicit(x, y, norm)
    torch.testing.assert_close(each @ each.T, full @ full.T, rtol=1e-13, atol=1e-13)
    long = x.double().norm(dim=1) > norm
    assert bool(((each.norm(dim=1) - 1).abs()[long] < 1e-13).all())  # the bound is reached


@given(st.integers(0, 2**31), st.floats(0.01, 1), st.floats(1e-3, 1e3), st.integers(1, 30))
def test_no_site_counts_for_more_than_one(seed, site_norm, norm, n):
    x, y = rows(seed, n + CLASSES, 4)
    private = PrivateMoments(noise=1.0, unit="site", feature_norm=norm, site_norm=site_norm)
    sent = private.at_site(x, y, CLASSES, None)
    assert (sent.weight, sent.sums) == (1.0, {})
    assert float(sent.values.vector.norm()) <= 1 + 1e-12
    mean = row_sums(x, y, CLASSES, norm).vector / len(y)
    cut = mean * min(1.0, site_norm / float(mean.norm()))
    torch.testing.assert_close(sent.values.vector, cut / site_norm)


def assert_normal(draws: torch.Tensor, std: float) -> None:
    """Of that standard deviation, by the chi-square of their squares, and of that shape."""
    squares = float((draws / std).square().sum())
    assert min(stats.chi2.cdf(squares, len(draws)), stats.chi2.sf(squares, len(draws))) > 1e-3
    assert stats.kstest(draws.numpy() / std, "norm").pvalue > 1e-3


def test_a_site_adds_the_noise_that_hides_one_row_and_says_so():
    x, y = rows(3, 30, 100)
    plain = row_sums(x, y, CLASSES, 2.0).vector
    private = PrivateMoments(noise=1.7, unit="example", feature_norm=2.0)
    sent = private.at_site(x, y, CLASSES, SeededNoise(0, "a"))
    assert_normal(sent.weight * sent.values.vector - plain, 1.7)
    assert (sent.weight, sent.sums) == (30.0, {VARIANCE: 1.7**2})
    # with every site's own noise, the variances add up
    other = PrivateMoments(noise=0.6, unit="example", feature_norm=2.0).at_site(x, y, CLASSES, SeededNoise(0, "b"))
    total = private.on_total(mean([sent, other]), None)
    assert total.sums[VARIANCE] == pytest.approx(1.7**2 + 0.6**2)
    assert_normal(total.weight * total.values.vector - 2 * plain, math.sqrt(total.sums[VARIANCE]))


def test_the_coordinator_adds_the_noise_that_hides_one_site():
    x, y = rows(4, 60, 100)
    private = PrivateMoments(noise=1.3, unit="site", site_norm=0.4)
    plain = sum(private.at_site(x[r], y[r], CLASSES, None).values.vector for r in y.argsort(stable=True).split(10))
    total = through_sites(private, x, y, 6)
    assert (total.weight, total.sums) == (6.0, {VARIANCE: 1.3**2})
    assert_normal(total.weight * total.values.vector - plain, 1.3)


@given(st.integers(0, 2**31), st.sampled_from([0.3, 3.0]), st.sampled_from(["site", "example"]))
def test_with_noise_it_is_least_squares_on_the_nearest_moment_that_rows_can_have(seed, noise, unit):
    x, y = rows(seed, 40, 6)
    private = PrivateMoments(noise=noise, unit=unit, feature_norm=2.0, site_norm=1.0)
    total = through_sites(private, x, y, 4, seed)
    triangle = np.zeros((6, 6))
    triangle[np.tril_indices(6)] = 2 * total.weight * total.values["second"].numpy()
    second = (triangle - np.diag(triangle.diagonal())) / math.sqrt(2)
    second = second + second.T + np.diag(triangle.diagonal())
    nearest = (second + polar(second)[1]) / 2  # the nearest one without negative eigenvalues (Higham 1988)
    sums = total.weight * total.values["class_sums"].numpy() / math.sqrt(0.75)
    enlarged = 0.5 / 2.0**2 + math.sqrt(6 * total.sums[VARIANCE] * 2)
    expected = np.linalg.solve(nearest + enlarged * np.eye(6), (2 * sums - sums.sum(axis=0)).T).T / 2.0
    np.testing.assert_allclose(private.solve(total, 0.5).numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("width", [40, 300])
def test_the_penalty_is_enlarged_by_half_of_the_largest_eigenvalue_of_the_noise(width):
    private = PrivateMoments(noise=2.0, unit="example")
    noise = private.at_site(torch.zeros(1, width), torch.zeros(1, dtype=torch.int64), CLASSES, SeededNoise(5))
    # the triangle as it was packed: half of x x^T, and sqrt(2) times what is off the diagonal
    lower = torch.tril_indices(width, width)
    matrix = torch.zeros(width, width, dtype=torch.float64)
    matrix[lower[0], lower[1]] = noise.values["second"] / 0.5 / torch.where(lower[0] == lower[1], 1, math.sqrt(2))
    matrix = matrix + matrix.tril(-1).T
    probe = Update(values=noise.values.like(torch.zeros(noise.values.layout.size).double()), sums=noise.sums)
    probe.values["class_sums"][0, 0] = math.sqrt(0.75)  # of features 1, 0, 0, ... and a second moment of nothing
    enlarged = 1 / float(private.solve(probe, penalty=1.0)[0, 0]) - 1
    assert enlarged == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)) / 2, rel=0.12)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(3, 12),
    width=st.integers(1, 20),
    sites=st.integers(1, 3),
    private=st.builds(
        PrivateMoments,
        noise=st.one_of(st.just(0.0), st.floats(1e-3, 1000)),
        unit=st.sampled_from(["site", "example"]),
        feature_norm=st.floats(1e-6, 1e6),
        site_norm=st.floats(1e-6, 1),
    ),
)
def test_whatever_the_noise_there_is_a_head_and_nothing_is_too_large_to_be_added(seed, n, width, sites, private):
    x, y = rows(seed, n, width)
    order = torch.tensor_split(torch.arange(n), sites)
    updates = [private.at_site(x[r], y[r], CLASSES, SeededNoise(seed, i)) for i, r in enumerate(order)]
    assert [Mean(bound=2.0**14).refuse(update) for update in updates] == [None] * sites
    total = private.on_total(mean(updates), SeededNoise(seed, "all"))
    weight = private.solve(total, penalty=1.0)
    assert weight.shape == (CLASSES, width)
    assert bool(weight.isfinite().all())


def test_what_no_site_sends_is_refused():
    values = row_sums(*rows(0, 9, 4), CLASSES, 1.0)
    unit = values.like(values.vector / values.vector.norm())
    site, example = (PrivateMoments(noise=1.0, unit=unit) for unit in ("site", "example"))
    assert site.refuse(Update(values=unit)) is None
    assert "its norm is 2" in site.refuse(Update(values=unit.like(2 * unit.vector)))
    assert "its norm is nan" in site.refuse(Update(values=unit.like(math.nan * unit.vector)))
    assert "not the weight 1" in site.refuse(Update(values=unit, weight=3.0))
    assert site.refuse(Update(values=unit, weight=3.0, count=3)) is None  # the mean of three sites
    assert "not the weight 1" in site.refuse(Update(values=unit, sums={"loss": 1.0}))
    assert example.refuse(Update(values=values, weight=9.0, sums={VARIANCE: 1.0})) is None
    for sums in ({}, {VARIANCE: -1.0}, {VARIANCE: math.nan}, {VARIANCE: 1.0, "loss": 1.0}):
        assert "how much noise" in example.refuse(Update(values=values, sums=sums))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": -1.0}, "noise must be from 0.001 to 1000, or 0, got -1.0"),
        ({"noise": math.nan}, "got nan"),
        ({"noise": 1001.0}, "got 1001.0"),
        ({"unit": "row"}, "is 'site' or 'example', got 'row'"),
        ({"feature_norm": 0.0}, "feature_norm must be from 1e-6 to 1e6, got 0.0"),
        ({"site_norm": 1.5}, r"site_norm must be in \(0, 1\], got 1.5"),
    ],
)
def test_what_makes_no_mechanism_is_refused(options, said):
    with pytest.raises(BadInput, match=said):
        PrivateMoments(**{"noise": 1.0, "unit": "site", **options})


def test_the_layout_is_what_travels():
    assert private_layout(4, 384).size == 4 * 384 + 384 * 385 // 2


def gaussian_delta(noise: float, epsilon: float) -> float:
    """Of one Gaussian mechanism of sensitivity 1 (Balle & Wang, ICML 2018, theorem 8)."""
    shift = 1 / (2 * noise)
    return stats.norm.cdf(shift - epsilon * noise) - math.exp(epsilon) * stats.norm.cdf(-shift - epsilon * noise)


def test_on_600_real_news_the_head_at_epsilon_8_is_within_15_points_of_the_one_without_privacy(shared, minilm):
    table = read_table(shared("ag-news") / "test.csv", ["class", "title", "description"]).iloc[:800]
    texts, labels, names = text_and_labels(table, ["title", "description"], "class")
    examples = encode(texts, torch.from_numpy(labels), tokenizer(str(minilm)), 16)
    task = Task(model=Pretrained(source=str(minilm), labels=names, tuning=LoRA()), objective=Classification(classes=4))
    module = task.build(0).get_base_model()
    found = features(module, ["classifier"], examples, Plan(), torch.empty(len(examples), 384))
    y, trained = examples.targets, torch.arange(len(examples)) < 600
    noise = 0.6003
    assert 0.99e-5 < gaussian_delta(noise, 8) < 1e-5
    private = PrivateMoments(noise=noise, unit="example")
    accuracy = []
    for seed in range(4):
        update = private.at_site(found[trained], y[trained], 4, SeededNoise(seed))
        logits = found[~trained].double() @ private.solve(private.on_total(update, None), 1.0).T
        accuracy.append((logits.argmax(dim=1) == y[~trained]).double().mean())
    weight, bias = Ridge().solve(moments(found[trained], y[trained], 4), 600, intercept=True)
    without = ((found[~trained].double() @ weight.T + bias).argmax(dim=1) == y[~trained]).double().mean()
    assert without > 0.75
    assert sum(accuracy) / 4 > without - 0.15
