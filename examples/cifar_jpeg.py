"""A ResNet-20 for CIFAR-10, adapted to JPEG images at ten sites with unequal classes.

    fedelta run examples/cifar_jpeg.py

The network learned from images without loss, and is right about ten points less often on images from JPEG files. The
sites hold images that are encoded as JPEG here; the test images came as JPEG, from another encoder. Reads from the
folder $FEDELTA_DATA:
    weights-resnet-cifar10/resnet20-12fca82f.th
        of github.com/akamaster/pytorch_resnet_cifar10; He et al., CVPR 2016, section 4.2, shortcut option A
    cifar10/cifar10_train_first4000_lossless.npz and cifar10/cifar10_test2000_jpegdecoded.npz
        x uint8 [n, 32, 32, 3], y [n]
"""

import os
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fedelta import SGD, Classification, Cosine, Dirichlet, Examples, FedAvg, Federation, Parameters, Task, Training
from fedelta.core.errors import BadInput
from fedelta.data.images import ImageFormat, read_images
from fedelta.learning.vision import read_weights

SITES = 10
ALPHA = 0.5  # of the Dirichlet split: the smaller, the more unequal the classes of the sites
QUALITY = 75  # of the JPEG encoder, 1 to 95
LR = 0.01
BATCH = 32
ROUNDS = 5


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.wider = (1, 0) if inputs == outputs else (2, outputs - inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        zeros = (0, 0, 0, 0, self.wider // 2, self.wider // 2)  # option A: no weights in a shortcut
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], zeros)
        return (out + shortcut).relu()


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        out: Tensor = self.linear(x.mean(dim=(2, 3)))
        return out


def network() -> nn.Module:
    module = ResNet20()
    module.load_state_dict(read_weights(there("weights-resnet-cifar10/resnet20-12fca82f.th")))
    return module


def program() -> Federation[Parameters]:
    task = Task(model=network, objective=Classification(classes=10))
    training = Training(optimizer=SGD(lr=LR, momentum=0.9), batch=BATCH, schedule=Cosine(rounds=ROUNDS))
    return Federation(algorithm=FedAvg(task=task, training=training), rounds=ROUNDS)


def sites() -> list[str]:
    return [f"site-{i}" for i in range(SITES)]


def site(name: str) -> Examples:
    data = images("cifar10_train_first4000_lossless")
    rows = Dirichlet(alpha=ALPHA, minimum=2 * BATCH)(data["y"], SITES, seed=0)[sites().index(name)]
    return examples([encoded(data["x"][row], "JPEG", quality=QUALITY) for row in rows], data["y"][rows])


def test() -> Examples:
    data = images("cifar10_test2000_jpegdecoded")
    return examples([encoded(image, "PNG") for image in data["x"]], data["y"])


def examples(files: list[bytes], classes: "np.ndarray[Any, np.dtype[Any]]") -> Examples:
    return read_images(files, torch.from_numpy(classes).long(), ImageFormat(size=(32, 32)), name="x")


def encoded(image: "np.ndarray[Any, np.dtype[Any]]", kind: str, **options: int) -> bytes:
    out = BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


@cache
def images(name: str) -> dict[str, Any]:
    with np.load(there(f"cifar10/{name}.npz")) as archive:
        return dict(archive)


def there(name: str) -> Path:
    file = Path(os.environ.get("FEDELTA_DATA", "")) / name
    if not file.exists():
        raise BadInput(f"there is no file {str(file)!r}; set FEDELTA_DATA to the folder that holds {name}")
    return file
