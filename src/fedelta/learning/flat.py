"""A module whose trainable parameters and gradients are views of two flat vectors.

Loading a broadcast is then one copy, the delta one subtraction, and a step of the optimiser, gradient clipping and a
proximal term one kernel each, whatever the number of tensors.

Limits: what is trained is held in float32, also if the module stores it in half precision. A parameter that takes no
part in a loss sees a zero gradient (PyTorch would skip it), so weight decay still shrinks it.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedelta.core.errors import BadInput
from fedelta.core.parameters import Layout, Parameters, trainable, travelling_buffers
from fedelta.learning.tuning import train_mode


class FlatModel:
    """`weights` is the trained segment as one leaf, `weights.grad` its gradient; both are written in place."""

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu", *, channels_last: bool = False) -> None:
        """Take over `module`. With `channels_last` the filters [out, in, h, w] lie in memory as [out, h, w, in]."""
        self.module = module.to(device)
        parameters, buffers = trainable(module), travelling_buffers(module)
        if not parameters:
            raise BadInput("the model has no trainable parameter: set requires_grad on what is to be trained")
        self.layout = Layout.of(parameters, buffers)
        self._buffers = [(tensor, self.layout.by_name[name].offset) for name, tensor in buffers.items()]
        self._permuted: list[tuple[slice, Tensor]] = []  # where in the vector, and the filters that lie there permuted
        flat = torch.empty(self.layout.trained, device=device)
        gradient = torch.zeros_like(flat)
        for name, parameter in parameters.items():
            entry = self.layout.by_name[name]
            here = slice(entry.offset, entry.offset + entry.numel)
            permuted = channels_last and len(entry.shape) == 4
            view = _filters if permuted else torch.Tensor.view
            view(flat[here], entry.shape).copy_(parameter.detach())
            parameter.data = view(flat[here], entry.shape)
            parameter.grad = view(gradient[here], entry.shape)
            if permuted:
                self._permuted.append((here, parameter.data))
        train_mode(module)
        # a batch of one example has no statistics
        self.least_batch = 2 if any(isinstance(m, _BatchNorm) and m.training for m in module.modules()) else 1
        # what may change in training and does not travel would leak from one site into the next
        self._own = [(b, b.clone()) for name, b in module.named_buffers() if name not in self.layout.by_name]
        self.weights = nn.Parameter(flat)
        self.weights.grad = gradient

    @property
    def gradient(self) -> Tensor:
        """The flat gradient, [trained]; autograd adds to it in place."""
        assert self.weights.grad is not None
        return self.weights.grad

    def load(self, parameters: Parameters) -> None:
        """Set trained values and buffers from a vector of this layout; all other buffers are as they were at first."""
        with torch.no_grad():
            self.weights.copy_(parameters.trained)
            for here, filters in self._permuted:
                filters.copy_(parameters.vector[here].view(filters.shape))
            for tensor, first in self._own:
                tensor.copy_(first)
            for tensor, offset in self._buffers:
                values = parameters.vector[offset : offset + tensor.numel()].view(tensor.shape)
                tensor.copy_(values if tensor.is_floating_point() else values.round())

    def read(self) -> Parameters:
        """A copy of trained values and buffers, on the CPU."""
        vector = torch.empty(self.layout.size)
        with torch.no_grad():
            vector[: self.layout.trained].copy_(self.weights)
            for here, filters in self._permuted:
                vector[here].view(filters.shape).copy_(filters)
            for tensor, offset in self._buffers:
                vector[offset : offset + tensor.numel()].copy_(tensor.flatten())
        return Parameters(self.layout, vector)


def _filters(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view of `flat`, which holds [out, h, w, in], as [out, in, h, w]."""
    out, channels, height, width = shape
    return flat.view(out, height, width, channels).permute(0, 3, 1, 2)
