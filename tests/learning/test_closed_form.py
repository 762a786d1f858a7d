import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeClassifier

from fedelta.core.errors import BadInput
from fedelta.core.parameters import Parameters
from fedelta.learning.closed_form import LDA, Ridge, moments, moments_layout


def rows(seed: int, n: int, width: int, classes: int):
    """Features with one that never changes and one that is the double of another; every class has two rows or more."""
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(2 * classes) % classes, torch.randint(0, classes, (n - 2 * classes,), generator=g)])
    x = torch.randn(n, width, generator=g) * 3 + 0.5 * y[:, None]
    x[:, 0] = 0.25
    x[:, -1] = 2 * x[:, -2]
    return x, y


def over_sites(x, y, sites: list[torch.Tensor], classes: int):
    """The mean of the sites' moments, weighted by their rows."""
    total = torch.zeros(moments_layout(classes, x.shape[1]).size, dtype=torch.float64)
    for rows in sites:
        total += len(rows) * moments(x[rows], y[rows], classes).vector
    return Parameters(moments_layout(classes, x.shape[1]), total / len(y))


problems = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "n": st.integers(12, 80),
        "width": st.integers(3, 12),
        "classes": st.integers(3, 6),
        "sites": st.integers(1, 7),
    }
)


def split(problem):
    x, y = rows(problem["seed"], problem["n"], problem["width"], problem["classes"])
    # sorted by class and cut: as skewed as a split can be
    sites = torch.tensor_split(y.argsort(stable=True), problem["sites"])
    return x, y, over_sites(x, y, sites, problem["classes"])


@given(problems, st.sampled_from([0.01, 0.1, 1.0]))
def test_lda_is_that_of_scikit_learn_on_the_pooled_rows(problem, shrinkage):
    x, y, total = split(problem)
    weight, bias = LDA(shrinkage=shrinkage).solve(total, len(y), True)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.double().numpy(), y.numpy())
    scale = np.abs(reference.coef_).max()
    np.testing.assert_allclose(weight.numpy(), reference.coef_, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, rtol=1e-5, atol=1e-5 * bias.abs().max().item())


@given(problems)
def test_the_shrinkage_that_is_not_given_is_scikit_learns_oas_of_the_rows_less_their_classes(problem):
    x, y, total = split(problem)
    means = torch.stack([x[y == label].double().mean(dim=0) for label in range(problem["classes"])])
    _, shrinkage = oas((x.double() - means[y]).numpy(), assume_centered=True)
    for ours, theirs in zip(
        LDA().solve(total, len(y), True), LDA(shrinkage=shrinkage).solve(total, len(y), True), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@given(problems, st.sampled_from([0.1, 1.0, 50.0]), st.booleans())
def test_ridge_is_that_of_scikit_learn_on_the_pooled_rows(problem, penalty, intercept):
    x, y, total = split(problem)
    weight, bias = Ridge(penalty=penalty).solve(total, len(y), intercept)
    # "svd" solves by other means than the sums of products do
    reference = RidgeClassifier(alpha=penalty, fit_intercept=intercept, solver="svd").fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), reference.coef_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_ * np.ones(len(bias)), rtol=1e-5, atol=1e-6)


def test_moments_are_what_they_say():
    x, y = rows(0, 9, 4, 3)
    found = moments(x, y, 5)
    wide = x.double()
    for label in range(5):
        assert found["class_shares"][label] == (y == label).double().mean()
        torch.testing.assert_close(found["class_sums"][label], wide[y == label].sum(dim=0) / 9)
    second = sum(torch.outer(row, row) for row in wide) / 9
    torch.testing.assert_close(found["second"], torch.stack([second[i, j] for i in range(4) for j in range(i + 1)]))
    assert found.layout.size == 5 + 5 * 4 + 4 * 5 // 2


def test_a_class_that_no_site_has_is_possible_and_never_likely():
    x, y = rows(1, 60, 6, 3)
    weight, bias = LDA().solve(moments(x, y, 4), 60, True)
    logits = x.double() @ weight.T + bias
    assert torch.isfinite(logits).all()
    assert not (logits.argmax(dim=1) == 3).any()
    known, _ = LDA().solve(moments(x, y, 3), 60, True)
    torch.testing.assert_close(weight[:3], known)


def test_features_that_never_differ_within_a_class_are_refused():
    with pytest.raises(BadInput, match="same features"):
        LDA().solve(moments(torch.ones(6, 4), torch.arange(6) % 2, 2), 6, True)


@pytest.mark.parametrize(("make", "said"), [(lambda: LDA(shrinkage=0.0), "0.0"), (lambda: Ridge(penalty=-1.0), "-1.0")])
def test_what_makes_a_singular_system_is_refused(make, said):
    with pytest.raises(BadInput, match=said):
        make()
