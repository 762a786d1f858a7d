"""Photos, paintings, cartoons and sketches as four sites that classify together, from a MobileNetV2 of ImageNet.

    fedelta run examples/pacs.py
    fedelta run examples/pacs.py --set TUNE=blocks
    fedelta run examples/pacs.py --set TUNE=lora

Reads from the folder $FEDELTA_DATA:
    weights-mobilenetv2-imagenet/mobilenet_v2_imagenet_bnfolded_dequant_fp32.npz
        arrays under the names of torchvision's mobilenet_v2, normalisation folded into the convolutions
    pacs-64/pacs_1960_64x64.npz
        x uint8 [n, 64, 64, 3], y and domain [n], domain_names; images of PACS (Li et al., ICCV 2017)
Every fourth image is held out for the test.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedelta import (
    SGD,
    AdamW,
    Classification,
    Cosine,
    Examples,
    FedAvg,
    Federation,
    Head,
    LoRA,
    Parameters,
    Task,
    Training,
)
from fedelta.core.errors import BadInput

TUNE = "head"  # on frozen features; or the last "blocks", or "lora" factors in them
CLASSES = 7
SIDE = 112  # pixels, to which the images are enlarged
BATCH = 32
LORA_FROM = 14  # the first block with factors

# expansion, filters, blocks and stride of each stage: Sandler et al., CVPR 2018, table 2
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups), nn.ReLU6())


class Block(nn.Module):
    """An inverted residual: wide inside, and added to its input where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * inputs
        self.conv = nn.Sequential(
            *([convolution(inputs, wide, 1)] if expansion > 1 else []),
            convolution(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(3, 32, 3, stride=2)]
        inputs = 32
        for expansion, outputs, blocks, stride in STAGES:
            for number in range(blocks):
                layers.append(Block(inputs, outputs, 1 if number else stride, expansion))
                inputs = outputs
        self.features = nn.Sequential(*layers, convolution(inputs, 1280, 1))
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return out


def network() -> nn.Module:
    """ImageNet's features under a head for these classes, with what is trained set by TUNE."""
    module = MobileNetV2(CLASSES)
    weights = arrays("weights-mobilenetv2-imagenet/mobilenet_v2_imagenet_bnfolded_dequant_fp32.npz")
    features = {name: torch.from_numpy(value) for name, value in weights.items() if name.startswith("features.")}
    module.load_state_dict(features | {f"classifier.{k}": v for k, v in module.classifier.state_dict().items()})
    if TUNE == "head":
        return Head().apply(module)
    if TUNE == "blocks":
        return Head(names=("features.17", "features.18", "classifier")).apply(module)
    if TUNE == "lora":
        pointwise = [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d) and part.groups == 1]
        targets = tuple(name for name in pointwise if int(name.split(".")[1]) >= LORA_FROM)
        return LoRA(rank=8, targets=targets).apply(module)
    raise BadInput(f"TUNE is head, blocks or lora, got {TUNE!r}")


def program() -> Federation[Parameters]:
    rounds = 20 if TUNE == "head" else 10
    training = Training(
        optimizer=AdamW(lr=0.001) if TUNE == "lora" else SGD(lr=0.01, momentum=0.9),
        batch=BATCH,
        schedule=Cosine(rounds=rounds),
    )
    task = Task(model=network, objective=Classification(classes=CLASSES))
    return Federation(algorithm=FedAvg(task=task, training=training), rounds=rounds)


def sites() -> list[str]:
    return [str(name) for name in pacs()["domain_names"]]


def site(name: str) -> Examples:
    rows = np.arange(len(pacs()["y"]))
    return examples(rows[(rows % 4 != 0) & (pacs()["domain"] == sites().index(name))])


def test() -> Examples:
    return examples(np.arange(0, len(pacs()["y"]), 4))


def examples(rows: "np.ndarray[Any, np.dtype[Any]]") -> Examples:
    small = torch.from_numpy(pacs()["x"][rows]).permute(0, 3, 1, 2).float() / 255
    x = nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear")
    normal = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return Examples({"x": normal}, torch.from_numpy(pacs()["y"][rows]).long())


@cache
def pacs() -> dict[str, Any]:
    return arrays("pacs-64/pacs_1960_64x64.npz")


def arrays(name: str) -> dict[str, Any]:
    file = Path(os.environ.get("FEDELTA_DATA", "")) / name
    if not file.exists():
        raise BadInput(f"there is no file {str(file)!r}; set FEDELTA_DATA to the folder that holds {name}")
    with np.load(file) as archive:
        return dict(archive)
