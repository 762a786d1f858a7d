"""Small networks of layers whose gradients of single examples are known, and the loss of their rows."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


class Scale(nn.Module):
    """RMSNorm as Gemma has it: times 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def mlp(*, inplace: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace), nn.Linear(9, 8), nn.ReLU(inplace), nn.Linear(8, 3))


def cnn(channels: int = 2, size: int = 10) -> nn.Module:
    """Strides, paddings of all kinds, dilation, groups, a kernel of one; 5x5 places and 1x1."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding="same", groups=3),
        nn.Conv2d(6, 5, 1),
        nn.Conv2d(5, 4, 3, padding=1, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(3),
        nn.Conv2d(4, 40, 3),
        nn.Flatten(),
        nn.Linear(40, 3),
    )
