import pytest
import torch
from tests.learning.small_models import FAMILIES, gpt2_config
from torch import nn

from fedelta.core.errors import BadInput
from fedelta.learning.structure import blocks_of, head_of, is_language_model, layers_of, new_head_of

SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def ends(name):
    return [(tuple(a[-1] for a in layer.attentions), layer.forward[-1]) for layer in layers_of(*name)]


@pytest.mark.parametrize(
    ("family", "prefix", "attention", "forward"),
    [
        ("bert", "bert.encoder.layer", "attention.output.dense", "output.dense"),
        ("gpt2", "transformer.h", "attn.c_proj", "mlp.c_proj"),
        ("llama", "model.layers", "self_attn.o_proj", "mlp.down_proj"),
        ("vit", "vit.layers", "attention.o_proj", "mlp.fc2"),
    ],
)
def test_layers_by_their_last_linear_layers(family, prefix, attention, forward):
    module = FAMILIES[family]()
    found = ends((module, head_of(module)))
    assert found == [((f"{prefix}.{i}.{attention}",), f"{prefix}.{i}.{forward}") for i in (0, 1)]
    assert blocks_of(module, head_of(module)) == [f"{prefix}.{i}" for i in (0, 1)]


def test_an_attention_to_the_encoder_is_one_more():
    from transformers import T5Config, T5ForConditionalGeneration

    module = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2))
    block = "decoder.block.0.layer"
    assert ends((module, ())) == [
        (("encoder.block.0.layer.0.SelfAttention.o",), "encoder.block.0.layer.1.DenseReluDense.wo"),
        ((f"{block}.0.SelfAttention.o", f"{block}.1.EncDecAttention.o"), f"{block}.2.DenseReluDense.wo"),
    ]
    assert blocks_of(module, ()) == ["encoder.block.0", "decoder.block.0"]


def test_shared_layers_and_stages():
    from transformers import AlbertConfig, AlbertForSequenceClassification, SwinConfig, SwinForImageClassification

    albert = AlbertForSequenceClassification(AlbertConfig(vocab_size=20, embedding_size=8, **SIZES))
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert ends((albert, head_of(albert))) == [((f"{layer}.attention.dense",), f"{layer}.ffn_output")]
    config = SwinConfig(
        image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    )
    swin = SwinForImageClassification(config)
    blocks = [f"swin.encoder.layers.{stage}.blocks.0" for stage in (0, 1)]
    assert [forward for _, forward in ends((swin, head_of(swin)))] == [f"{block}.mlp.fc2" for block in blocks]
    assert blocks_of(swin, head_of(swin)) == ["swin.encoder.layers.0", "swin.encoder.layers.1"]


def test_attention_without_a_linear_layer_of_its_own():
    """XLNet multiplies by bare tensors; PyTorch's attention reads the weight of its last layer."""
    from transformers import XLNetConfig, XLNetForSequenceClassification

    xlnet = XLNetForSequenceClassification(XLNetConfig(vocab_size=20, d_model=16, n_layer=1, n_head=2, d_inner=32))
    assert ends((xlnet, head_of(xlnet))) == [((), "transformer.layer.0.ff.layer_2")]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
    )
    assert ends((nn.Sequential(encoder, nn.Linear(8, 2)), ("1",))) == [((), "0.layers.0.linear2")]


def test_a_router_is_no_end_of_a_feed_forward_part():
    """The last linear layer of this one says how much each expert counts."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.ModuleDict({"q": nn.Linear(8, 8), "o": nn.Linear(8, 8)})
            self.expert, self.gate = nn.Linear(8, 8), nn.Linear(8, 2)

    with pytest.raises(BadInput, match=r"do not end, .* in one width \(widths \[2, 8\]\)"):
        layers_of(nn.ModuleList([Layer()]), ())


def test_blocks_of_plain_modules():
    stages = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)]
    assert blocks_of(nn.Sequential(nn.Flatten(), *stages, nn.Linear(2, 2)), ("3",)) == ["1", "2"]
    lists = nn.ModuleDict({"one": stages[0], "two": nn.Sequential(*stages), "head": nn.Linear(2, 2)})
    assert blocks_of(lists, ("head",)) == ["one.0", "two.0", "two.1"]
    inception = nn.ModuleDict({"stem": nn.Linear(2, 2), "mixed": nn.Bilinear(2, 2, 2), "fc": nn.Linear(2, 2)})
    assert blocks_of(nn.ModuleDict({"inner": inception}), ("inner.fc",)) == ["inner.stem", "inner.mixed"]
    assert blocks_of(nn.Linear(2, 2), ("",)) == []


def test_language_models_are_told_by_their_outputs():
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(gpt2_config())
    assert is_language_model(model)
    assert new_head_of(model) == ()
    for family in FAMILIES.values():
        assert not is_language_model(family())
    assert not is_language_model(torch.nn.Linear(2, 2))
