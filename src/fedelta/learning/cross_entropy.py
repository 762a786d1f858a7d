"""Cross-entropy over many classes, such as a vocabulary, in one copy of the logits.

PyTorch keeps the log-probabilities for the backward pass, and makes two more tensors of their size there. Here only the
logsumexp of each row is kept; the probabilities are made again from the logits, and turned into the gradient in place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], float32 [...], of logits [..., classes] and targets int64 [...] in 0..classes-1.

    Runs under `torch.func.vmap`; differentiable once.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets)[0]  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        largest = logits.amax(-1, keepdim=True).float()
        total = _less(logits, largest).exp_().sum(-1, keepdim=True).log_().add_(largest)
        return (total - logits.gather(-1, targets.unsqueeze(-1))).squeeze(-1), total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, targets, total = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        probabilities = _less(logits, total).exp_().mul_(gradient)
        return probabilities.scatter_add_(-1, targets.unsqueeze(-1), -gradient).to(logits.dtype), None


def _less(logits: Tensor, by: Tensor) -> Tensor:
    """A new float32 tensor: logits - by."""
    return logits - by if logits.dtype == torch.float32 else logits.float().sub_(by)
