import pytest
import torch
from tests.learning.small_models import Convolutional, step, trained
from torch import nn

from fedelta.core.errors import BadInput
from fedelta.core.parameters import Parameters, travelling_buffers
from fedelta.learning.lora import LoRA
from fedelta.learning.structure import head_of
from fedelta.learning.tuning import BitFit, Full, Head, HeadAndNorms, LastLayers, train_mode


@pytest.fixture
def classifier(bert):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)


def test_full_trains_everything(classifier):
    everything = {name for name, _ in classifier.named_parameters()}
    assert trained(Full().apply(classifier)) == everything


def test_the_head_of_a_hugging_face_model_is_what_is_outside_its_base_model(classifier):
    assert head_of(classifier) == ("dropout", "classifier")
    assert trained(Head().apply(classifier)) == {"classifier.weight", "classifier.bias"}


def test_a_model_without_a_head_is_refused(bert):
    from transformers import AutoModel

    for tuning in (Head(), LoRA()):
        with pytest.raises(BadInput, match="BertModel has no head"):
            tuning.apply(AutoModel.from_pretrained(bert))


def test_the_head_of_another_module_is_its_last_part_with_parameters():
    assert trained(Head().apply(Convolutional())) == {"head.weight", "head.bias"}
    assert trained(Head().apply(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()))) == {"1.weight", "1.bias"}


def test_named_heads_are_whole_names():
    module = nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc10": nn.Linear(2, 2), "last": nn.Linear(2, 2)})
    assert trained(Head(names=("fc1", "last")).apply(module)) == {"fc1.weight", "fc1.bias", "last.weight", "last.bias"}


def test_fresh_parts_are_trained_too(classifier):
    tuned = Head().apply(classifier, ("bert.pooler.dense",))
    assert trained(tuned) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    train_mode(tuned)
    assert tuned.bert.pooler.dense.training
    assert not tuned.bert.encoder.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Head(names=("heads",)).apply(Convolutional()), "no part 'heads'; it has body, body.0, body.1, head"),
        (lambda: Head(names=("body.3",)).apply(Convolutional()), "leaves nothing of Convolutional to train"),
        (lambda: Head().apply(nn.Sequential(nn.ReLU())), "has no head"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(BadInput, match=message):
        make()


@pytest.mark.parametrize("tuning", [Head(), LoRA(rank=2)])
def test_frozen_statistics_do_not_change(tuning):
    torch.manual_seed(0)
    tuned = tuning.apply(Convolutional())
    before = {name: buffer.clone() for name, buffer in tuned.named_buffers()}
    weights = {name: parameter.clone() for name, parameter in tuned.named_parameters()}
    step(tuned, torch.randn(8, 1, 8, 8))
    assert before.keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in tuned.named_buffers())
    assert Parameters.of(tuned).buffers.numel() == 0
    changed = {name for name, parameter in tuned.named_parameters() if not torch.equal(parameter, weights[name])}
    assert changed
    assert changed <= trained(tuned)


def test_trained_statistics_change_as_they_always_do():
    torch.manual_seed(0)
    module = Convolutional()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    train_mode(Full().apply(module))
    module(torch.randn(8, 1, 8, 8))
    assert all(not torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_features_under_a_head_are_deterministic():
    torch.manual_seed(0)
    module = Head().apply(Convolutional())
    x = torch.randn(8, 1, 8, 8)
    train_mode(module)
    assert module.training
    assert module.head.training
    assert torch.equal(module.body(x), module.body(x))
    torch.testing.assert_close(module.body(x), module.eval().body(x), rtol=0, atol=0)
    train_mode(Full().apply(fresh := Convolutional()))
    assert not torch.equal(fresh.body(x), fresh.body(x))


def test_dropout_of_the_head_stays_on(classifier):
    tuned = Head().apply(classifier)
    train_mode(tuned)
    assert tuned.dropout.training
    assert tuned.classifier.training
    assert not any(part.training for part in tuned.bert.modules())


def test_biases_of_every_kind():
    """Also those of attention, which have names of their own; Convolutional's BatchNorm has one, and so statistics."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    assert trained(BitFit().apply(module)) == {
        "0.self_attn.in_proj_bias",
        "0.self_attn.out_proj.bias",
        "0.linear1.bias",
        "0.linear2.bias",
        "0.norm1.bias",
        "0.norm2.bias",
        "1.weight",
        "1.bias",
    }
    convolutional = BitFit().apply(Convolutional())
    assert trained(convolutional) == {"body.0.bias", "body.1.bias", "head.weight", "head.bias"}
    assert {name.partition("body.1.")[2] for name in travelling_buffers(convolutional)} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_norms_are_trained_with_their_statistics():
    torch.manual_seed(0)
    module = HeadAndNorms().apply(Convolutional())
    assert trained(module) == {"body.1.weight", "body.1.bias", "head.weight", "head.bias"}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    step(module, torch.randn(8, 1, 8, 8))
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained(module) | travelling_buffers(module).keys()
    assert all(name.startswith("body.1.") for name in travelling_buffers(module))


def test_norms_of_a_models_own_are_found_by_their_name():
    class HomeNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    module = nn.Sequential(nn.Linear(4, 4), HomeNorm(), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    assert trained(HeadAndNorms().apply(module)) == {
        "1.weight",
        "2.weight",
        "2.bias",
        "3.weight",
        "4.weight",
        "4.bias",
    }


def test_before_the_last_layers_features_are_deterministic():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)]
    module = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"norm": nn.LayerNorm(4)}), *layers, nn.Linear(4, 2))
    tuned = LastLayers(count=2).apply(module)
    assert trained(tuned) == {f"{place}.{name}" for place in ("3.0", "4.0", "5") for name in ("weight", "bias")}
    train_mode(tuned)
    assert [part.training for part in layers] == [False, True, True]


def test_last_layers_of_an_encoder_and_decoder_are_those_of_the_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    names = trained(LastLayers().apply(T5ForConditionalGeneration(config)))
    assert {name.partition(".layer.")[0] for name in names} == {"decoder.block.1", "decoder.final_layer_norm.weight"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LastLayers(count=0), r"count must be >= 1, got 0; use Head\(\)"),
        (lambda: LastLayers(count=2).apply(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), "more blocks than the 1"),
        (lambda: BitFit().apply(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))), "has no biases outside"),
        (lambda: HeadAndNorms().apply(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), "no trainable normalisation"),
    ],
)
def test_refusals_of_scattered_parts(make, message):
    with pytest.raises(BadInput, match=message):
        make()
