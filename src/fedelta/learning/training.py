"""Local training and evaluation: what a site does with its own data."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedelta.core.errors import BadInput, TrainingFailed
from fedelta.core.examples import Examples
from fedelta.core.seeds import seeded
from fedelta.learning.batches import batches
from fedelta.learning.flat import FlatModel
from fedelta.learning.objectives import Objective
from fedelta.learning.optimizers import Constant, Optimizer, Schedule
from fedelta.learning.plan import Plan
from fedelta.learning.text import per_token, trim
from fedelta.learning.tuning import train_mode

PLAIN = Plan().plain
# Adds to the gradient what a term of the loss besides the objective gives, from weights and gradient: both flat.
Penalty = Callable[[Tensor, Tensor], None]
_TOKENS = 4096  # with targets, evaluated at a time: 0.8 GB of outputs over GPT-2's vocabulary


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a site trains in one round. Exactly one of `epochs` and `steps` is given; the other is None."""

    optimizer: Optimizer
    batch: int = 32  # examples a step; the last batch of an epoch may be smaller (BatchNorm: not a single example)
    epochs: int | None = 1
    steps: int | None = None
    clip: float | None = None  # L2 bound of a batch's gradient
    schedule: Schedule = Constant()

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise BadInput(f"Training needs epochs or steps, not both: got epochs={self.epochs}, steps={self.steps}")
        for name in ("batch", "epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"Training.{name} must be >= 1, got {value}")
        if self.clip is not None and not self.clip > 0:
            raise BadInput(f"Training.clip must be > 0, got {self.clip}")


def train(
    model: FlatModel,
    examples: Examples,
    objective: Objective,
    training: Training,
    plan: Plan = PLAIN,
    *,
    round: int,
    seed: int,
    penalty: Penalty | None = None,
) -> dict[str, float]:
    """Train `model` in place on `examples`; returns the sums of its objective over all steps, and "steps".

    `plan` is the one for which `model` was made. `seed` decides shuffling and dropout. `penalty` is called in every
    step, before the gradient is clipped. Raises TrainingFailed if the loss or a weight is no longer finite.
    """
    sums = descend(model, examples, objective, training, plan, round=round, seed=seed, penalty=penalty)
    low, high = torch.aminmax(model.weights.detach())  # NaN if one is; one pass, where isfinite takes five
    if not all(map(math.isfinite, (sums["loss"], low.item(), high.item()))):
        lr = training.optimizer.lr * training.schedule.factor(round)
        raise TrainingFailed(diverged(sums["loss"], int(sums["steps"]), lr))
    return sums


def descend(
    model: FlatModel,
    examples: Examples,
    objective: Objective,
    training: Training,
    plan: Plan = PLAIN,
    *,
    round: int,
    seed: int,
    penalty: Penalty | None = None,
) -> dict[str, float]:
    """As `train`, whatever comes of it: loss and weights need not be finite."""
    _check_batches(model, examples, training)
    lr = training.optimizer.lr * training.schedule.factor(round)
    weights = model.weights.detach()
    step = training.optimizer.make([weights])
    totals: dict[str, Tensor] = {}
    steps = 0
    train_mode(model.module)
    with seeded(seed, "dropout"):
        for rows in batches(len(examples), training.batch, training.epochs, training.steps, seed, model.least_batch):
            measured = _gradient(model, prepared(examples[rows], plan), objective, plan)
            if penalty is not None:
                penalty(weights, model.gradient)
            if training.clip is not None:
                _clip(model.gradient, training.clip)
            step([weights], [model.gradient], lr)
            _add(totals, measured)
            steps += 1
    return {name: float(value) for name, value in totals.items()} | {"steps": float(steps)}


def proximal_term(model: FlatModel, strength: float) -> Penalty | None:
    """The term `strength/2 * ||w - w_start||^2`, w_start being the weights of `model` now; None where it is 0."""
    if not strength:
        return None
    start = model.weights.detach().clone()

    def penalty(weights: Tensor, gradient: Tensor) -> None:
        gradient.add_(weights - start, alpha=strength)

    return penalty


@torch.no_grad()
def evaluate(
    model: FlatModel, examples: Examples, objective: Objective, plan: Plan = PLAIN, *, batch: int = 256
) -> dict[str, float]:
    """The sums of the objective over `examples`, with the model as it is and in evaluation mode.

    `batch` is at most how many rows go through the model at a time; where every token has a target, and so a row of
    outputs as wide as a vocabulary may be, they are fewer.
    """
    if per_token(examples.targets):
        batch = max(1, min(batch, _TOKENS // max(1, examples.targets.shape[1])))
    totals: dict[str, Tensor] = {}
    model.module.eval()
    for rows in torch.split(by_length(examples), batch):
        part = prepared(examples[rows], plan)
        with autocast(plan):
            _add(totals, objective.measure(predict(model.module, part.inputs), part.targets))
    return {name: float(value) for name, value in totals.items()}


def predict(module: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's outputs: what it returns, or the `logits` of what a Hugging Face model returns."""
    outputs = module(inputs["x"]) if inputs.keys() == {"x"} else module(**inputs)
    logits = getattr(outputs, "logits", outputs)
    assert isinstance(logits, Tensor)
    return logits


def prepared(batch: Examples, plan: Plan) -> Examples:
    """A batch on the plan's device and in its memory format, texts cut to the longest of them."""
    batch = trim(batch)
    inputs = {}
    for name, tensor in batch.inputs.items():
        tensor = tensor.to(plan.device)
        if plan.channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        inputs[name] = tensor
    return Examples(inputs, batch.targets.to(plan.device))


def autocast(plan: Plan) -> AbstractContextManager[None]:
    if not plan.bf16:
        return nullcontext()
    return torch.autocast(torch.device(plan.device).type, dtype=torch.bfloat16)


def _check_batches(model: FlatModel, examples: Examples, training: Training) -> None:
    if training.batch < model.least_batch:
        raise BadInput("BatchNorm needs batches of two examples or more; raise Training.batch above 1")
    if len(examples) < model.least_batch:
        have = "has no training examples" if not len(examples) else "has one training example, and BatchNorm needs two"
        raise BadInput(f"this site {have}")


def _gradient(model: FlatModel, batch: Examples, objective: Objective, plan: Plan) -> dict[str, Tensor]:
    """Set the model's gradient to that of the mean loss of `batch`; what the objective measures of its rows."""
    model.gradient.zero_()
    with autocast(plan):
        measured = objective.measure(predict(model.module, batch.inputs), batch.targets)
        loss = measured["loss"].sum() / measured["examples"].sum().clamp(min=1.0)
    loss.backward()  # type: ignore[no-untyped-call]
    return measured


def diverged(loss: float, steps: int, lr: float) -> str:
    return f"its loss became {loss} within {steps} steps at learning rate {lr:g}; lower it"


def _clip(gradient: Tensor, bound: float) -> None:
    """Scale the gradient to an L2 norm of at most `bound` (Pascanu et al., ICML 2013)."""
    norm = torch.linalg.vector_norm(gradient)
    gradient.mul_((bound / (norm + 1e-6)).clamp(max=1.0))


def _add(totals: dict[str, Tensor], measured: Mapping[str, Tensor]) -> None:
    for name, values in measured.items():
        value = values.detach().sum(dtype=torch.float64)
        totals[name] = totals[name] + value if name in totals else value


def by_length(examples: Examples) -> Tensor:
    """Rows in order of their length, so that texts are padded little; as they come where there is no mask."""
    mask = examples.inputs.get("attention_mask")
    return torch.arange(len(examples)) if mask is None else mask.sum(dim=1).argsort(stable=True)
