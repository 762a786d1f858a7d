"""examples/foreign_site.py: a site that is written after docs/protocol.md, beside one of fedelta."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.fleet.remote_sites import PATIENCE_S, QUICK, Running
from torch import nn

from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.core.digest import digest
from fedelta.core.examples import Examples
from fedelta.core.program import run
from fedelta.fleet.certificates import CertificateAuthority
from fedelta.fleet.local import Local
from fedelta.fleet.member import Member
from fedelta.fleet.own_files import Party
from fedelta.fleet.remote import Remote
from fedelta.fleet.wire import Credentials
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Training

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "foreign_site.py"
NAMES = ("north", "south")


def program() -> Federation[Any]:
    task = Task(model=partial(nn.Linear, 4, 3), objective=Classification(classes=3))
    training = Training(optimizer=SGD(lr=0.1), batch=16)
    return Federation(algorithm=FedAvg(task=task, training=training), rounds=5, plan=Plan(channels_last=False))


def rows(name: str) -> Examples:
    """As many as a batch has, so that their order is without effect."""
    g = torch.Generator().manual_seed(len(name) + ord(name[0]))
    x = torch.randn(16, 4, generator=g)
    return Examples.of((x, x[:, :3].argmax(1)))


def credentials(folder: Path, purpose: Any) -> Credentials:
    party = Party.read(folder, purpose)
    return Credentials(root=party.root, chain=party.chain, key=party.key)


def test_a_site_that_is_not_fedelta_takes_part(tmp_path: Path) -> None:
    federation = program()
    authority = CertificateAuthority.create(tmp_path / "ca")
    authority.issue("coordinator", tmp_path / "coordinator", hosts=["127.0.0.1"])
    for name in NAMES:
        authority.issue(name, tmp_path / name)
    north = rows("north")
    table = np.column_stack([north.inputs["x"].numpy().astype(float), north.targets.numpy()])
    np.savetxt(tmp_path / "north.csv", table, delimiter=",", header="a,b,c,d,class", comments="", fmt="%.17g")
    own = credentials(tmp_path / "coordinator", "coordinator")
    with Remote(federation, NAMES, listen="127.0.0.1:0", credentials=own) as fleet:
        at = f"127.0.0.1:{fleet.port}"
        command = [sys.executable, str(EXAMPLE), "--at", at, "--certificates", "north", "--rows", "north.csv"]
        foreign = subprocess.Popen(
            [*command, "--experiment", digest(federation)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        there = credentials(tmp_path / "south", "site")
        south = Running(Member(federation, rows, "south", at=at, credentials=there, patience=QUICK))
        try:
            assert fleet.wait_for(2, PATIENCE_S)
            states = list(run(federation, fleet))
            assert all(not report.absent for _, report in states)
            without = federation.hand_over(states[-1][0], fleet)
            fleet.close(over="the run is over")
            assert foreign.communicate(timeout=PATIENCE_S)[0] == "north: the run is over\n"
        finally:
            south.end()
            foreign.kill()
            foreign.communicate()
    vector = federation.algorithm.parameters(states[-1][0].algorithm).vector
    (*_, (simulated, _)) = run(federation, Local(federation, rows, NAMES))
    expected = federation.algorithm.parameters(simulated.algorithm).vector
    torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-6)
    assert set(without) == {"south"}  # it has no folder
    np.testing.assert_array_equal(np.load(tmp_path / "north.npy"), vector.numpy())
