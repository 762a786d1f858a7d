import pytest
import torch
from tests.learning.small_models import Convolutional, batch, gpt2_config, logits, step, trained
from tests.learning.small_models import bert as small_bert
from torch import nn

from fedelta.core.errors import BadInput
from fedelta.core.parameters import Parameters
from fedelta.learning.lora import IA3, LoRA
from fedelta.learning.tuning import train_mode


@pytest.fixture
def classifier(bert):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0), "rank must be >= 1, got 0"),
        (lambda: LoRA(alpha=float("nan")), "alpha must be > 0 and finite, got nan"),
        (lambda: LoRA(alpha=float("inf")), "alpha must be > 0 and finite, got inf"),
        (lambda: LoRA(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: LoRA(targets=("conv",)).apply(Convolutional()), "target 'conv' is no layer .* it has 0$"),
        (lambda: LoRA(targets=("1",)).apply(Convolutional()), "target '1' is no layer"),
        (lambda: LoRA(targets=("head",)).apply(Convolutional()), "target 'head' is no layer"),
        (lambda: LoRA().apply(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))), "no layer outside its head"),
        (lambda: IA3(targets=("conv",)).apply(small_bert()), "IA3 target 'conv' is no layer .* it has dense, key, "),
        (lambda: IA3(forward=("conv",)).apply(small_bert()), "IA3 target 'conv' is no layer"),
        (lambda: IA3().apply(Convolutional()), "has no layers of attention and linear feed-forward parts"),
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


def test_dropout_stays_on_under_lora(classifier):
    tuned = LoRA().apply(classifier)
    train_mode(tuned)
    assert all(part.training for part in tuned.modules() if isinstance(part, nn.Dropout))


def test_rslora_scales_by_the_root_of_the_rank(classifier, bert_tokenizer):
    """With the same factors, its change of a weight is sqrt(rank) times that of LoRA."""
    changes = []
    for rslora in (False, True):
        torch.manual_seed(0)
        tuned = LoRA(rank=4, rslora=rslora).apply(small_bert())
        layer = tuned.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
        changes.append(layer.get_delta_weight("default"))
    torch.testing.assert_close(changes[1], 2 * changes[0])


def test_ia3_starts_at_the_model_and_scales_what_the_paper_says():
    torch.manual_seed(0)
    plain = small_bert()
    tuned = IA3().apply(small_bert())
    tuned.get_base_model().load_state_dict(
        {
            name: plain.state_dict()[name.replace(".base_layer", "").replace(".modules_to_save.default", "")]
            if ".original_module." not in name
            else tensor
            for name, tensor in tuned.get_base_model().state_dict().items()
            if ".ia3_l" not in name
        },
        strict=False,
    )
    examples = batch("bert")
    torch.testing.assert_close(logits(tuned, examples), logits(plain, examples), rtol=0, atol=0)
    torch.manual_seed(1)
    scales = {}
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".ia3_l." in name:
                parameter.uniform_(0.5, 2.0)
                scales[name.removeprefix("base_model.model.").partition(".ia3_l")[0]] = parameter.flatten()
        for name, scale in scales.items():
            layer = plain.get_submodule(name)
            if name.endswith("output.dense"):
                layer.weight *= scale  # of the inner activations, which it reads
            else:
                layer.weight *= scale[:, None]
                layer.bias *= scale
    torch.testing.assert_close(logits(tuned, examples), logits(plain, examples), rtol=0, atol=1e-5)


def test_ia3_on_named_layers():
    tuned = IA3(targets=("query",), forward=("intermediate.dense",), head=False).apply(small_bert())
    places = {
        name.removeprefix("base_model.model.bert.encoder.layer.").rpartition(".ia3_l")[0] for name in trained(tuned)
    }
    assert places == {f"{layer}.{end}" for layer in (0, 1) for end in ("attention.self.query", "intermediate.dense")}
    layer = tuned.get_submodule("base_model.model.bert.encoder.layer.0.intermediate.dense")
    assert layer.is_feedforward
    assert not tuned.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query").is_feedforward


@pytest.mark.parametrize("tuning", [LoRA(rank=2), IA3()])
def test_the_head_of_a_language_model_stays(tuning):
    from transformers import GPT2LMHeadModel

    assert all(".lora_" in name or ".ia3_" in name for name in trained(tuning.apply(GPT2LMHeadModel(gpt2_config()))))
