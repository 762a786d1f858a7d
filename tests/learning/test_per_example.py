"""Each way to add up gradients of single examples, and which one a model gets, against plain autograd and Opacus."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from tests.learning import small_models
from tests.learning.plain_nets import cross_entropies, mlp
from torch import Tensor, nn
from torch.nn import functional

from fedelta.core.examples import Examples
from fedelta.core.parameters import trainable
from fedelta.learning.flat import FlatModel
from fedelta.learning.lora import IA3, LoRA
from fedelta.learning.objectives import Classification
from fedelta.learning.per_example import Booked, Mapped, OneByOne, PerExample, Way
from fedelta.learning.plan import Plan
from fedelta.learning.tuning import BitFit, Full, Head, HeadAndNorms, Tuning, train_mode

PLAIN = Plan().plain
CLASSES = Classification(classes=3)


def clipped_sum(model: FlatModel, examples: Examples, clip: float) -> Tensor:
    """Row by row in plain autograd, each row cut to its own length."""
    total = torch.zeros_like(model.gradient)
    for i in range(len(examples)):
        gradient = torch.zeros_like(total)
        row = examples[i : i + 1]
        if "attention_mask" in row.inputs:
            width = int(row.inputs["attention_mask"].sum())
            row = Examples({name: tensor[:, :width] for name, tensor in row.inputs.items()}, row.targets)
        outputs = model.module(**row.inputs) if "x" not in row.inputs else model.module(row.inputs["x"])
        loss = cross_entropies(getattr(outputs, "logits", outputs), row.targets).sum()
        found = torch.autograd.grad(loss, list(trainable(model.module).values()), allow_unused=True)
        torch.cat(
            [
                (torch.zeros(p.numel()) if one is None else one.flatten())
                for one, p in zip(found, trainable(model.module).values(), strict=True)
            ],
            out=gradient,
        )
        total += gradient * min(1.0, clip / max(float(gradient.norm()), 1e-30))
    return total


@pytest.mark.parametrize(
    ("family", "tuning", "way"),
    [
        ("bert", Full(), Booked),
        ("bert", LoRA(rank=2, dropout=0.1), Booked),
        ("bert", Head(), Booked),
        ("bert", BitFit(), Booked),
        ("bert", IA3(), OneByOne),
        ("gpt2", LoRA(rank=2, targets=("c_attn", "c_fc", "c_proj")), Booked),
        ("gpt2", Full(), Booked),
        ("llama", LoRA(rank=2), Booked),
        ("llama", HeadAndNorms(), Booked),
        ("vit", Full(), Mapped),
        ("vit", LoRA(rank=2), Booked),
    ],
    ids=str,
)
def test_transformers(family: str, tuning: Tuning, way: type[Way]) -> None:
    torch.manual_seed(0)
    model = FlatModel(tuning.apply(small_models.FAMILIES[family]()))
    with torch.no_grad():
        model.weights.add_(0.1 * torch.randn_like(model.weights))
    examples = small_models.batch(family)
    train_mode(model.module)
    before = model.read().vector
    gradients = PerExample(model, examples, CLASSES, PLAIN)
    assert type(gradients.way) is way
    assert torch.equal(model.read().vector, before)
    for part in model.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    clip = 1.0
    model.gradient.zero_()
    gradients.add(torch.arange(len(examples)), clip, most=3)
    torch.testing.assert_close(model.gradient, clipped_sum(model, examples, clip), rtol=1e-3, atol=2e-6)


class Shared(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).tanh()))
        return out


class Looking(nn.Module):
    """A parameter outside of layers, and a branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x * self.scale) if float(x.abs().sum()) > 0.0 else self.head(x + self.scale)
        return out


class TestWays:
    def test_a_shared_weight_takes_another_way_and_is_right(self) -> None:
        torch.manual_seed(0)
        self._check(Shared(), torch.randn(6, 6), Mapped)

    def test_a_layer_that_is_called_twice_takes_another_way_and_is_right(self) -> None:
        torch.manual_seed(0)

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.layer(self.layer(x).tanh())
                return out

        self._check(Twice(), torch.randn(6, 3), Mapped)
        layer = nn.Linear(3, 3)
        net = nn.Sequential(layer, nn.Tanh(), layer)  # torch.func would leave another weight in it
        self._check(net, torch.randn(6, 3), OneByOne)
        assert isinstance(layer.weight, nn.Parameter)

    def test_a_parameter_outside_of_layers_takes_another_way(self) -> None:
        torch.manual_seed(0)

        class Raw(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(3))
                self.head = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(x * self.scale)
                return out

        self._check(Raw(), torch.randn(6, 3), Mapped)

    def test_a_weight_that_is_used_beside_its_layer_takes_another_way(self) -> None:
        torch.manual_seed(0)

        class Beside(nn.Module):
            """The decoder of an autoencoder is often the encoder transposed; here it begins where it cannot be seen."""

            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(3, 3)
                self.gate = nn.Linear(3, 3)
                nn.init.zeros_(self.gate.weight)
                nn.init.zeros_(self.gate.bias)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.first(x) + self.gate(x) * (x @ self.first.weight)
                return out

        self._check(Beside(), torch.randn(6, 3), Mapped)

    def test_code_that_looks_at_values_goes_one_by_one(self) -> None:
        torch.manual_seed(0)
        self._check(Looking(), torch.randn(6, 6), OneByOne)

    def test_rows_that_see_each_other_are_kept_apart(self) -> None:
        torch.manual_seed(0)

        class Centred(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(x - 0.5 * x.mean(0))
                return out

        self._check(Centred(), torch.randn(6, 3), Mapped)

    def test_padding_that_is_seen_is_kept_apart(self) -> None:
        """The mean over all columns depends on the longest row of the batch."""
        torch.manual_seed(0)

        class Means(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words = nn.Embedding(20, 4)
                self.head = nn.Linear(4, 3)

            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
                out: Tensor = self.head(self.words(input_ids).mean(1))
                return out

        examples = small_models.batch("bert")
        model = FlatModel(Means())
        gradients = PerExample(model, examples, CLASSES, PLAIN)
        assert type(gradients.way) is OneByOne
        model.gradient.zero_()
        gradients.add(torch.arange(8), 0.3, most=8)
        torch.testing.assert_close(model.gradient, clipped_sum(model, examples, 0.3))

    def test_rows_on_another_way_through_the_model_go_one_by_one(self) -> None:
        torch.manual_seed(0)

        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.few, self.many = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = (self.few if float(x.abs().max()) < 100 else self.many)(x)
                return out

        model = FlatModel(Experts())
        x, y = torch.randn(9, 3), torch.arange(9) % 3
        gradients = PerExample(model, Examples({"x": x}, y), CLASSES, PLAIN)
        assert type(gradients.way) is Booked
        x[4] = 200.0
        model.gradient.zero_()
        gradients.add(torch.arange(9), 0.3, most=3)
        torch.testing.assert_close(model.gradient, clipped_sum(model, Examples({"x": x}, y), 0.3))

    def test_a_row_without_a_finite_gradient_adds_nothing(self) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(6, 6), torch.arange(6) % 3
        for make, way in ((mlp, Booked), (Shared, Mapped), (Looking, OneByOne)):
            x[2] = 0.0
            model = FlatModel(make())
            gradients = PerExample(model, Examples({"x": x}, y), CLASSES, PLAIN)
            assert type(gradients.way) is way
            x[2] = math.inf
            model.gradient.zero_()
            gradients.add(torch.arange(6), 0.3, most=6)
            others = torch.tensor([0, 1, 3, 4, 5])
            torch.testing.assert_close(model.gradient, clipped_sum(model, Examples({"x": x[others]}, y[others]), 0.3))

    def test_one_row_settles_nothing(self) -> None:
        model = FlatModel(mlp())
        x, y = torch.randn(6, 6), torch.arange(6) % 3
        assert type(PerExample(model, Examples({"x": x[:1]}, y[:1]), CLASSES, PLAIN).way) is OneByOne
        assert type(PerExample(model, Examples({"x": x}, y), CLASSES, PLAIN).way) is Booked
        assert type(PerExample(model, Examples({"x": x[:1]}, y[:1]), CLASSES, PLAIN).way) is OneByOne

    def test_what_is_known_of_a_model_does_not_keep_it(self) -> None:
        model = FlatModel(mlp())
        assert (
            type(PerExample(model, Examples({"x": torch.randn(6, 6)}, torch.arange(6) % 3), CLASSES, PLAIN).way)
            is Booked
        )
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None

    def test_positions_that_move_with_the_padding_go_one_by_one(self) -> None:
        """GPT-2 counts its places from the first column, padding or not: a long row would move all others."""
        torch.manual_seed(0)
        left = small_models.batch("gpt2")
        left = Examples({name: tensor.flip(1) for name, tensor in left.inputs.items()}, left.targets)
        model = FlatModel(LoRA(rank=2).apply(small_models.gpt2()))
        assert type(PerExample(model, left, CLASSES, PLAIN).way) is OneByOne

    def _check(self, net: nn.Module, x: Tensor, way: type[Way]) -> None:
        y = torch.arange(len(x)) % 3
        model = FlatModel(net)
        gradients = PerExample(model, Examples({"x": x}, y), CLASSES, PLAIN)
        assert type(gradients.way) is way
        model.gradient.zero_()
        gradients.add(torch.arange(len(x)), 0.3, most=4)
        torch.testing.assert_close(model.gradient, clipped_sum(model, Examples({"x": x}, y), 0.3))

    def test_opacus_finds_the_same(self) -> None:
        from opacus import GradSampleModule

        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3, dilation=2),
            nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip
        x, y = torch.randn(5, 2, 9, 9), torch.arange(5) % 3
        model = FlatModel(net)
        way = PerExample(model, Examples({"x": x}, y), CLASSES, PLAIN)
        assert isinstance(way.way, Booked)
        model.gradient.zero_()
        way.add(torch.arange(5), 0.5, most=5)
        found = model.gradient.clone()  # Opacus also adds up the gradients as they are
        other = GradSampleModule(net, loss_reduction="sum")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            functional.cross_entropy(other(x), y, reduction="sum").backward()
        each = torch.cat([p.grad_sample.flatten(1) for p in other.parameters()], dim=1)
        expected = each.mul((0.5 / each.norm(dim=1)).clamp(max=1.0)[:, None]).sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
