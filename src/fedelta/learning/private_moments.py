"""Sums over frozen features that are differentially private, and the ridge head that is solved from them.

With a row's features x, cut to norm R: u = x min(1, R / |x|) / R, and its class y, the row is the vector of b u in the
place of its class, and of c u u^T: its lower triangle, with what is off the diagonal times sqrt(2), which has the norm
of the matrix. As b^2 + c^2 = 1 and |u| <= 1, no row has a norm above 1: that is how far one row that counts as nothing
moves a sum of rows. Isotropic noise on such a triangle is a symmetric Gaussian matrix.

Example-level: every site adds N(0, z^2) to the sum of its rows before it leaves; the number of its rows is public.
Site-level: every site sends the mean of its rows, cut to norm S and divided by S, so that it, too, has norm 1 at most,
with weight 1; the coordinator adds N(0, z^2) to the sum over sites. Either is one Gaussian mechanism with the noise
multiplier z: for neighbours by zero-out of a row at a site, and for neighbours with one site more or fewer.

Perturbed sufficient statistics: Vu & Slavkovic (ICDM workshops 2009) and Foulds et al. (UAI 2016). A penalty that knows
the noise, and symmetric noise on x x^T: AdaSSP (Wang, UAI 2018); there the penalty is a bound that holds with high
probability on the largest eigenvalue of the noise, here half of what that is expected to be, which predicted better
where both were tried. Least squares for private heads on features: Mehta et al., Differentially Private Image
Classification from Features (TMLR 2023).

Limits: no counts of classes are released, so that the head has no intercept: classes are told apart through the origin.
Features that are much shorter than R drown in the noise; where they are longer, all rows count alike, and only the size
of the logits is that of rows of norm R. So it is with S: below the norms of sites, it makes all of them count alike.
Rounding (of the sums, and of features that are computed in one batch with others) is not part of the analysis.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from fedelta.core.errors import BadInput
from fedelta.core.messages import Update
from fedelta.core.noise import Noise
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.release import Unit

_SECOND = 0.5  # c: less, and the second moment drowns; more, and the sums of the classes do
_FIRST = math.sqrt(1 - _SECOND**2)
VARIANCE = "variance"  # in `Update.sums`: of the noise in the sum of what was sent; no secret
# Less hides nothing; more leaves nothing to be learned, and one row with so much can still be added to others.
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e3
_ROTATION = 0  # which of the public ones is that of round zero


class Discrete(Protocol):
    """How vectors of norm 1 at most become whole numbers with a share of noise, and a sum of them a vector again."""

    def at_site(self, vector: Tensor, noise: Noise, seed: int) -> Tensor: ...

    def decoded(self, total: Tensor, seed: int) -> Tensor: ...

    def deviation(self, count: int) -> float:
        """Standard deviation of an element of a sum over so many."""
        ...


@dataclass(frozen=True, kw_only=True)
class PrivateMoments:
    """How the sums of round zero are made private.

    Where the unit is the example, sites may have noise of their own: each says how much there is in what it sends.
    With `discrete` noise, for the unit "site", sites add it in shares, and the coordinator none.
    """

    noise: float  # z: standard deviation of the noise, in units of the sensitivity; 0 gives no guarantee
    unit: Unit
    feature_norm: float = 1.0  # R, in the units of the features: a public number, never one found on the rows
    site_norm: float = 0.5  # S, in (0, 1], of the mean over a site's rows: 1 cuts nothing; for the unit "site" only
    discrete: Callable[[int], Discrete] | None = None  # for vectors of so many numbers

    def __post_init__(self) -> None:
        if self.noise != 0 and not _LEAST_NOISE <= self.noise <= _MOST_NOISE:
            limits = f"from {_LEAST_NOISE:g} to {_MOST_NOISE:g}, or 0"
            raise BadInput(f"PrivateMoments.noise must be {limits}, got {self.noise}")
        if self.unit not in ("site", "example"):
            raise BadInput(f"PrivateMoments.unit is 'site' or 'example', got {self.unit!r}")
        if not 1e-6 <= self.feature_norm <= 1e6:
            raise BadInput(f"PrivateMoments.feature_norm must be from 1e-6 to 1e6, got {self.feature_norm}")
        if not 0 < self.site_norm <= 1:
            raise BadInput(f"PrivateMoments.site_norm must be in (0, 1], got {self.site_norm}")

    def at_site(self, features: Tensor, targets: Tensor, classes: int, noise: Noise | None) -> Update:
        """What a site sends, of `features` [n, d], n >= 1, and `targets` int64 [n] in 0..classes-1.

        `noise` is drawn from where the unit is the example, or noise discrete, and only there. A row of features that
        are not finite counts as nothing.
        """
        sums = row_sums(features, targets, classes, self.feature_norm)
        if self.unit == "site":
            mean = sums.vector / len(targets)
            kept = mean / max(self.site_norm, float(mean.norm()))
            if self.discrete is not None:
                assert noise is not None, "shares of noise come from the sites"
                kept = self.discrete(len(kept)).at_site(kept, noise, _ROTATION)
            return Update(values=sums.like(kept), kind="value")
        assert noise is not None, "noise for single rows comes from their site"
        noise.add_normal(sums.vector, self.noise)
        rows = float(len(targets))
        return Update(values=sums.like(sums.vector / rows), kind="value", weight=rows, sums={VARIANCE: self.noise**2})

    def refuse(self, update: Update) -> str | None:
        """Why what has arrived is not what `at_site` sends, if it is not. It may be the mean of several sites."""
        if self.unit == "example":
            if update.sums.keys() != {VARIANCE} or not update.sums[VARIANCE] >= 0:
                return f"it has to say how much noise is in it, and has the sums {dict(update.sums)}"
            return None
        if update.sums or update.weight != update.count:
            return f"it has the weight {update.weight:g} and the sums {dict(update.sums)}, not the weight 1 of a site"
        if self.discrete is None and not float(update.values.vector.norm()) <= 1 + 1e-9:
            return f"its norm is {float(update.values.vector.norm()):g}, and that of a site is at most 1"
        return None

    def on_total(self, mean: Update, noise: Noise | None) -> Update:
        """The weighted mean of what sites have sent, with the noise in it that is the coordinator's to add.

        `noise` is drawn from where the unit is the site, and noise not discrete, and only there. `sums` has the
        variance of all noise in weight x values.
        """
        if self.unit == "example":
            return mean
        noised, deviation = mean.values.vector * mean.weight, self.noise
        if self.discrete is not None:
            form = self.discrete(len(noised))
            noised, deviation = form.decoded(noised.round(), _ROTATION), form.deviation(mean.count)
        else:
            assert noise is not None, "noise for single sites comes from the coordinator"
            noise.add_normal(noised, self.noise)
        return Update(
            values=mean.values.like(noised / mean.weight),
            kind=mean.kind,
            weight=mean.weight,
            sums={VARIANCE: deviation**2},
            count=mean.count,
        )

    def solve(self, total: Update, penalty: float) -> Tensor:
        """The weight [classes, d], float64, of a head without a bias, from what `on_total` gives.

        Logits are least-squares estimates of +1 for the row's class and -1 for the others. Without noise and for the
        unit "example", equals scikit-learn's RidgeClassifier(alpha=penalty, fit_intercept=False) on the rows cut to
        norm R; for the unit "site", every site counts as one row. Noise of std s in the second moment off the diagonal
        adds s sqrt(d) to the penalty: its largest eigenvalue is about twice that, and an eigenvalue of the rows that is
        smaller cannot be seen in it (Feral & Peche, Communications in Mathematical Physics 2007). Eigenvalues that
        noise has made negative count as zero.
        """
        sums = total.values["class_sums"] * (total.weight / _FIRST)
        second = _unpacked(total.values["second"] * (total.weight / _SECOND), sums.shape[1])
        std = math.sqrt(total.sums[VARIANCE] / 2) / _SECOND
        enlarged = penalty / self.feature_norm**2 + std * math.sqrt(sums.shape[1])
        eigenvalues, vectors = torch.linalg.eigh(second)
        with_targets = 2 * sums - sums.sum(dim=0)
        weight: Tensor = (with_targets @ vectors / (eigenvalues.clamp(min=0) + enlarged)) @ vectors.T
        return weight / self.feature_norm


@cache
def private_layout(classes: int, features: int) -> Layout:
    """Of `row_sums`: 8 (c d + d (d + 1) / 2) bytes for c classes and d features."""
    packed = features * (features + 1) // 2
    shapes = {"class_sums": (classes, features), "second": (packed,)}
    return Layout.of({name: torch.empty(shape, dtype=torch.float64) for name, shape in shapes.items()})


def row_sums(features: Tensor, targets: Tensor, classes: int, feature_norm: float) -> Parameters:
    """The sum of the vectors of rows, none of which has a norm above 1, in float64; see the module for what they are.

    "class_sums" [c, d] and "second" [d (d + 1) / 2], row by row.
    """
    wide = features.double()
    norms = wide.norm(dim=1, keepdim=True)
    cut = torch.where(norms.isfinite(), wide / norms.clamp(min=feature_norm), 0.0)
    width = cut.shape[1]
    total = Parameters.zeros(private_layout(classes, width), torch.float64)
    total["class_sums"].index_add_(0, targets, cut, alpha=_FIRST)
    lower = torch.tril_indices(width, width)
    total["second"].copy_((cut.T @ cut)[lower[0], lower[1]] * _scales(width))
    return total


def _scales(width: int) -> Tensor:
    """What an element of x x^T is multiplied by where it is packed."""
    lower = torch.tril_indices(width, width)
    scales = torch.full((lower.shape[1],), _SECOND * math.sqrt(2), dtype=torch.float64)
    scales[lower[0] == lower[1]] = _SECOND
    return scales


def _unpacked(packed: Tensor, width: int) -> Tensor:
    """The symmetric matrix [d, d] of which `packed` is the lower triangle, what is off the diagonal times sqrt(2)."""
    matrix = packed.new_empty(width, width)
    lower = torch.tril_indices(width, width)
    values = packed * (_SECOND / _scales(width))
    matrix[lower[0], lower[1]] = values
    matrix[lower[1], lower[0]] = values
    return matrix
