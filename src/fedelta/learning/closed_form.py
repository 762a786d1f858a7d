"""Heads solved in closed form from sums over frozen features: round zero of a federation.

With features x in R^d, every site sends per class its number of rows and the sum of their features, and the sum of
x x^T over all rows: `moments`. They add up, so that the head is that of the pooled rows, however the rows are split.

LDA is linear discriminant analysis with a shared covariance (Hastie et al., The Elements of Statistical Learning, 2nd
ed., section 4.3), shrunk towards a multiple of the identity: models have features that never change, of which the plain
covariance is singular. Ridge is least squares on targets of +1 and -1 with an L2 penalty and a free intercept (ibid.,
sections 3.4.1 and 4.2). Solving such heads from sums of sites: FedCGS (Guan et al., IJCAI 2025, section 3)
and GH-OFL (Turazza et al., ICLR 2026, closed-form heads).

Limits: classification with one linear layer at the end. The sums of a class with a single row are that row's features:
whoever sees the sums of one site sees them.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fedelta.core.errors import BadInput
from fedelta.core.parameters import Layout, Parameters


class ClosedForm(Protocol):
    @property
    def needs_bias(self) -> bool:
        """Whether there is no such head without a bias."""
        ...

    def solve(self, total: Parameters, rows: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """Weight [classes, d] and bias [classes] of a head, float64, from the mean `moments` of `rows` rows.

        Without an `intercept` the bias is zero. Raises BadInput if the features do not determine a head.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LDA:
    """Logits are log posteriors of Gaussian classes with one covariance, S' = (1 - s) S + s (tr S / d) I.

    S is the covariance within the classes, divided by the number of rows. Equals scikit-learn's
    LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s). Where s is not given, it is the oracle approximating
    shrinkage (Chen et al., IEEE Transactions on Signal Processing 2010, equation 23), which needs no more than S and
    the number of rows; scikit-learn's `oas` of the rows less the means of their classes. A class without rows gets the
    mean of all rows, and the prior of half a row.
    """

    needs_bias: ClassVar[bool] = True

    shrinkage: float | None = None  # s, in (0, 1]

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0 < self.shrinkage <= 1:
            raise BadInput(f"LDA.shrinkage must be in (0, 1], got {self.shrinkage}")

    def solve(self, total: Parameters, rows: float, intercept: bool) -> tuple[Tensor, Tensor]:
        shares, sums, second = _unpacked(total)
        present = shares > 0
        overall = sums.sum(dim=0)
        means = torch.where(present[:, None], sums / shares.clamp(min=torch.finfo(shares.dtype).tiny)[:, None], overall)
        within = second - (sums.T * torch.where(present, 1 / shares, 0.0)) @ sums
        spread = float(within.diagonal().mean())
        if not spread > 0:
            raise BadInput("all rows of a class have the same features; the head cannot be solved in closed form")
        shrinkage = _oas(within, rows) if self.shrinkage is None else self.shrinkage
        shrunk = (1 - shrinkage) * within
        shrunk.diagonal().add_(shrinkage * spread)
        weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk)).T
        prior = torch.where(present, shares, 0.5 / rows).log()
        return weight, prior - 0.5 * (weight * means).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """Logits are least-squares estimates of +1 for the row's class and -1 for the others.

    With an intercept, equals scikit-learn's RidgeClassifier(alpha=penalty), for more than two classes; without one,
    RidgeClassifier(alpha=penalty, fit_intercept=False).
    """

    needs_bias: ClassVar[bool] = False

    penalty: float = 1.0  # on the squared weights, beside the sum of squared errors over all rows

    def __post_init__(self) -> None:
        if not 0 < self.penalty < math.inf:
            raise BadInput(f"Ridge.penalty must be > 0 and finite, got {self.penalty}")

    def solve(self, total: Parameters, rows: float, intercept: bool) -> tuple[Tensor, Tensor]:
        shares, sums, second = _unpacked(total)
        overall = sums.sum(dim=0)
        targets = 2 * shares - 1  # means of the columns of +1 and -1
        with_targets = 2 * sums - overall  # means of their products with the features
        if intercept:
            second = second - torch.outer(overall, overall)
            with_targets = with_targets - torch.outer(targets, overall)
        second.diagonal().add_(self.penalty / rows)
        weight = torch.cholesky_solve(with_targets.T, torch.linalg.cholesky(second)).T
        return weight, targets - weight @ overall if intercept else torch.zeros_like(targets)


@cache
def moments_layout(classes: int, features: int) -> Layout:
    """Of `moments`: 8 (c + c d + d (d + 1) / 2) bytes for c classes and d features."""
    packed = features * (features + 1) // 2
    shapes = {"class_shares": (classes,), "class_sums": (classes, features), "second": (packed,)}
    return Layout.of({name: torch.empty(shape, dtype=torch.float64) for name, shape in shapes.items()})


def moments(features: Tensor, targets: Tensor, classes: int) -> Parameters:
    """Means over the rows of `features` [n, d], in float64, n >= 1; `targets` int64 [n] in 0..classes-1.

    "class_shares" [c] is the share of the rows in each class, "class_sums" [c, d] the sum of their features divided by
    n, and "second" [d (d + 1) / 2] the lower triangle of the mean of x x^T, row by row. The mean over sites, weighted
    by their rows, is that of all their rows.
    """
    wide = features.double()
    rows, width = wide.shape
    mean = Parameters.zeros(moments_layout(classes, width), torch.float64)
    mean["class_shares"].copy_(torch.bincount(targets, minlength=classes).double() / rows)
    mean["class_sums"].index_add_(0, targets, wide).div_(rows)
    lower = torch.tril_indices(width, width)
    mean["second"].copy_((wide.T @ wide)[lower[0], lower[1]].div_(rows))
    return mean


def _oas(covariance: Tensor, rows: float) -> float:
    """The oracle approximating shrinkage of a covariance [d, d]; scikit-learn's form, without terms of 2 / d."""
    squared, mean = float(covariance.square().mean()), float(covariance.diagonal().mean())
    excess = (rows + 1) * (squared - mean**2 / len(covariance))
    return min(1.0, (squared + mean**2) / excess) if excess > 0 else 1.0


def _unpacked(total: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """Shares [c], sums [c, d] and the second moment [d, d], which may be written to."""
    shares, sums = total["class_shares"], total["class_sums"]
    width = sums.shape[1]
    second = sums.new_empty(width, width)
    lower = torch.tril_indices(width, width)
    second[lower[0], lower[1]] = total["second"]
    second[lower[1], lower[0]] = total["second"]
    return shares, sums, second
