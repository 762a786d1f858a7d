"""The unit of measurement: plain PyTorch in one process, with as many intra-op threads as there are cores.

Every site starts from the global weights, has an optimiser of its own, and adds its weights, times its examples, to the
mean. There is no federation: nothing is sent, checked or reported.
"""

import torch

from benchmarks.simulation.outcome import Clock, Contestant, Outcome, Settings
from benchmarks.simulation.workloads import Workload, data, train_site, trained, vector


@torch.no_grad()
def _copy(source: list[torch.Tensor], target: list[torch.nn.Parameter]) -> None:
    for values, parameter in zip(source, target, strict=True):
        parameter.copy_(values)


@torch.no_grad()
def _add(total: list[torch.Tensor], parameters: list[torch.nn.Parameter], weight: float) -> None:
    for mean, parameter in zip(total, parameters, strict=True):
        mean.add_(parameter, alpha=weight)


def run(workload: Workload, rounds: int, settings: Settings) -> Outcome:
    examples = data(workload, settings.device)
    torch.set_num_threads(settings.cores)
    clock = Clock(settings.device)
    module = workload.build().to(settings.device)
    parameters = trained(module)
    model = [parameter.detach().clone() for parameter in parameters]
    chance = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        cohort = torch.randperm(workload.sites, generator=chance)[: workload.per_round].tolist()
        total = [torch.zeros_like(values) for values in model]
        for site in cohort:
            _copy(model, parameters)
            inputs, targets = examples.site(site)
            train_site(module, inputs, targets, workload, chance)
            _add(total, parameters, len(targets))
        model = [mean.div_(workload.per_round * workload.examples) for mean in total]
        clock.mark()
    return Outcome(ends=clock.ends, model=vector(model))


CONTESTANT = Contestant(packages=("torch",), run=run)
