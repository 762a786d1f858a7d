"""What bounds the influence of one site: its update is scaled down to an L2 norm, fixed or adapted to the sites.

The adaptive norm is that of Andrew et al., "Differentially private learning with adaptive clipping" (NeurIPS 2021,
Algorithm 1): it follows a quantile of the norms of updates, of which each site says no more than on which side of the
present one its own is, and that number is noised as the updates are.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedelta.core.errors import BadInput

WITHIN = "within"  # the number of an update that says on which side of the norm it is: +1/2 within, -1/2 beyond
_MARGIN = 1 - 1e-6  # for the rounding of float32, so that the bound holds for what is sent


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """The norm starts at `initial` and is multiplied by exp(-lr (share of updates within it - quantile)) each round."""

    initial: float = 0.1
    quantile: float = 0.5  # gamma, in [0, 1]
    lr: float = 0.2  # eta_C
    count_noise: float | None = None  # sigma_b: standard deviation on the count; None: a twentieth of the cohort

    def __post_init__(self) -> None:
        check_norm("AdaptiveClip.initial", self.initial)
        if not 0 <= self.quantile <= 1:
            raise BadInput(f"AdaptiveClip.quantile must be from 0 to 1, got {self.quantile}")
        if not 0 < self.lr < math.inf:
            raise BadInput(f"AdaptiveClip.lr must be > 0 and finite, got {self.lr}")
        if self.count_noise is not None and not 0 < self.count_noise < math.inf:
            raise BadInput(f"AdaptiveClip.count_noise must be > 0 and finite, got {self.count_noise}")

    def deviation(self, cohort: float) -> float:
        """sigma_b for an expected cohort."""
        return cohort / 20 if self.count_noise is None else self.count_noise

    def noise_on_values(self, noise: float, cohort: float) -> float:
        """z_Delta: values with this multiplier, and the count besides, are one Gaussian mechanism with `noise`.

        The count has sensitivity 1/2, so that its own multiplier is 2 sigma_b (Theorem 1). Raises BadInput where the
        count alone would take more than there is.
        """
        own = 2 * self.deviation(cohort)
        if noise and own <= noise:
            raise BadInput(
                f"the count of {self} has the noise multiplier {own:g}, which leaves nothing of {noise:g} for the "
                f"updates; give a fixed norm as the clip (--clip C), a count_noise well above {noise / 2:g}, or a "
                "larger cohort"
            )
        return (noise**-2 - own**-2) ** -0.5 if noise else 0.0

    def next(self, norm: float, within: float, cohort: float) -> float:
        """The norm of the next round; `within` is the noised sum of `WITHIN` over the cohort."""
        return norm * math.exp(-self.lr * (within / cohort + 0.5 - self.quantile))


def check_norm(name: str, norm: float) -> None:
    if not 0 < norm < math.inf:
        raise BadInput(f"{name} must be > 0 and finite, got {norm}")


def clipped(values: Tensor, norm: float) -> tuple[Tensor, bool]:
    """`values` scaled down to an L2 norm of at most `norm`, and whether they were within it; they stay as they are.

    Values that are not all finite count as zeros: that they are not is as private as all else.
    """
    length = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    if length <= norm:
        return values, True
    if not math.isfinite(length):
        return torch.zeros_like(values), False
    # in float64: for very long values the factor would have few digits left in float32
    return (values.double() * (norm * _MARGIN / length)).to(values.dtype), False
