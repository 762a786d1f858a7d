"""Every tuning on every family: what travels, what a round changes, sites at once, and the way to disk and back."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.learning.small_models import FAMILIES, batch, logits
from torch import nn

from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.parameters import Parameters, trainable, travelling_buffers
from fedelta.core.program import run
from fedelta.fleet.local import Local
from fedelta.learning.bottleneck import Bottleneck
from fedelta.learning.cohort import Cohort, Trained, train_many
from fedelta.learning.lora import IA3, LoRA
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.prompts import Prefix, Prompt
from fedelta.learning.saving import load, save
from fedelta.learning.task import Task
from fedelta.learning.training import Training, train
from fedelta.learning.tuning import BitFit, Full, Head, HeadAndNorms, LastLayers, Tuning

BERT = r"bert\.encoder\.layer\.[01]\."
GPT2 = r"transformer\.h\.[01]\."
LLAMA = r"model\.layers\.[01]\."
VIT = r"vit\.layers\.[01]\."
HEADS = {"bert": "classifier", "gpt2": "score", "llama": "score", "vit": "classifier"}
LORA = r"\.lora_[AB]\.default\.weight"
IA3S = r"\.ia3_l\.default"
SMALL = r"\.adapter\.(down|up)\.(weight|bias)"
PROMPT = r"prompt_encoder\.default\.embedding\.weight"

# tuning, family, what travels besides the head (a pattern for whole names, without peft's prefix), how many tensors
TRAVELS: list[tuple[Tuning, str, str, int]] = [
    (LoRA(rank=2), "bert", BERT + r"attention\.self\.(query|value)" + LORA, 8),
    (LoRA(rank=2, rslora=True), "gpt2", GPT2 + r"attn\.c_attn" + LORA, 4),
    (LoRA(rank=2, rslora=True), "llama", LLAMA + r"self_attn\.[qv]_proj" + LORA, 8),
    (LoRA(rank=2), "vit", VIT + r"(attention\.[qkvo]_proj|mlp\.fc[12])" + LORA, 24),
    (IA3(), "bert", BERT + r"(attention\.self\.(key|value)|output\.dense)" + IA3S, 6),
    (IA3(), "gpt2", GPT2 + r"(attn\.c_attn|mlp\.c_proj)" + IA3S, 4),
    (IA3(), "llama", LLAMA + r"(self_attn\.[kv]_proj|mlp\.down_proj)" + IA3S, 6),
    (IA3(), "vit", VIT + r"(attention\.[kv]_proj|mlp\.fc2)" + IA3S, 6),
    (BitFit(), "bert", rf"(bert\.embeddings\.LayerNorm|{BERT}.*|bert\.pooler\.dense)\.bias", 18),
    (BitFit(), "gpt2", rf"({GPT2}.*|transformer\.ln_f)\.bias", 13),
    (BitFit(), "vit", rf"(vit\.embeddings\.patch_embeddings\.projection|{VIT}.*|vit\.layernorm)\.bias", 18),
    (Bottleneck(width=4), "bert", BERT + r"(attention\.)?output\.dense" + SMALL, 16),
    (Bottleneck(width=4), "gpt2", GPT2 + r"(attn|mlp)\.c_proj" + SMALL, 16),
    (Bottleneck(width=4), "llama", LLAMA + r"(self_attn\.o_proj|mlp\.down_proj)" + SMALL, 16),
    (Bottleneck(width=4), "vit", VIT + r"(attention\.o_proj|mlp\.fc2)" + SMALL, 16),
    (Bottleneck(width=4, attention=False), "bert", BERT + r"output\.dense" + SMALL, 8),
    (Prompt(tokens=3), "bert", PROMPT, 1),
    (Prefix(tokens=3), "bert", PROMPT, 1),
    (Prefix(tokens=3), "gpt2", PROMPT, 1),
    (Prefix(tokens=3), "llama", PROMPT, 1),
    (LastLayers(), "bert", r"bert\.(encoder\.layer\.1|pooler)\..*", 18),
    (LastLayers(), "gpt2", r"transformer\.(h\.1|ln_f)\..*", 14),
    (LastLayers(count=2), "llama", r"model\.(layers\.[01]|norm)\..*", 19),
    (LastLayers(), "vit", r"vit\.(layers\.1|layernorm)\..*", 18),
    (HeadAndNorms(), "bert", r"bert\..*LayerNorm\.(weight|bias)", 10),
    (HeadAndNorms(), "gpt2", r"transformer\.(h\.[01]\.ln_[12]|ln_f)\.(weight|bias)", 10),
    (HeadAndNorms(), "llama", r"model\.(layers\.[01]\.\w+_layernorm|norm)\.weight", 5),
    (HeadAndNorms(), "vit", r"vit\.(layers\.[01]\.layernorm_(before|after)|layernorm)\.(weight|bias)", 10),
    (Head(), "bert", "", 0),
    (Head(), "gpt2", "", 0),
    (Head(), "llama", "", 0),
    (Head(), "vit", "", 0),
    (Full(), "bert", r"bert\..*", 39),
    (Full(), "gpt2", r"transformer\..*", 28),
    (Full(), "llama", r"model\..*", 20),
    (Full(), "vit", r"vit\..*", 38),
]
EVERY = pytest.mark.parametrize(
    ("tuning", "family", "pattern", "count"), TRAVELS, ids=lambda value: type(value).__name__ if value else ""
)


def task(tuning: Tuning, family: str) -> Task:
    return Task(model=lambda: tuning.apply(FAMILIES[family]()), objective=Classification(classes=3))


def plain(name: str) -> str:
    """A name without what peft puts before it and into it for a head that it saves."""
    name = name.removeprefix("base_model.").removeprefix("model." if "lora_" in name or "ia3_" in name else "")
    return name.replace(".modules_to_save.default", "")


@EVERY
def test_only_what_trains_travels_and_only_that_changes_in_a_round(
    tuning: Tuning, family: str, pattern: str, count: int
) -> None:
    program = Federation(
        algorithm=FedAvg(task=task(tuning, family), training=Training(optimizer=SGD(lr=0.5), batch=4, epochs=2)),
        rounds=1,
    )
    before = {name: tensor.clone() for name, tensor in program.algorithm.task.build(0).state_dict().items()}
    data = {"a": batch(family), "b": batch(family, 6)}
    ((state, report),) = run(program, Local(program, data.__getitem__, list(data), threads=1))
    assert not report.absent
    names = list(program.algorithm.parameters(state.algorithm))
    head = [name for name in names if re.search(rf"(^|\.){HEADS[family]}(\.modules_to_save\.default)?\.\w+$", name)]
    rest = [plain(name) for name in names if name not in head]
    assert len(head) == (2 if HEADS[family] == "classifier" else 1)
    assert len(rest) == count
    assert all(re.fullmatch(pattern, name) for name in rest), rest
    after = program.model(state).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed <= {*names}
    # the bias of a key adds the same to all scores of a query: its gradient is zero
    assert all(re.search(r"key\.bias|k_proj\.bias", name) for name in {*names} - changed), {*names} - changed


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@EVERY
def test_sites_at_once_learn_the_same_or_are_refused(tuning: Tuning, family: str, pattern: str, count: int) -> None:
    work, plan, examples = task(tuning, family), Plan(cohort=2).plain, batch(family)
    training = Training(optimizer=SGD(lr=0.5), batch=4)
    start = Parameters.of(work.build(0))
    model = work.flat(0, Plan().plain)
    model.load(start)
    train(model, examples, work.objective, training, round=1, seed=7)
    cohort = Cohort(rows=Examples.cat([examples, examples]), sizes=[8, 8], seeds=[7, 8])

    def at_once() -> Trained:
        return train_many(work.cohort(0, plan), start, cohort, work.objective, training, plan, round=1)

    if family == "vit" or (isinstance(tuning, Prefix) and family != "bert"):
        torch.testing.assert_close(at_once().deltas[0], model.read().vector - start.vector, rtol=0, atol=1e-5)
    else:  # a mask of padding is looked at
        with pytest.raises(BadInput, match=r"so that sites are trained one by one; set Plan\.cohort to 1$"):
            at_once()


@EVERY
def test_what_is_saved_is_loaded_with_the_same_logits(
    tmp_path: Path, tuning: Tuning, family: str, pattern: str, count: int
) -> None:
    base, out, examples = tmp_path / "base", tmp_path / "out", batch(family)
    torch.manual_seed(0)
    whole: Any = FAMILIES[family]()
    whole.save_pretrained(base)
    work = Task(model=lambda: tuning.apply(type(whole).from_pretrained(base)), objective=Classification(classes=3))
    model = work.flat(0, Plan().plain)
    train(model, examples, work.objective, Training(optimizer=SGD(lr=0.5), batch=4), round=1, seed=7)
    expected = logits(model.module, examples)
    assert not torch.allclose(expected, logits(whole, examples), atol=1e-3)

    save(model.module, out)
    torch.manual_seed(5)
    drawn = torch.random.get_rng_state()
    loaded = load(out)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not loaded.training
    torch.testing.assert_close(logits(loaded, examples), expected, rtol=0, atol=1e-5)
    if not isinstance(tuning, Bottleneck):
        torch.testing.assert_close(logits(without_fedelta(whole, base, out), examples), expected, rtol=0, atol=1e-5)
    save(loaded, tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again"), examples), expected, rtol=0, atol=1e-5)


def without_fedelta(like: Any, base: Path, out: Path) -> nn.Module:
    from peft import PeftModel

    from fedelta.learning.lora import without_noise_of_peft

    if not (out / "adapter_config.json").exists():
        found: nn.Module = type(like).from_pretrained(out)
        return found
    with without_noise_of_peft():
        adapted: nn.Module = PeftModel.from_pretrained(type(like).from_pretrained(base), str(out))
    return adapted


REFUSED: list[tuple[Tuning, str, str]] = [
    (BitFit(), "llama", "LlamaForSequenceClassification has no biases outside its head"),
    (Prompt(), "gpt2", "GPT2ForSequenceClassification cannot tell padding from text under Prompt"),
    (Prompt(), "llama", "LlamaForSequenceClassification cannot tell padding from text under Prompt"),
    (Prompt(), "vit", "ViTForImageClassification is neither; use LoRA"),
    (Prefix(), "vit", "ViTForImageClassification is neither; use LoRA"),
    (LastLayers(count=3), "bert", "asks for more blocks than the 2 that BertForSequenceClassification has"),
]


@pytest.mark.parametrize(("tuning", "family", "message"), REFUSED)
def test_what_cannot_be_done_is_refused(tuning: Tuning, family: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        tuning.apply(FAMILIES[family]())
    assert "\n" not in str(caught.value)


FRESH = [tuning for tuning, family, *_ in TRAVELS if family == "bert"]


@pytest.mark.parametrize("tuning", FRESH, ids=lambda tuning: type(tuning).__name__)
def test_parts_that_are_not_pre_trained_are_trained(tuning: Tuning) -> None:
    found = {plain(name) for name in trainable(tuning.apply(FAMILIES["bert"](), ("bert.pooler.dense",)))}
    # peft names a part within the model differently from a child of it
    whole = {name.removeprefix("model.") for name in found}
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"} <= whole


def test_all_tunings_but_full_leave_statistics_of_frozen_layers_alone() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    for tuning, travels in (
        (LoRA(rank=2), 0),
        (Head(), 0),
        (LastLayers(), 4 * 3),  # three convolutions and a shortcut with a BatchNorm each
        (BitFit(), 8 * 3),
        (HeadAndNorms(), 8 * 3),
        (Full(), 8 * 3),
    ):
        buffers = travelling_buffers(tuning.apply(ResNetForImageClassification(config)))
        assert len([name for name in buffers if "running" in name or "num_batches" in name]) == travels, tuning
