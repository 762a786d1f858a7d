"""Flower through its public API: ServerApp and ClientApp on `run_simulation`, with Ray.

Its settings are those that cost least: as many actors as cores with one thread each, model and data kept in the actor,
only what is trained is sent, nothing is evaluated, FedAvg weighted by number of examples, telemetry off.
"""

import logging
import os
import warnings
from functools import cache
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn

from benchmarks.simulation.outcome import Clock, Contestant, Outcome, Settings
from benchmarks.simulation.workloads import Workload, data, find, train_site, vector

client = ClientApp()
_chance = torch.Generator().manual_seed(0)


@cache
def _module(workload: Workload, device: str) -> nn.Module:
    """An actor's own model; the weights are overwritten by each message."""
    torch.set_num_threads(1)
    return workload.build().to(device)


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu() for name, p in module.named_parameters() if p.requires_grad}


@client.train()  # type: ignore[untyped-decorator,unused-ignore]
def _train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    workload, device = find(str(config["workload"])), str(config["device"])
    module = _module(workload, device)
    incoming = message.content["arrays"].to_torch_state_dict()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(incoming[name])
    inputs, targets = data(workload, device).site(int(context.node_config["partition-id"]))
    train_site(module, inputs, targets, workload, _chance)
    content = RecordDict(
        {"arrays": ArrayRecord(_values(module)), "metrics": MetricRecord({"num-examples": len(targets)})}
    )
    return Message(content=content, reply_to=message)


def run(workload: Workload, rounds: int, settings: Settings) -> Outcome:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    clock = Clock(settings.device)
    server = ServerApp()
    module = workload.build()
    final: list[Any] = []

    def tick(round: int, arrays: ArrayRecord) -> None:
        if round:
            clock.mark()
        final[:] = [arrays]

    @server.main()  # type: ignore[untyped-decorator,unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=1e-9,  # the least number is what counts: no rounding of a share
            fraction_evaluate=0.0,
            min_train_nodes=workload.per_round,
            min_available_nodes=workload.sites,
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(_values(module)),
            num_rounds=rounds,
            train_config=ConfigRecord({"workload": workload.name, "device": settings.device}),
            evaluate_fn=tick,
        )

    gpus = 0.0 if settings.device == "cpu" else 1 / settings.cores
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of run_simulation, the way from Python
        run_simulation(
            server_app=server,
            client_app=client,
            num_supernodes=workload.sites,
            backend_config={
                "init_args": {"num_cpus": settings.cores},
                "client_resources": {"num_cpus": 1, "num_gpus": gpus},
            },
        )
    arrays = final[0].to_torch_state_dict()
    return Outcome(ends=clock.ends, model=vector(arrays[name] for name in _values(module)))


CONTESTANT = Contestant(packages=("flwr", "ray", "torch"), run=run)
