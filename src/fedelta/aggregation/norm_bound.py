"""A bound on the norm of each update, at the coordinator: a site that is beyond it is absent.

How far one site can move the mean is then bounded: by weight / sum(weights) × norm. Against sites that lie about their
work this is the least; what passes may still be chosen to harm (Sun et al., "Can you really backdoor federated
learning?", 2019, section 3.3). Limits: it has to see each update, so there is none under a collect that shows sums,
where each site bounds its own (SecureAggregation.bound, SiteLevel.clip) and nobody can check that.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.core.errors import BadInput
from fedelta.core.messages import Update
from fedelta.core.program import Sight


@dataclass(frozen=True, kw_only=True)
class NormBound:
    """`rule` over the updates whose L2 norm, as a whole and in parameter units, is at most `norm`."""

    needs: ClassVar[Sight] = Sight.EACH

    norm: float
    rule: Rule = Mean()

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise BadInput(f"NormBound.norm must be > 0 and finite, got {self.norm}")

    def refuse(self, update: Update) -> str | None:
        norm = float(torch.linalg.vector_norm(update.values.vector, dtype=torch.float64))
        if not norm <= self.norm:  # also catches NaN
            return f"its update has the norm {norm:g}, and {self.norm:g} is allowed; clip it, or raise NormBound.norm"
        return self.rule.refuse(update)

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        return self.rule(updates, cohort)
