"""pfl-research through its public API: FederatedAveraging on a SimulatedBackend, weights by number of examples.

One process with as many intra-op threads as there are cores. Its settings are those that cost least: user datasets made
once and kept with their batches, no metrics, no callback but a clock. pfl does not shuffle a user's examples.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.simulation.outcome import Clock, Contestant, Outcome, Settings
from benchmarks.simulation.workloads import Workload, data, predict, trained, vector


class _Module(nn.Module):
    """A module with the loss and the metrics that pfl asks for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def loss(self, targets: Tensor, **inputs: Tensor) -> Tensor:
        return functional.cross_entropy(predict(self.inner, inputs), targets)

    def metrics(self, **_: Tensor) -> Mapping[str, object]:
        return {}


class _Ticks(TrainingProcessCallback):  # type: ignore[misc,unused-ignore]
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, **_: Any) -> tuple[bool, Any]:
        self._clock.mark()
        return False, Metrics()


@cache
def _users(workload: Workload, device: str) -> dict[int, PyTorchTensorDataset]:
    users = {}
    for index in range(workload.sites):
        inputs, targets = data(workload, device).site(index)
        users[index] = PyTorchTensorDataset({**inputs, "targets": targets}, user_id=str(index))
    return users


def run(workload: Workload, rounds: int, settings: Settings) -> Outcome:
    torch.set_num_threads(settings.cores)
    users = _users(workload, settings.device)
    clock = Clock(settings.device)
    module = _Module(workload.build())
    own = workload.optimizer
    model = PyTorchModel(
        module,
        # frozen parameters have no gradient, so that the optimiser skips them
        local_optimizer_create=lambda parameters, lr: own.make(parameters, lr),
        central_optimizer=torch.optim.SGD(trained(module), lr=1.0),
    )
    dataset = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(list(users)))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=workload.per_round,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=dataset, val_data=dataset, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=workload.epochs, local_learning_rate=own.lr, local_batch_size=workload.batch
        ),
        callbacks=[_Ticks(clock)],
        send_metrics_to_platform=False,
    )
    return Outcome(ends=clock.ends, model=vector(trained(module)))


CONTESTANT = Contestant(packages=("pfl", "torch"), run=run)
