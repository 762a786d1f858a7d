"""The execution plans with which fedelta takes part: the one place to add another.

A plan named N is the contestant "fedelta:N". Imports nothing of fedelta.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FedeltaPlan:
    workers: int  # processes; 0 is Local
    plan: Mapping[str, Any]  # arguments of fedelta's Plan, but the device
    threads: int = 1  # intra-op threads of PyTorch in each process
    trial: bool = False  # choose by the timed trial what `plan` leaves open, once in a process, before the clock starts
    workloads: tuple[str, ...] = ()  # kinds that it is for, before any "@"; all if empty

    @property
    def bf16(self) -> bool:
        return bool(self.plan.get("bf16"))


def fedelta_plans(cores: int, device: str) -> dict[str, FedeltaPlan]:
    """The plans to measure, by name, on a machine of `cores` cores."""
    big = ("mnist-cnn", "lora-text")
    one, bf16 = {"cohort": 1, "channels_last": True}, {"bf16": True}
    workers = cores if device == "cpu" else 0  # worker processes would each hold a context on the one device
    plans = {
        "plain": FedeltaPlan(workers=0, threads=cores, plan={"cohort": 1, "channels_last": False}),
        "auto": FedeltaPlan(workers=workers, trial=True, plan={}),
        "auto-bf16": FedeltaPlan(workers=workers, trial=True, plan=bf16, workloads=big),
        "cohort": FedeltaPlan(workers=workers, plan={"cohort": 200, "channels_last": False}, workloads=("tiny-many",)),
    }
    if workers:
        plans["workers"] = FedeltaPlan(workers=workers, plan=one)
        plans["workers-bf16"] = FedeltaPlan(workers=workers, plan=one | bf16, workloads=big)
    return plans
