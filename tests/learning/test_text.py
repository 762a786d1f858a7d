import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput
from fedelta.learning.pretrained import Pretrained, tokenizer
from fedelta.learning.text import encode, trim
from fedelta.learning.tuning import Full

TEXTS = ["the film was good", "bad", "a very dull story is not a good story", "the end"]


def test_rows_are_tokenised_as_the_tokenizer_does_alone(bert_tokenizer):
    examples = encode(TEXTS, [0, 1, 1, 0], bert_tokenizer, max_length=16)
    assert examples.inputs.keys() == {"input_ids", "attention_mask"}
    assert examples.inputs["input_ids"].shape == (4, 11)  # nine words and two special tokens
    assert examples.targets.tolist() == [0, 1, 1, 0]
    assert examples.targets.dtype == torch.int64
    for row, text in enumerate(TEXTS):
        mask = examples.inputs["attention_mask"][row].bool()
        assert examples.inputs["input_ids"][row][mask].tolist() == bert_tokenizer(text)["input_ids"]
        assert (examples.inputs["input_ids"][row][~mask] == bert_tokenizer.pad_token_id).all()


def test_long_texts_are_truncated(bert_tokenizer):
    examples = encode(TEXTS, torch.zeros(4), bert_tokenizer, max_length=5)
    assert examples.inputs["input_ids"].shape == (4, 5)
    assert (examples.inputs["input_ids"][2, -1] == bert_tokenizer.sep_token_id).all()


@pytest.mark.parametrize(
    ("texts", "targets", "max_length", "message"),
    [
        (["a", "the"], [0], 16, "2 texts have 1 targets"),
        ([], [], 16, "at least one row"),
        (["a", None], [0, 1], 16, "row 1 is None"),
        (["a", float("nan")], [0, 1], 16, "row 1 is nan"),
        (["a"], [0], 2, "must be > 2, got 2"),
        (["a"], [0], 17, "must be <= 16"),
    ],
)
def test_what_cannot_be_encoded(bert_tokenizer, texts, targets, max_length, message):
    with pytest.raises(BadInput, match=message):
        encode(texts, targets, bert_tokenizer, max_length)


def test_a_text_without_tokens(gpt2):
    with pytest.raises(BadInput, match="row 1, '', has no tokens"):
        encode(["good", ""], [0, 1], tokenizer(str(gpt2)), 8)


def test_a_tokenizer_without_padding_is_refused(gpt2_tokenizer):
    with pytest.raises(BadInput, match="no padding token"):
        encode(["good", "the end"], [0, 1], gpt2_tokenizer, 8)


def test_the_end_token_pads_where_there_is_no_padding_token(gpt2):
    examples = encode(["good", "the end"], [0, 1], tokenizer(str(gpt2)), 8)
    assert examples.inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_trim_equals_padding_the_batch_alone(bert_tokenizer, side):
    bert_tokenizer.padding_side = side
    everything = encode(TEXTS, [0, 1, 1, 0], bert_tokenizer, 16)
    rows = torch.tensor([3, 1])
    alone = encode([TEXTS[3], TEXTS[1]], [0, 1], bert_tokenizer, 16)
    trimmed = trim(everything[rows].inputs)
    assert trimmed.keys() == alone.inputs.keys()
    for name in trimmed:
        torch.testing.assert_close(trimmed[name], alone.inputs[name], rtol=0, atol=0)


@pytest.mark.parametrize("folder", ["bert", "gpt2"])
def test_trim_leaves_the_logits_as_they_are(request, folder):
    source = str(request.getfixturevalue(folder))
    model = Pretrained(source=source, labels=("n", "y"), tuning=Full())().eval()
    inputs = encode(TEXTS, [0, 1, 1, 0], tokenizer(source), 16)[torch.tensor([3, 1])].inputs
    trimmed = trim(inputs)
    assert trimmed["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    with torch.no_grad():
        torch.testing.assert_close(model(**trimmed).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), max_size=4))
def test_trim_drops_exactly_the_outer_columns_without_a_token(rows):
    mask = torch.tensor(rows, dtype=torch.int64).view(-1, 6)
    inputs = {
        "input_ids": torch.arange(mask.numel()).view_as(mask),
        "attention_mask": mask,
        "other": torch.ones(len(mask)),
    }
    first = next((c for c in range(6) if any(row[c] for row in rows)), 0)
    last = next((c for c in reversed(range(6)) if any(row[c] for row in rows)), 5)
    trimmed = trim(inputs)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(trimmed[name], inputs[name][:, first : last + 1])
    assert trimmed["other"] is inputs["other"]


def test_trim_leaves_other_inputs_alone():
    inputs = {"x": torch.zeros(2, 3)}
    assert trim(inputs) is inputs
    images = {"attention_mask": torch.tensor([[1, 1, 0]]), "pixel_values": torch.zeros(1, 3, 8, 8)}
    assert trim(images)["pixel_values"].shape == (1, 3, 8, 8)
