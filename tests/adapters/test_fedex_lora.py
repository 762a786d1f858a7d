"""FedEx-LoRA against dense matrices: the means of the factors, and in the base what their product misses."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters.dense_lora import (
    BIAS,
    LAYERS,
    PREFIX,
    A,
    B,
    bits_in_workers,
    cohorts,
    data,
    exact,
    federation,
    history,
    mean,
    mean_bias,
    measured_alike,
    near,
    product,
    start,
    task,
    training,
)

from fedelta.adapters.fedex_lora import RESIDUAL, FedExLoRA, MeanAndResidual
from fedelta.aggregation.factors import pairs
from fedelta.core.messages import Update


def algorithm(rslora: bool = False, width: int = 10) -> FedExLoRA:
    return FedExLoRA(task=task(rank=2, rslora=rslora, width=width), training=training())


@given(rank=st.integers(1, 5), given=st.data())
def test_the_means_and_the_residual_have_the_exact_product(rank: int, given: st.DataObject) -> None:
    updates: list[Update] = given.draw(cohorts(st.just(rank)))
    total = MeanAndResidual()(updates, len(updates)).values
    own, residual = pairs(total.layout)
    weight = sum(update.weight for update in updates)
    for name in (A, B):
        averaged = sum((update.weight / weight * update.values[name].double() for update in updates), torch.zeros(()))
        assert near(total[name].double(), averaged)
    size = exact(updates)
    means = product(own.of(total))
    assert near(means + product(residual.of(total)), size, size.abs() + means.abs().sum())
    assert RESIDUAL in residual.a
    assert torch.allclose(total[BIAS].double(), mean_bias(updates), atol=1e-6)


def test_every_round_is_that_of_a_dense_simulation() -> None:
    for rslora in (False, True):
        model = start(algorithm(rslora))
        for state, report in history(federation(algorithm(rslora))):
            sites = {name: model.trained(data(name).train) for name in report.cohort}
            exact = {layer: mean({name: {"": own.whole(layer)} for name, own in sites.items()})[""] for layer in LAYERS}
            model.a = mean({name: own.a for name, own in sites.items()})
            model.b = mean({name: own.b for name, own in sites.items()})
            model.head = mean({name: own.head for name, own in sites.items()})
            for layer in LAYERS:
                model.weights[layer] = exact[layer] - model.scale * model.b[layer] @ model.a[layer]
            assert model.close_to(state.algorithm.parameters, base=True)
            assert measured_alike(report, lambda _, model=model: model)  # also at sites that missed rounds
            assert report.metrics["aggregation_error"] < 1e-5


def test_a_site_that_missed_rounds_catches_up_by_whichever_is_less() -> None:
    for width, dense in ((10, True), (60, False)):
        states = [state.algorithm for state, _ in history(federation(algorithm(width=width), rounds=3))]
        sizes = [
            state.merges[str(round)].layout.size for round, state in enumerate(states, 1) if str(round) in state.merges
        ]
        weights = 6 * width + width**2
        shared, own = algorithm(width=width).broadcast(states[-1], {"new": -1, "late": 2, "last": 3})
        assert shared["parameters"].numel() == 2 * (6 + width) + 2 * (2 * width) + 3 * width + 3
        sent = {name: sum(tensor.numel() for tensor in tensors.values()) for name, tensors in own.items()}
        if dense:
            assert sent["new"] == weights
            assert all(name.startswith(f"weight/{PREFIX}") for name in own["new"])
        else:
            assert sent == {"new": sum(sizes), "late": sum(sizes[1:]), "last": sizes[2]}
            assert len(sizes) == 3


def test_workers_give_the_same_bits() -> None:
    assert bits_in_workers(federation(algorithm()))
    assert bits_in_workers(federation(algorithm(width=60), of=1))
