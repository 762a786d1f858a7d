import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.learning.small_models import batch, bert, gpt2_config, logits, noisy

from fedelta.adapters.offsite import Emulator, Ends, OffsiteTuning
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdam, FedOpt
from fedelta.core import snapshot
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.parameters import Parameters
from fedelta.core.program import SiteData, run
from fedelta.fleet.local import Local
from fedelta.learning.kinds import CAUSAL_LANGUAGE_MODEL, TEXT_CLASSIFICATION
from fedelta.learning.objectives import Classification, LanguageModel
from fedelta.learning.optimizers import AdamW
from fedelta.learning.pretrained import Pretrained, tokenizer
from fedelta.learning.task import Task
from fedelta.learning.text import encode_causal
from fedelta.learning.training import Training
from fedelta.learning.tuning import Full

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
BLOCKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers", "vit": "vit.encoder.layer"}


def full(family, layers=7):
    torch.manual_seed(0)
    if family == "bert":
        return bert(num_hidden_layers=layers)
    if family == "vit":
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3, "num_hidden_layers": layers}
        return noisy(ViTForImageClassification(ViTConfig(**sizes, **SIZES)))
    if family == "gpt2":
        from transformers import GPT2LMHeadModel

        config = gpt2_config()
        config.num_hidden_layers = layers
        return noisy(GPT2LMHeadModel(config))
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_key_value_heads": 1, "num_hidden_layers": layers, "pad_token_id": 0, "tie_word_embeddings": True}
    return noisy(LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, **SIZES)))


def blocks(module, family):
    """The list of blocks, found by its name in this family."""
    name = next(n for n, part in module.named_modules() if isinstance(part, torch.nn.ModuleList))
    return module.get_submodule(name)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_the_emulator_computes_what_the_full_model_does_without_the_dropped_blocks(family):
    model = full(family)
    emulator = Emulator(model=lambda: model, ends=2, kept=2)()
    examples = batch("vit" if family == "vit" else "bert")
    cut = copy.deepcopy(model)
    owner = blocks(cut, family)
    del owner[3]  # of 7 blocks the first two and last two are the ends; of the others the first and the last are kept
    assert len(owner) == len(blocks(emulator, family)) == 6
    if hasattr(cut.config, "use_cache"):
        cut.config.use_cache = emulator.config.use_cache = False
    torch.testing.assert_close(logits(emulator, examples), logits(cut, examples))
    assert not torch.allclose(logits(emulator, examples), logits(model, examples))


@pytest.mark.parametrize(
    ("total", "ends", "kept", "expected"),
    [
        (24, 2, 8, [0, 1, 2, 5, 7, 10, 13, 16, 18, 21, 22, 23]),
        (9, 1, 3, [0, 1, 4, 7, 8]),
        (5, 1, 2, [0, 1, 3, 4]),
        (8, 2, 1, [0, 1, 3, 6, 7]),
    ],
)
def test_what_is_kept_is_evenly_spread_and_has_the_first_and_last_between_the_ends(total, ends, kept, expected):
    assert Emulator(model=bert, ends=ends, kept=kept)._kept(total) == expected


@pytest.mark.parametrize(("family", "head"), [("bert", {"classifier"}), ("gpt2", set()), ("llama", set())])
def test_the_ends_are_trained_and_the_head_of_a_classifier(family, head):
    module = Ends(count=2).apply(full(family))
    found = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    prefix = next(n for n, part in module.named_modules() if isinstance(part, torch.nn.ModuleList))
    ends = tuple(f"{prefix}.{number}." for number in (0, 1, 5, 6))
    expected = {n for n, _ in module.named_parameters() if n.startswith(ends) or n.partition(".")[0] in head}
    assert found == expected


def handed_out(tmp_path, model, words=None):
    """The folders of the full model and of its emulator, made by its owner."""
    model.save_pretrained(tmp_path / "full")
    if words is not None:
        words.save_pretrained(tmp_path / "full")
    kind = TEXT_CLASSIFICATION if "Sequence" in type(model).__name__ else CAUSAL_LANGUAGE_MODEL
    labels = ("a", "b", "c") if kind.labelled else ()
    whole = Pretrained(source=str(tmp_path / "full"), kind=kind, labels=labels, tuning=Ends(count=1))
    Emulator(model=whole, ends=1, kept=2).hand_out(tmp_path / "emulator", words)
    return whole, replace(whole, source=str(tmp_path / "emulator"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_what_is_handed_out_is_a_model_of_its_own_and_has_nothing_of_the_dropped_blocks(
    tmp_path, family, bert_tokenizer
):
    model = full(family, layers=6)
    _, small = handed_out(tmp_path, model, bert_tokenizer)
    shutil.rmtree(tmp_path / "full")
    module = small()  # without the full model
    assert module.config.num_hidden_layers == 4
    files = [path.read_bytes() for path in sorted((tmp_path / "emulator").iterdir())]
    kept, dropped = (0, 1, 4, 5), (2, 3)
    for number, block in enumerate(blocks(model, family)):
        for tensor in block.state_dict().values():
            if tensor.unique().numel() < 8:
                continue  # zeros and ones are everywhere
            inside = any(tensor.numpy().tobytes() in content for content in files)
            assert inside == (number in kept), (number, tuple(tensor.shape))
            assert (number in kept) != (number in dropped)


def site(name):
    number = int(name[-1])
    g = torch.Generator().manual_seed(number)
    ids = torch.randint(1, 20, (40, 6), generator=g)
    return Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 0] % 3)


SITES = ["site-1", "site-2", "site-3"]


def federation(whole, small, **more):
    objective = Classification(classes=3)
    training = Training(optimizer=AdamW(lr=1e-2), batch=8, epochs=2)
    client = FedAvg(task=Task(model=small, objective=objective), training=training)
    algorithm = OffsiteTuning(task=Task(model=whole, objective=objective), client=client)
    return Federation(algorithm=algorithm, rounds=3, test=site("site-9"), **more)


@pytest.fixture
def folders(tmp_path, bert_tokenizer):
    return handed_out(tmp_path, full("bert", layers=6), bert_tokenizer)


def test_a_federation_trains_the_emulator_and_measures_the_full_model(folders):
    whole, small = folders
    program = federation(whole, small)
    alone = Federation(algorithm=program.algorithm.client, rounds=3)
    states = [state for state, _ in run(program, Local(program, site, SITES))]
    reports = [report for _, report in run(program, Local(program, site, SITES))]
    (*_, (bare, _)) = run(alone, Local(alone, site, SITES))
    # the sites do what they would without the owner's model, and their ends are plugged in unchanged
    start = Parameters.of(program.algorithm.task.build(0))
    assert torch.equal(alone.init().algorithm.vector, start.vector)
    plugged = program.algorithm.parameters(states[-1].algorithm)
    assert torch.equal(plugged.vector, bare.algorithm.vector)
    assert plugged.layout == start.layout
    # by hand: the trained emulator's ends in the full model
    expected, emulator = whole(), alone.model(bare)
    expected.bert.encoder.layer[0].load_state_dict(emulator.bert.encoder.layer[0].state_dict())
    expected.bert.encoder.layer[5].load_state_dict(emulator.bert.encoder.layer[3].state_dict())
    expected.classifier.load_state_dict(emulator.classifier.state_dict())
    test = site("site-9")
    found = program.model(states[-1])
    torch.testing.assert_close(logits(found, test), logits(expected, test))
    for name, tensor in whole().state_dict().items():  # and nothing else has moved
        if not any(part in name for part in (".layer.0.", ".layer.5.", "classifier")):
            assert torch.equal(found.state_dict()[name], tensor)
    loss = torch.nn.functional.cross_entropy(logits(expected, test), test.targets)
    assert reports[-1].metrics["test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert reports[-1].metrics["train_loss"] < 0.9 * reports[0].metrics["train_loss"]
    numbers = program.algorithm.measured(states[-1].algorithm, test)
    assert numbers["plug_in_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, module in (("zero_shot", whole()), ("emulator_zero_shot", small()), ("emulator", emulator)):
        loss = torch.nn.functional.cross_entropy(logits(module, test), test.targets)
        assert numbers[f"{name}_loss"] == pytest.approx(loss.item(), rel=1e-5), name
    assert numbers["plug_in_loss"] < numbers["zero_shot_loss"]


def test_a_site_needs_the_emulator_alone(folders, tmp_path):
    whole, small = folders
    program = federation(whole, small, validate_at_sites=True)
    absent = replace(whole, source=str(tmp_path / "only the owner has it"))
    elsewhere = federation(absent, small, validate_at_sites=True)
    data = lambda name: SiteData(train=site(name), validation=site(f"{name}1"))  # noqa: E731
    (first, report) = next(run(program, Local(elsewhere, data, SITES)))
    assert not report.absent
    assert not report.unmeasured
    assert {"test_loss", "validation_loss"} <= report.metrics.keys()
    (same, _) = next(run(program, Local(program, data, SITES)))
    assert torch.equal(first.algorithm.client.vector, same.algorithm.client.vector)
    with pytest.raises(BadInput, match="only the owner has it"):
        elsewhere.init()
    sent, own = program.algorithm.broadcast(first.algorithm, dict.fromkeys(SITES, -1))
    assert not own
    assert {name: len(tensor) for name, tensor in sent.items()} == {
        "parameters": first.algorithm.parameters.layout.size
    }


def test_a_resumed_run_gives_the_same_under_a_server_optimizer(folders, tmp_path):
    program = federation(*folders)
    algorithm = replace(program.algorithm, client=FedOpt(client=program.algorithm.client, server=FedAdam(lr=0.01)))
    program = replace(program, algorithm=algorithm)
    states = [state for state, _ in run(program, Local(program, site, SITES))]
    snapshot.save(tmp_path / "state", states[0])
    middle, _ = snapshot.load(tmp_path / "state", program.init())
    (*_, (end, _)) = run(program, Local(program, site, SITES), middle)
    found, expected = (program.algorithm.parameters(state.algorithm).vector for state in (end, states[-1]))
    assert torch.equal(found, expected)


def test_what_cannot_be_is_refused_in_one_sentence(folders):
    whole, small = folders
    with pytest.raises(BadInput, match=r"of 6 blocks, 4 are between 1 and 1 at the ends, .* got kept=4"):
        Emulator(model=whole, ends=1, kept=4)()
    with pytest.raises(BadInput, match="leaves nothing between the ends of the 6 blocks"):
        Ends(count=3).apply(replace(whole, tuning=Full())())
    with pytest.raises(BadInput, match="plain Hugging Face model, got Sequential"):
        Emulator(model=lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), ends=1, kept=1)()
    with pytest.raises(BadInput, match="tune both by the same"):
        federation(replace(whole, tuning=Ends(count=2)), small).init()
    for wrong in ({"ends": 0}, {"kept": 0}):
        with pytest.raises(BadInput, match="must be >= 1, got 0"):
            Emulator(model=whole, **wrong)
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=4, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(BadInput, match="are not one list"):
        Ends(count=1).apply(T5ForConditionalGeneration(config))


def test_the_plug_in_of_a_real_llama_has_learned_what_its_emulator_learned(shared, tmp_path):
    """Llama that has read children's stories, to speeches of one role; one of its five blocks stays at its owner."""
    source = shared("weights-stories260K/hf")
    plays = Path(shared("tinyshakespeare/input.txt")).read_text(encoding="utf-8")
    speeches = [part.partition("\n")[2] for part in plays.split("\n\n") if part.startswith("GLOUCESTER:")]
    words = tokenizer(str(source))
    rows = encode_causal(speeches, words, 64, pack=True, end=False)
    whole = Pretrained(source=str(source), kind=CAUSAL_LANGUAGE_MODEL, tuning=Ends(count=1))
    Emulator(model=whole, ends=1, kept=2).hand_out(tmp_path / "emulator", words)
    small = replace(whole, source=str(tmp_path / "emulator"))
    objective = LanguageModel()
    client = FedAvg(
        task=Task(model=small, objective=objective), training=Training(optimizer=AdamW(lr=3e-3), batch=8, clip=1.0)
    )
    algorithm = OffsiteTuning(task=Task(model=whole, objective=objective), client=client)
    program = Federation(algorithm=algorithm, rounds=2)
    parts = {"first": rows[:60], "second": rows[60:120]}
    (*_, (state, report)) = run(program, Local(program, parts.__getitem__, list(parts)))
    assert not report.absent
    numbers = algorithm.measured(state.algorithm, rows[120:150])
    assert numbers["zero_shot_perplexity"] < numbers["emulator_zero_shot_perplexity"]
    assert numbers["emulator_perplexity"] < 0.8 * numbers["emulator_zero_shot_perplexity"]
    assert numbers["plug_in_perplexity"] < 0.8 * numbers["zero_shot_perplexity"]
    assert numbers["plug_in_perplexity"] < numbers["emulator_perplexity"]  # the owner is still needed
