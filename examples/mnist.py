"""Federated averaging on MNIST, as in McMahan et al. (AISTATS 2017): 100 sites, 10 of them a round.

    fedelta run examples/mnist.py
    fedelta run examples/mnist.py --set SPLIT=iid --rounds 50

Reads the four idx files from the folder $FEDELTA_DATA, or MNIST from the Hugging Face hub where that is not set.
"""

import os
from functools import cache

import torch
from torch import Tensor, nn

from fedelta import (
    IID,
    SGD,
    Classification,
    Examples,
    FedAvg,
    Federation,
    Fixed,
    Parameters,
    Shards,
    Task,
    Training,
)
from fedelta.data.arrays import mnist

SPLIT = "shards"  # two shards of one class each per site; or "iid"
SITES = 100
PER_ROUND = 10
EPOCHS = 5
BATCH = 10
LR = 0.02
ROUNDS = 10


class Network(nn.Module):
    """Two convolutions of 20 and 50 filters of 5x5, each followed by 2x2 max-pooling, then 800 -> 500 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        out: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return out


def program() -> Federation[Parameters]:
    task = Task(model=Network, objective=Classification(classes=10))
    training = Training(optimizer=SGD(lr=LR), batch=BATCH, epochs=EPOCHS)
    return Federation(algorithm=FedAvg(task=task, training=training), sampling=Fixed(size=PER_ROUND), rounds=ROUNDS)


def sites() -> list[str]:
    return [f"site-{i:03d}" for i in range(SITES)]


def site(name: str) -> Examples:
    return _data()[0][_rows()[sites().index(name)]]


def test() -> Examples:
    return _data()[1]


@cache
def _data() -> tuple[Examples, Examples]:
    return mnist(os.environ.get("FEDELTA_DATA"))


@cache
def _rows() -> list[Tensor]:
    partition = IID() if SPLIT == "iid" else Shards(per_site=2)
    return [torch.from_numpy(rows) for rows in partition(_data()[0].targets.numpy(), SITES, seed=0)]
