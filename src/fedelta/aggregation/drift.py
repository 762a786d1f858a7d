"""How far apart the sites of a round pull: a rule that measures it in passing.

The measure is the dissimilarity of Li et al. (FedProx, MLSys 2020, Definition 3), with the sites' updates in the place
of their gradients: the root of the weighted mean of |update|^2, divided by the norm of the aggregate. If all sites
moved alike it is 1; for the plain mean of n updates at right angles to each other and of one length it is sqrt(n).

Limits: differences only, and of what is trained; a rule that sees nothing but a sum cannot be measured.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from fedelta.aggregation.rule import Rule
from fedelta.core.messages import Update
from fedelta.core.program import Sight


@dataclass(frozen=True, kw_only=True)
class Measured:
    """`rule`, telling `tell` the dissimilarity of every round; infinite if the updates cancel out.

    It is no `ManyRule`: it has to see every update, also of sites that are trained at once. Nothing is told of a round
    in which no update weighs or moves anything.
    """

    rule: Rule
    tell: Callable[[float], None]

    @property
    def needs(self) -> Sight:
        return self.rule.needs

    def refuse(self, update: Update) -> str | None:
        return self.rule.refuse(update)

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        squares: list[float] = []
        weights: list[float] = []

        def watched() -> Iterator[Update]:
            for update in updates:
                squares.append(update.weight * _norm(update) ** 2)
                weights.append(update.weight)
                yield update
                del update  # or it would stay in memory while the next one arrives

        total = self.rule(watched(), cohort)
        square, weight = math.fsum(squares), math.fsum(weights)
        if square > 0:
            norm = _norm(total)
            self.tell(math.sqrt(square / weight) / norm if norm else math.inf)
        return total


def _norm(update: Update) -> float:
    return float(torch.linalg.vector_norm(update.values.trained, dtype=torch.float64))
