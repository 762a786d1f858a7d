"""Models of torchvision and timm (VGG, Inception, ResNet, …), with weights that these libraries saved.

The two are an optional extra: `pip install 'fedelta[vision]'`. A model is called with one tensor [n, channels, height,
width], so its examples have the single input "x".

The auxiliary heads that torchvision's Inception v3 and GoogLeNet use in training are left out, and their weights passed
over: what they would add to the loss is no part of an objective. Inception v3 is made for images of 299 x 299 and takes
those from 75 x 75 on. torchvision's own weights of these two want `options={"transform_input": True}` if the images are
normalised by ImageNet's mean and deviation, and nothing if they are normalised to [-1, 1].

Limits: weights are loaded under the names of the library that builds the model; files of other projects that timm
converts on download are not converted here. Checkpoints that hold more than tensors and plain values are refused.
"""

import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedelta.core.errors import BadInput
from fedelta.learning.structure import mark_new
from fedelta.learning.tuning import Full, Tuning

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".th", ".tar")
_WRAPPINGS = ("state_dict", "model")  # where a training script keeps the weights, beside its optimizer's state
_AUXILIARY_HEADS = {"inception_v3": ("AuxLogits.",), "googlenet": ("aux1.", "aux2.")}  # in torchvision
_LISTS = {"torchvision": "torchvision.models.list_models()", "timm": "timm.list_models()"}


@dataclass(frozen=True, kw_only=True)
class Vision:
    """Builds an image classifier when called, with what is trained and shared set by `tuning`.

    `weights` is a state dict (.safetensors, or a file of `torch.save`) or a folder with one, such as timm's
    `save_for_hf` writes; without it all weights are drawn. A head of the checkpoint is kept if it has as many outputs
    as `labels`; otherwise a new one is drawn, from PyTorch's global generator: seed it, and two builds are equal.
    """

    name: str  # of the architecture in its library: "vgg11", "inception_v3", "vit_tiny_patch16_224"
    labels: tuple[str, ...]  # class i has label i
    library: Literal["torchvision", "timm"] = "torchvision"
    weights: str | None = None
    tuning: Tuning = field(default_factory=Full)
    options: Mapping[str, object] = field(default_factory=dict)  # further arguments of the architecture

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise BadInput(f"classification needs two or more distinct labels, got {self.labels}")
        if self.library not in _BUILDERS:
            raise BadInput(f"Vision.library is 'torchvision' or 'timm', got {self.library!r}")
        set_here = {"num_classes", "weights", "pretrained", "aux_logits"}.intersection(self.options)
        if set_here:
            raise BadInput(f"Vision.options cannot set {min(set_here)!r}; leave it out")

    def __call__(self) -> nn.Module:
        """A new module, in evaluation mode. Raises BadInput if the library or the weights are missing or do not fit."""
        file = None if self.weights is None else _weights_file(self.weights)
        options = {**self._saved_options(file), **self.options}
        model = _BUILDERS[self.library](self.name, len(self.labels), options).eval()
        fresh = [] if file is None else self._load(model, file)
        mark_new(model, fresh)
        return self.tuning.apply(model, fresh)

    def _saved_options(self, file: Path | None) -> Mapping[str, object]:
        """The arguments of the architecture that timm wrote beside the weights. Raises BadInput for another one."""
        config = None if file is None or self.library != "timm" else file.with_name("config.json")
        if config is None or not config.exists():
            return {}
        saved = json.loads(config.read_text(encoding="utf-8"))
        architecture = saved.get("architecture", "")
        if architecture != self.name.partition(".")[0]:  # behind the point is a name for the weights
            raise BadInput(f"{self.weights!r} holds the weights of timm's {architecture!r}; give that as Vision.name")
        return {name: value for name, value in saved.get("model_args", {}).items() if name != "num_classes"}

    def _load(self, model: nn.Module, file: Path) -> list[str]:
        """Load the weights; the names of the layers for which there are none, which are heads for other labels."""
        found = read_weights(file)
        if self.library == "torchvision":
            found = _as_torchvision_does(self.name, found)
        state = model.state_dict()
        fresh = {
            owner
            for owner, part in model.named_modules()
            if isinstance(part, nn.Linear | nn.Conv2d)
            and part.weight.shape[0] == len(self.labels)
            and _for_other_labels(found.get(f"{owner}.weight"), part.weight)
        }
        state = {name: value for name, value in state.items() if name.rpartition(".")[0] not in fresh}
        found = {name: value for name, value in found.items() if name.rpartition(".")[0] not in fresh}
        wrong = _misfit(found, state)
        if wrong is not None:
            raise BadInput(f"the weights in {str(file)!r} are not those of {self.library}'s {self.name!r}: {wrong}")
        model.load_state_dict(found, strict=False)
        return sorted(fresh)


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name, on the CPU: from .safetensors, or what `torch.save` wrote.

    A dictionary that keeps them as "state_dict" or "model" is opened, and the "module." that parallel training puts
    before every name is taken away. Nothing that a pickle names is run. Raises BadInput for any other file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if Path(file).suffix == ".safetensors":
            loaded: Any = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {str(file)!r}; check the path") from error
    except pickle.UnpicklingError as error:
        raise BadInput(f"{str(file)!r} holds more than tensors; save the model's state_dict() alone") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
        raise BadInput(
            f"{str(file)!r} holds no weights that can be read ({first}); save a state_dict() anew"
        ) from error
    for name in _WRAPPINGS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise BadInput(f"{str(file)!r} holds no state dict, which is tensors by name; save the model's state_dict()")
    prefix = "module." if all(name.startswith("module.") for name in loaded) else ""
    return {name.removeprefix(prefix): value for name, value in loaded.items()}


def _weights_file(weights: str) -> Path:
    """The file itself, or the one with weights in a folder; of several the one named "model"."""
    path = Path(weights).expanduser()
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    chosen = [file for file in files if file.name == "model.safetensors"] or files
    if len(chosen) != 1:
        there = (
            f"{', '.join(file.name for file in files[:5])}; name one of them" if files else "none; give a state dict"
        )
        raise BadInput(f"a folder of weights has one file with them, and {weights!r} has {there}")
    return chosen[0]


def _as_torchvision_does(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of torchvision's modules, without those of auxiliary heads."""
    if name.startswith("densenet"):  # its files have names that a module can no longer have
        found = {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key): value for key, value in found.items()}
    passed_over = _AUXILIARY_HEADS.get(name, ())
    return {key: value for key, value in found.items() if not key.startswith(passed_over)} if passed_over else found


def _for_other_labels(found: Tensor | None, weight: Tensor) -> bool:
    """Whether a checkpoint has a head for another number of labels than `weight`, or none."""
    return found is None or (found.shape[0] != weight.shape[0] and found.shape[1:] == weight.shape[1:])


def _misfit(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """What keeps `found` from being loaded as `state`, if anything does."""
    for name, value in state.items():
        if name not in found:
            if name.endswith("num_batches_tracked"):  # PyTorch did not always count them
                continue
            return f"they have no {name!r}"
        if found[name].shape != value.shape:
            return f"{name!r} has shape {list(found[name].shape)} and not {list(value.shape)}"
    unknown = [name for name in found if name not in state]
    return f"{unknown[0]!r} has no place in it" if unknown else None


def _torchvision(name: str, classes: int, options: Mapping[str, object]) -> nn.Module:
    models = _imported("torchvision", "torchvision.models")
    _check_name("torchvision", name, models.list_models(module=models))
    settings: dict[str, object] = {"num_classes": classes, **options}
    if name in _AUXILIARY_HEADS:
        # torchvision's own way of drawing their weights is on its way out: outputs of many thousands, after seconds
        settings = {"aux_logits": False, "init_weights": False, **settings}
    return _built("torchvision", name, lambda: models.get_model(name, **settings))


def _timm(name: str, classes: int, options: Mapping[str, object]) -> nn.Module:
    timm = _imported("timm", "timm")
    _check_name("timm", name.partition(".")[0], timm.list_models())
    return _built("timm", name, lambda: timm.create_model(name, pretrained=False, num_classes=classes, **options))


def _built(library: str, name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except (TypeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "").rstrip(". ")
        raise BadInput(f"{library} cannot build {name!r} ({first}); check Vision.name and Vision.options") from error


def _check_name(library: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        close = get_close_matches(name, names, n=3)
        cure = f"did you mean {' or '.join(close)}?" if close else f"see {_LISTS[library]}"
        raise BadInput(f"{library} has no architecture {name!r} for classification; {cure}")


def _imported(library: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise BadInput(f"{library} is not installed; run: pip install 'fedelta[vision]'") from error
    except (RuntimeError, OSError) as error:  # how a build for another PyTorch shows
        first = next(iter(str(error).splitlines()), "").rstrip(". ")
        raise BadInput(
            f"torchvision does not fit PyTorch {torch.__version__} ({first}); install both from one package index"
        ) from error


_BUILDERS: dict[str, Callable[[str, int, Mapping[str, object]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
}
