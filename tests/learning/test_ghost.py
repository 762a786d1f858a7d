"""Norms and clipped sums of one backward pass against those of gradients of single examples from torch.func."""

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.learning.plain_nets import Scale, cnn, cross_entropies, mlp
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedelta.core.parameters import trainable
from fedelta.learning import ghost
from fedelta.learning.ghost import Ghost, NotGhost


def per_sample(
    module: nn.Module, losses: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """The gradient of each row by torch.func, [n, ...] for each trained parameter."""
    weights = {name: parameter.detach() for name, parameter in trainable(module).items()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return losses(functional_call(module, weights, (x[None],)), y[None]).sum()

    return vmap(grad(loss), (None, 0, 0))(weights, x, y)


def norms_of(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([one.flatten(1).square().sum(1) for one in gradients.values()]).sum(0).sqrt()


def check_ghost(module: nn.Module, x: Tensor, outputs: int, clip: float = 0.5) -> None:
    """Norms and clipped sum in float64, in which a wrong formula cannot pass for rounding."""
    module = module.double()
    y = torch.arange(len(x)) % outputs
    expected = per_sample(module, cross_entropies, x, y)
    norms = norms_of(expected)
    parameters = trainable(module)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    found = Ghost(module, parameters).add(
        lambda: cross_entropies(module(x), y), len(x), lambda norms: (clip / norms).clamp(max=1.0)
    )
    torch.testing.assert_close(found, norms, rtol=1e-9, atol=1e-12)
    factors = (clip / norms).clamp(max=1.0)
    for name, parameter in parameters.items():
        total = torch.einsum("n...,n->...", expected[name], factors)
        torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=1e-12)
        assert parameter.requires_grad


class Tokens(nn.Module):
    """Embeddings with a padding token, positions embedded once for all rows, both kinds of products, and a norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.words = nn.Embedding(11, width, padding_idx=0)
        self.places = nn.Embedding(64, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.scale = Scale(width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1]).unsqueeze(0)))
        x = self.scale(x + self.down(self.up(x).tanh()))
        out: Tensor = self.head(x.mean(1))
        return out


class TestGhost:
    @settings(max_examples=25)
    @given(st.integers(1, 7), st.booleans(), st.floats(1e-3, 10.0), st.integers(0, 100))
    def test_mlp(self, rows: int, inplace: bool, clip: float, seed: int) -> None:
        torch.manual_seed(seed)
        check_ghost(mlp(inplace=inplace), torch.randn(rows, 6, dtype=torch.float64), 3, clip)

    @settings(max_examples=10)
    @given(st.integers(1, 5), st.integers(6, 13), st.integers(1, 3), st.integers(0, 100))
    def test_convolutions(self, rows: int, size: int, channels: int, seed: int) -> None:
        torch.manual_seed(seed)
        check_ghost(cnn(channels), torch.randn(rows, channels, size, size, dtype=torch.float64), 3)

    @settings(max_examples=15)
    @given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 20), st.integers(1, 30), st.integers(0, 100))
    def test_tokens(self, rows: int, tokens: int, width: int, hidden: int, seed: int) -> None:
        torch.manual_seed(seed)
        check_ghost(Tokens(width, hidden), torch.randint(0, 11, (rows, tokens)), 3)

    def test_both_products_of_a_convolution_are_tried(self) -> None:
        torch.manual_seed(0)
        for channels, out in ((1, 2), (40, 50)):  # 25 places: the gradients of single rows are small, and large
            for size, how in (
                (5, {"padding": 1}),
                (10, {"stride": 2, "padding": 1}),
                (10, {"dilation": 2, "stride": 1}),
            ):
                convolution = nn.Conv2d(channels, out, 3, **how)
                net = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * out, 3))
                check_ghost(net, torch.randn(3, channels, size, size, dtype=torch.float64), 3)

    @pytest.mark.parametrize("tokens", [1, 4])
    def test_what_is_too_small_for_a_float_hides_no_norm(self, tokens: int) -> None:
        """The square of such a gradient is 0, and an input that is large enough makes something of it all the same."""
        layer = nn.Linear(64, 300, bias=False)
        layer.weight.grad = torch.zeros_like(layer.weight)
        x, clip = torch.full((2, tokens, 64), 1e16), 1e-6

        def losses() -> Tensor:
            out: Tensor = layer(x)
            return (out * 1e-23).sum((1, 2))

        Ghost(layer, {"weight": layer.weight}).add(losses, 2, lambda norms: (clip / norms).clamp(max=1.0))
        assert 2e-23 * tokens * 1e16 * (64 * 300) ** 0.5 > 20 * clip
        assert float(layer.weight.grad.double().norm()) <= 2 * clip * (1 + 1e-3)

    def test_rows_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ghost, "_PAIRS", 2 * 9 * 9)
        monkeypatch.setattr(ghost, "_PATCHES", 1000)
        torch.manual_seed(0)
        check_ghost(cnn(), torch.randn(5, 2, 10, 10, dtype=torch.float64), 3)
        check_ghost(Tokens(20, 30), torch.randint(0, 11, (5, 9)), 3)

    def test_frozen_layers_are_left_alone(self) -> None:
        net = mlp()
        net[0].requires_grad_(False)
        net[2].weight.requires_grad_(False)
        check_ghost(net, torch.randn(4, 6, dtype=torch.float64), 3)
        assert net[0].weight.grad is None
        assert [name for name, p in net.named_parameters() if p.requires_grad] == ["2.bias", "4.weight", "4.bias"]

    def test_what_cancels_does_not_hide_a_norm(self) -> None:
        layer = nn.Linear(4, 4, bias=False)
        layer.weight.grad = torch.zeros(4, 4)
        x = torch.full((1, 2, 4), 1e3)
        sign = torch.tensor([1.0, -1.0 + 1e-6]).view(1, 2, 1)  # two tokens whose gradients cancel all but 1e-6
        found = Ghost(layer, trainable(layer)).add(lambda: (layer(x) * sign * 1e3).sum((1, 2)), 1, lambda _: None)
        exact = 1e6 * float(sign.double().sum().abs()) * 4
        assert float(found) >= 0.999 * exact
        assert not layer.weight.grad.any()  # the scale was None

    def test_shared_weights_and_unknown_layers_are_refused(self) -> None:
        shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        shared[1].weight = shared[0].weight
        for module in (shared, nn.LSTM(4, 4), nn.Sequential(nn.BatchNorm2d(2)), nn.MultiheadAttention(4, 2)):
            with pytest.raises(NotGhost):
                Ghost(module, trainable(module))

    def test_a_layer_called_twice_is_refused_and_nothing_is_added(self) -> None:
        layer = nn.Linear(4, 4)
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with pytest.raises(NotGhost, match="twice"):
            Ghost(layer, trainable(layer)).add(lambda: layer(layer(torch.ones(2, 4))).sum(1), 2, torch.ones_like)
        assert all(p.requires_grad and not p.grad.any() for p in layer.parameters())
