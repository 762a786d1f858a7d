"""A federation whose sites are elsewhere, over mutual TLS, gives the bits of one in this process."""

import hashlib
from typing import Any

import pytest

from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.parts import Clear
from fedelta.core.program import Fleet, Report, run
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.training import Training
from fedelta.secure.aggregation import SecureAggregation
from remote_sites import far
from small_task import plain_task, site_data, task

DATA = site_data(8)


def ended(program: Federation[Any], fleet: Fleet) -> tuple[str, list[Report]]:
    """SHA-256 of the final model, and the reports."""
    found = list(run(program, fleet))
    vector = program.algorithm.parameters(found[-1][0].algorithm).vector
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest(), [report for _, report in found]


@pytest.mark.parametrize(("collect", "task"), [(Clear(), task), (SecureAggregation(), plain_task)])
def test_eight_sites_elsewhere_give_the_bits_of_eight_sites_here(collect: Any, task: Any) -> None:
    training = Training(optimizer=SGD(lr=0.1, momentum=0.9), batch=8)
    program = Federation(
        algorithm=FedAvg(task=task(), training=training),
        rounds=3,
        collect=collect,
        plan=Plan(cohort=1, channels_last=False),
        validate_at_sites=True,
    )
    here, known = ended(program, Local(program, DATA.__getitem__, list(DATA)))
    with Workers(program, DATA.__getitem__, list(DATA), workers=2) as workers:
        assert ended(program, workers)[0] == here
    with far(program, DATA.__getitem__, list(DATA)) as fleet:
        there, reports = ended(program, fleet)
    assert there == here
    for report, expected in zip(reports, known, strict=True):
        assert (report.absent, report.unmeasured) == ({}, {})
        assert report.metrics == expected.metrics
        assert (report.bytes_down, report.bytes_up) == (expected.bytes_down, expected.bytes_up)
