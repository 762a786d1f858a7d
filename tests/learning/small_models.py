"""Small classifiers of four families in random weights, without dropout, and a batch for them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedelta.core.examples import Examples
from fedelta.learning.tuning import train_mode

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SAFE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**more: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=20, max_position_embeddings=64, num_labels=3, **{**_SIZES, **_SAFE, **more})
    return noisy(BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    from transformers import GPT2ForSequenceClassification

    return noisy(GPT2ForSequenceClassification(gpt2_config()))


def gpt2_config() -> Any:
    from transformers import GPT2Config

    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    none = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=3, **ends, **none)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(vocab_size=20, num_key_value_heads=1, num_labels=3, pad_token_id=0, **_SIZES)
    return noisy(LlamaForSequenceClassification(config))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **_SIZES, **_SAFE)
    return noisy(ViTForImageClassification(config))


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit}


def noisy(model: nn.Module) -> nn.Module:
    """Biases and norms away from their 0 and 1, so that a lost tensor shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(family: str, rows: int = 8) -> Examples:
    """Rows of three classes: texts of which some are padded on the right, or images."""
    g = torch.Generator().manual_seed(0)
    targets = torch.arange(rows) % 3
    if family == "vit":
        return Examples({"pixel_values": torch.randn(rows, 1, 8, 8, generator=g)}, targets)
    mask = (torch.arange(6) < 3 + torch.arange(rows)[:, None] % 4).long()
    return Examples({"input_ids": torch.randint(1, 20, (rows, 6), generator=g) * mask, "attention_mask": mask}, targets)


def logits(model: nn.Module, examples: Examples) -> Tensor:
    with torch.no_grad():
        found = model.eval()(**examples.inputs).logits
    assert isinstance(found, Tensor)
    return found


class Convolutional(nn.Module):
    """Names on purpose: "conv4" ends with the "4" of a Sequential, and "0" is inside as well as outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(4, affine=False)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean(dim=(2, 3)))
        return out


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def step(module: nn.Module, *inputs: Tensor, **named: Tensor) -> None:
    """One large step of plain SGD in training mode."""
    train_mode(module)
    outputs = module(*inputs, **named)
    logits = getattr(outputs, "logits", outputs)
    nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
