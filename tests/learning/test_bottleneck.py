import pytest
import torch
from tests.learning.small_models import FAMILIES, Convolutional, batch, logits, step, trained
from torch import nn
from torch.nn import functional

from fedelta.core.errors import BadInput
from fedelta.learning.bottleneck import Bottleneck, adapters


def disturb(module):
    """Adapters away from the identity."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".adapter." in name:
                parameter.normal_(0, 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_starts_as_it_was_and_the_adapters_count(family):
    torch.manual_seed(0)
    plain = FAMILIES[family]()
    examples = batch(family)
    before = logits(plain, examples)
    tuned = Bottleneck(width=4).apply(plain)
    torch.testing.assert_close(logits(tuned, examples), before, rtol=0, atol=0)
    disturb(tuned)
    assert not torch.allclose(logits(tuned, examples), before, atol=1e-2)


def test_the_formula_of_the_paper():
    """A layer of BERT written out: each part, its adapter, then the residual and the normalisation."""
    torch.manual_seed(0)
    tuned = Bottleneck(width=4).apply(FAMILIES["bert"]())
    disturb(tuned)
    layer = tuned.bert.encoder.layer[0]
    hidden = torch.randn(2, 5, 16)

    def adapted(dense, x):
        out = functional.linear(x, dense.weight, dense.bias)
        down, up = dense.adapter.down, dense.adapter.up
        inner = functional.gelu(out @ down.weight.T + down.bias)
        return out + inner @ up.weight.T + up.bias

    with torch.no_grad():
        context = layer.attention.self(hidden)[0]
        first = layer.attention.output.LayerNorm(hidden + adapted(layer.attention.output.dense, context))
        inner = functional.gelu(layer.intermediate.dense(first))
        expected = layer.output.LayerNorm(first + adapted(layer.output.dense, inner))
        found = layer(hidden)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)


@pytest.mark.parametrize(("attention", "places"), [(True, 4), (False, 2)])
def test_how_much_is_trained(attention, places):
    tuned = Bottleneck(width=5, attention=attention, head=False).apply(FAMILIES["llama"]())
    assert len(dict(adapters(tuned))) == places
    assert set(dict(adapters(tuned)).values()) == {5}
    numbers = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    assert numbers == places * (2 * 16 * 5 + 5 + 16)
    assert all(".adapter." in name for name in trained(tuned))


def test_they_count_in_evaluation_of_a_transformer_of_pytorch():
    """Its fast path, taken in evaluation without gradients, reads the bare weights of the layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    module = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(24, 3))
    with pytest.raises(BadInput, match=r"the attention of Sequential .* use Bottleneck\(attention=False\)"):
        Bottleneck().apply(module)
    tuned = Bottleneck(width=2, attention=False).apply(module)
    disturb(tuned)
    x = torch.randn(4, 3, 8)
    step(tuned, x)
    with_gradients = tuned(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(tuned.eval()(x), with_gradients)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bottleneck(width=0), "width must be >= 1, got 0"),
        (lambda: Bottleneck().apply(Convolutional()), "no layers of attention and linear feed-forward parts"),
        (lambda: Bottleneck().apply(Bottleneck().apply(FAMILIES["bert"]())), "has bottleneck adapters already"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(BadInput, match=message):
        make()
