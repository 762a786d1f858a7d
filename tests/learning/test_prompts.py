import pytest
import torch
from tests.learning.small_models import batch, bert, gpt2, gpt2_config, logits, noisy, step, trained

from fedelta.core.errors import BadInput
from fedelta.learning.prompts import Prefix, Prompt


def language_model():
    from transformers import GPT2LMHeadModel

    return noisy(GPT2LMHeadModel(gpt2_config()))


def token_classifier():
    from transformers import BertConfig, BertForTokenClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return noisy(
        BertForTokenClassification(BertConfig(vocab_size=20, max_position_embeddings=64, num_labels=3, **sizes))
    )


def prompted(model, prompt, examples):
    """What a plain model says of texts with `prompt` [tokens, width] before them, for all tokens."""
    ids, mask = examples.inputs["input_ids"], examples.inputs["attention_mask"]
    embedded = torch.cat([prompt.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], dim=1)
    whole = torch.cat([torch.ones(len(ids), len(prompt), dtype=torch.long), mask], dim=1)
    with torch.no_grad():
        return model(inputs_embeds=embedded, attention_mask=whole).logits


def prompt_of(tuned):
    return tuned.prompt_encoder["default"].embedding.weight


def test_a_prompt_starts_as_tokens_and_stands_before_the_text():
    torch.manual_seed(0)
    model, examples = bert(), batch("bert")
    vocabulary = model.get_input_embeddings().weight.detach().clone()
    tuned = Prompt(tokens=3).apply(model)
    prompt = prompt_of(tuned).detach()
    assert all(any(torch.equal(row, token) for token in vocabulary) for row in prompt)
    torch.testing.assert_close(logits(tuned, examples), prompted(tuned.get_base_model(), prompt, examples))


@pytest.mark.parametrize("make", [language_model, token_classifier])
def test_a_model_of_tokens_answers_for_those_of_the_text(make):
    torch.manual_seed(0)
    tuned = Prompt(tokens=3).apply(make())
    examples = batch("bert")
    found = logits(tuned, examples)
    assert found.shape[:2] == examples.inputs["input_ids"].shape
    expected = prompted(tuned.get_base_model().eval(), prompt_of(tuned).detach(), examples)
    torch.testing.assert_close(found, expected[:, 3:])


def test_a_prefix_is_keys_and_values_of_every_layer():
    """The same as a cache of that many tokens in plain transformers."""
    from transformers import DynamicCache

    torch.manual_seed(0)
    tuned, examples = Prefix(tokens=3).apply(gpt2()), batch("gpt2")
    ids, mask = examples.inputs["input_ids"], examples.inputs["attention_mask"]
    # [tokens, layers x (keys, values), heads, width of a head]
    parts = prompt_of(tuned).detach().view(3, 4, 2, 8).permute(1, 2, 0, 3)
    cache = DynamicCache()
    for layer in (0, 1):
        keys, values = (parts[2 * layer + which].expand(len(ids), -1, -1, -1) for which in (0, 1))
        cache.update(keys.clone(), values.clone(), layer)
    with torch.no_grad():
        whole = torch.cat([torch.ones(len(ids), 3, dtype=torch.long), mask], dim=1)
        expected = tuned.get_base_model()(input_ids=ids, attention_mask=whole, past_key_values=cache).logits
    torch.testing.assert_close(logits(tuned, examples), expected)


@pytest.mark.parametrize("tuning", [Prompt(tokens=3), Prefix(tokens=3)])
def test_all_of_a_prompt_is_trained(tuning):
    torch.manual_seed(0)
    tuned = tuning.apply(bert())
    before = prompt_of(tuned).detach().clone()
    step(tuned, **batch("bert").inputs)
    assert bool((prompt_of(tuned) != before).any(dim=1).all())


@pytest.mark.parametrize("tuning", [Prompt(tokens=3), Prefix(tokens=3)])
def test_an_encoder_and_decoder_has_a_prompt_and_no_head(tuning):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    tuned = tuning.apply(T5ForConditionalGeneration(config))
    assert trained(tuned) == {"prompt_encoder.default.embedding.weight"}


def test_sizes_by_any_name():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=20, max_position_embeddings=64, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    assert prompt_of(Prompt(tokens=3).apply(DistilBertForSequenceClassification(config))).shape == (3, 16)


def masked_model():
    from transformers import BertForMaskedLM

    return BertForMaskedLM(bert().config)


def deberta():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=20, **sizes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prompt(tokens=0), "Prompt.tokens must be >= 1, got 0"),
        (lambda: Prefix(tokens=-1), "Prefix.tokens must be >= 1, got -1"),
        (lambda: Prompt().apply(masked_model()), "BertForMaskedLM is neither"),
        (lambda: Prefix().apply(torch.nn.Linear(2, 2)), "Linear is neither|has no head"),
        (lambda: Prefix().apply(deberta()), "peft cannot put Prefix.* before the texts of Deberta.*past key values"),
        (lambda: Prompt(tokens=63).apply(bert()), "peft cannot put Prompt"),  # of the 64 positions one is left
    ],
)
def test_refusals(make, message, capfd):
    with pytest.raises(BadInput, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
