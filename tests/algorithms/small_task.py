"""A small task and its data, for the tests of algorithms and commands."""

import torch
from torch import Tensor, nn

from fedelta.core.examples import Examples
from fedelta.learning.objectives import Classification
from fedelta.learning.task import Task


class Small(nn.Module):
    """BatchNorm, dropout and two linear layers; 6 inputs, 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.drop(self.norm(self.first(x)).relu()))
        return out


def task() -> Task:
    return Task(model=Small, objective=Classification(classes=3))


def plain_task() -> Task:
    """Without dropout and BatchNorm, so that its sites can be trained at once."""
    return Task(
        model=lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), objective=Classification(classes=3)
    )


def site_data(sites: int = 4, seed: int = 0) -> dict[str, Examples]:
    """Sites of 11, 14, 17, … rows whose classes can be told apart."""
    g = torch.Generator().manual_seed(seed)
    data = {}
    for i in range(sites):
        y = torch.randint(0, 3, (11 + 3 * i,), generator=g)
        x = torch.randn(len(y), 6, generator=g)
        x[torch.arange(len(y)), y] += 3
        data[f"site-{i}"] = Examples.of((x, y))
    return data
