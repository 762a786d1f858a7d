"""DP-SGD: training in which no single example moves the model by more than noise hides.

Abadi et al., CCS 2016, algorithm 1. A step takes each example with the same probability, independently (Poisson
sampling), scales the gradient of each to an L2 norm of at most C, adds N(0, (noise * C)^2) to every element of their
sum, and divides by the number of examples that are expected. What follows (a proximal term, momentum, AdamW) sees the
result alone. The sampling rate and the number of steps follow from the number of examples, which is therefore public:
neighbours differ in an example that is there or counts as nothing.

What a guarantee needs besides: `noise` draws what nobody else knows, and so does `seed` where the model has dropout.
Limits: bounds hold to the rounding of float32. Losses are not reported, because no noise covers them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.noise import Noise
from fedelta.core.parameters import travelling_buffers
from fedelta.core.seeds import seeded
from fedelta.learning.flat import FlatModel
from fedelta.learning.objectives import Objective
from fedelta.learning.per_example import PerExample
from fedelta.learning.plan import Plan
from fedelta.learning.training import Penalty, Training
from fedelta.learning.tuning import train_mode

_FREEZE = "freeze it (a tuning such as Head() or LoRA() does), or use GroupNorm or LayerNorm"


@dataclass(frozen=True, kw_only=True)
class PrivateSteps:
    """What every step of DP-SGD does to the gradients of its examples."""

    clip: float  # L2 bound on the gradient of one example, > 0
    noise: float  # standard deviation of what is added to their sum, in units of `clip`; 0: clipping alone

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise BadInput(f"PrivateSteps.clip must be > 0 and finite, got {self.clip}")
        if not 0 <= self.noise < math.inf:
            raise BadInput(f"PrivateSteps.noise must be >= 0 and finite, got {self.noise}")


def sampling_rate(n: int, training: Training) -> float:
    """The probability with which a step takes each of n >= 1 examples: 1 over the number of batches of an epoch.

    So that each is expected once in an epoch, and sites with as many batches need the same noise. At most
    `training.batch` examples are expected in a step.
    """
    return 1 / -(-n // training.batch)


def number_of_steps(n: int, training: Training) -> int:
    """Steps of a round over n >= 1 examples: as many as without privacy."""
    return training.steps if training.steps is not None else (training.epochs or 0) * -(-n // training.batch)


def train_private(
    model: FlatModel,
    examples: Examples,
    objective: Objective,
    training: Training,
    plan: Plan,
    *,
    round: int,
    seed: int,
    private: PrivateSteps,
    noise: Noise,
    penalty: Penalty | None = None,
) -> dict[str, float]:
    """Train `model` in place on `examples`, as `train` does but by DP-SGD; returns "steps" alone.

    `noise` draws batches and noise, `seed` decides dropout. `penalty` is called in every step once noise was added: it
    must not depend on the examples. Weights need not be finite in the end: that they are not is a release like any
    other. Raises BadInput where no guarantee would hold.
    """
    _check(model, examples, training, plan)
    lr = training.optimizer.lr * training.schedule.factor(round)
    weights = model.weights.detach()
    step = training.optimizer.make([weights])
    rate, steps = sampling_rate(len(examples), training), number_of_steps(len(examples), training)
    train_mode(model.module)
    buffers = {name: buffer.clone() for name, buffer in travelling_buffers(model.module).items()}
    gradients = PerExample(model, examples, objective, plan)
    with seeded(seed, "dropout"):
        for _ in range(steps):
            model.gradient.zero_()
            gradients.add(noise.chosen(len(examples), rate), private.clip, most=2 * training.batch)
            _add_noise(model.gradient, noise, private.noise * private.clip)
            model.gradient.div_(rate * len(examples))
            if penalty is not None:
                penalty(weights, model.gradient)
            step([weights], [model.gradient], lr)
    for name, buffer in travelling_buffers(model.module).items():
        if not torch.equal(buffer, buffers[name]):
            raise BadInput(f"the model changes its buffer {name!r} in training, which no noise covers; {_FREEZE}")
    return {"steps": float(steps)}


def _check(model: FlatModel, examples: Examples, training: Training, plan: Plan) -> None:
    if not len(examples):
        raise BadInput("this site has no training examples")
    if training.clip is not None:
        raise BadInput(
            f"DP-SGD clips the gradient of each example, so leave Training.clip at None instead of {training.clip:g}"
        )
    if plan.bf16:
        raise BadInput("DP-SGD bounds gradients in float32; set Plan.bf16 to False")
    if model.least_batch > 1:
        raise BadInput(f"BatchNorm in training mixes the examples of a batch, so that none can be bounded; {_FREEZE}")


def _add_noise(values: Tensor, noise: Noise, std: float) -> None:
    """Add N(0, std^2) to `values` on any device; noise is drawn on the CPU."""
    if not std:
        return
    if values.device.type == "cpu":
        noise.add_normal(values, std)
    else:
        there = values.cpu()
        noise.add_normal(there, std)
        values.copy_(there)
