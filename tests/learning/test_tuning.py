import pytest
import torch
from torch import nn

from fedelta.core.errors import BadInput
from fedelta.core.parameters import Parameters
from fedelta.learning.tuning import Full, Head, LoRA, head_of, train_mode


class Convolutional(nn.Module):
    """Names on purpose: "conv4" ends with the "4" of a Sequential, and "0" is inside as well as outside."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(4, affine=False)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x).mean(dim=(2, 3)))


def trained(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def step(module, *inputs, **named):
    """One large step of plain SGD in training mode."""
    train_mode(module)
    outputs = module(*inputs, **named)
    logits = getattr(outputs, "logits", outputs)
    nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad


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
        (lambda: LoRA(rank=0), "rank must be >= 1, got 0"),
        (lambda: LoRA(alpha=float("nan")), "alpha must be > 0 and finite, got nan"),
        (lambda: LoRA(alpha=float("inf")), "alpha must be > 0 and finite, got inf"),
        (lambda: LoRA(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: LoRA(targets=("conv",)).apply(Convolutional()), "target 'conv' is no layer .* it has 0$"),
        (lambda: LoRA(targets=("1",)).apply(Convolutional()), "target '1' is no layer"),
        (lambda: LoRA(targets=("head",)).apply(Convolutional()), "target 'head' is no layer"),
        (lambda: LoRA().apply(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))), "no layer outside its head"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(BadInput, match=message):
        make()


def test_lora_target_that_the_model_lacks(classifier):
    with pytest.raises(BadInput, match=r"'q_proj' is no layer .* dense, key, .*query, .*value"):
        LoRA(targets=("q_proj",)).apply(classifier)


def test_what_travels_for_lora_is_the_factors_and_the_head(classifier):
    tuned = LoRA(rank=4).apply(classifier)
    parameters = Parameters.of(tuned)
    head = {name for name in parameters if ".classifier.modules_to_save.default." in name}
    factors = {name for name in parameters if ".lora_A." in name or ".lora_B." in name}
    assert head | factors == set(parameters)
    assert len(head) == 2
    places = {name.partition(".lora_")[0] for name in factors}
    assert places == {
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.{end}"
        for layer in (0, 1)
        for end in ("query", "value")
    }
    assert parameters.layout.size == 2 * 2 * 2 * (4 * 16) + 3 * 16 + 3


def test_lora_without_the_head(classifier):
    assert all(".lora_" in name for name in trained(LoRA(head=False).apply(classifier)))


def test_lora_starts_at_the_model_and_leaves_it_untouched(bert_tokenizer, classifier):
    frozen = {name: parameter.clone() for name, parameter in classifier.state_dict().items()}
    batch = bert_tokenizer(["a good film", "the end is bad", "dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = classifier.eval()(**batch).logits
    tuned = LoRA(alpha=64.0).apply(classifier)
    with torch.no_grad():
        torch.testing.assert_close(tuned.eval()(**batch).logits, before, rtol=0, atol=0)
    for _ in range(2):  # after the first step only B is not zero
        step(tuned, **batch)
    with tuned.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(tuned.eval()(**batch).logits, before, rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.allclose(tuned.eval()(**batch).logits, before, atol=1e-3)
    for name, tensor in tuned.unload().state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(tensor, frozen[name]), name


def test_lora_on_a_vision_transformer_takes_every_linear_layer_of_the_body(vit):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(vit)
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "classifier"}
    tuned = LoRA().apply(model)
    places = {
        name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained(tuned) if "lora_" in name
    }
    assert places == linear
    assert len(linear) >= 12
    step(tuned, torch.randn(3, 1, 8, 8))


def test_lora_on_gpt2(gpt2):
    from transformers import AutoModelForSequenceClassification

    tuned = LoRA().apply(AutoModelForSequenceClassification.from_pretrained(gpt2))
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained(tuned)} == {"c_attn", ""}
    assert any("score.modules_to_save" in name for name in trained(tuned))


def test_lora_on_a_module_of_convolutions():
    torch.manual_seed(0)
    tuned = LoRA(rank=2).apply(Convolutional())
    assert {name.removeprefix("base_model.model.") for name in trained(tuned)} == {
        "body.0.lora_A.default.weight",
        "body.0.lora_B.default.weight",
        "head.weight",
        "head.bias",
    }
    step(tuned, torch.randn(3, 1, 8, 8))


def test_names_that_peft_would_confuse():
    """For peft "0" is also "1.0", a normalisation, and "4" as a module to save is also "3.conv4"."""
    inner = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    named = nn.Sequential()
    named.add_module("conv4", nn.Linear(2, 2))
    module = nn.Sequential(nn.Linear(2, 2), inner, nn.ReLU(), named, nn.Linear(2, 3))
    tuned = LoRA().apply(module)
    places = {
        name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained(tuned) if "lora_" in name
    }
    assert places == {"0", "1.1", "3.conv4"}
    assert {name for name in trained(tuned) if "lora_" not in name} == {
        "base_model.model.4.weight",
        "base_model.model.4.bias",
    }


def test_lora_counts_in_evaluation_of_a_transformer_of_pytorch():
    """Its fast path, taken in evaluation without gradients, reads the bare weights of the layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    module = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(24, 3))
    tuned = LoRA(rank=2).apply(module)
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in trained(tuned) if "lora_" in name} == {
        "linear1",
        "linear2",
    }
    x = torch.randn(4, 3, 8)
    step(tuned, x)
    train_mode(tuned)
    with_gradients = tuned(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(tuned.eval()(x), with_gradients)


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


def test_dropout_stays_on_under_lora(classifier):
    tuned = LoRA().apply(classifier)
    train_mode(tuned)
    assert all(part.training for part in tuned.modules() if isinstance(part, nn.Dropout))
