"""What of a pre-trained model is trained and shared: everything, its head, or LoRA factors.

A tuning sets `requires_grad`; what has it travels (see `fedelta.core.parameters`). All else stays at every party as it
was pre-trained. That includes the running statistics of frozen normalisation layers, so a module is put into training
mode by `train_mode`, not by `module.train()`.

LoRA is Hu et al., ICLR 2022, section 4.1: W + (alpha / rank) B A, with B = 0 at the start; `peft` does it.
Limits: dropout that a model calls as a function follows the training flag of the module that calls it.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedelta.core.errors import BadInput

_EVALUATES = "_fedelta_evaluates"  # attribute of the modules that stay in evaluation mode


class Tuning(Protocol):
    def apply(self, module: nn.Module, fresh: Sequence[str] = ()) -> nn.Module:
        """Set on `module`, in place, what is trained; use the module that is returned.

        `fresh` names the sub-modules whose weights are not pre-trained: they are trained, whatever the tuning is, since
        random weights that were frozen would not be in what is saved. Raises BadInput if nothing is left to train.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Full:
    """All that the model itself lets one train."""

    def apply(self, module: nn.Module, fresh: Sequence[str] = ()) -> nn.Module:
        return _checked(self, module)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The head alone, on the frozen features of the rest, which stays in evaluation mode (no dropout).

    `names` are the sub-modules of the head, by full name, with all that is inside them. By default it is everything
    outside the `base_model` of a Hugging Face model, and the last module that has parameters of any other.
    """

    names: tuple[str, ...] = ()

    def apply(self, module: nn.Module, fresh: Sequence[str] = ()) -> nn.Module:
        trained = (*(self.names or head_of(module)), *fresh)
        modules = dict(module.named_modules())
        for name in trained:
            if name not in modules:
                raise BadInput(f"{type(module).__name__} has no part {name!r}; {_listing(_with_parameters(module))}")
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(_within(name, trained))
        for name, part in modules.items():
            holds_trained = not name or any(_within(other, (name,)) for other in trained)
            setattr(part, _EVALUATES, not holds_trained and not _within(name, trained))
        return _checked(self, module)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRA:
    """Low-rank factors beside frozen weights.

    `targets` are names, or ends of names, of linear, convolution or embedding layers. By default they are what peft
    recommends for the type of model, otherwise every linear layer outside the head (and every convolution, for a module
    that is not of Hugging Face or has no linear layer). With `head`, the head is trained and saved as well.
    """

    rank: int = 8
    alpha: float = 16.0  # the product of the factors is scaled by alpha / rank
    dropout: float = 0.0  # of what the factors read
    targets: tuple[str, ...] = ()
    head: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadInput(f"LoRA.rank must be >= 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise BadInput(f"LoRA.alpha must be > 0 and finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"LoRA.dropout must be in [0, 1), got {self.dropout}")

    def apply(self, module: nn.Module, fresh: Sequence[str] = ()) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        kept = _outermost(module, (*(head_of(module) if self.head else ()), *fresh))
        places, pattern = self._places(module, kept)
        saved_by_peft = _is_hugging_face(module)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # declared an int, used as a factor
            lora_dropout=self.dropout,
            target_modules=pattern,
            # means every module whose name ends so: exact for the names of a Hugging Face head, not for a plain "4"
            modules_to_save=kept if saved_by_peft and kept else None,
        )
        _leave_fast_path(module)
        with _without_noise_of_peft():
            try:
                adapted = get_peft_model(module, config)
            except ValueError as error:
                raise BadInput(f"peft cannot put {self} on {places[0]!r} and the like: {error}") from error
        if not saved_by_peft:
            for name in kept:
                module.get_submodule(name).requires_grad_(True)
        return adapted

    def _places(self, module: nn.Module, kept: Sequence[str]) -> tuple[list[str], list[str] | str]:
        """The layers that get factors, by full name, and how to tell peft."""
        outside = {name: part for name, part in module.named_modules() if name and not _within(name, kept)}
        possible = {name: part for name, part in outside.items() if _adaptable(part)}
        ends: list[str] | str = list(self.targets)
        for target in self.targets:
            if not any(_ends(name, [target]) for name in possible):
                layers = sorted({name.rpartition(".")[2] for name in possible})
                raise BadInput(
                    f"LoRA target {target!r} is no layer of {type(module).__name__} that can have factors; "
                    f"{_listing(layers)}"
                )
        if not self.targets:
            ends = _recommended(module)
        places = [name for name in possible if _ends(name, ends)]
        if not places:
            places = _linear(module, possible)
            ends = sorted({name.rpartition(".")[2] for name in places})
        if not places:
            raise BadInput(f"{type(module).__name__} has no layer outside its head for LoRA; use Head() or Full()")
        says_the_same = [name for name in outside if _ends(name, ends)] == places
        return places, ends if says_the_same else _exactly(places)


def train_mode(module: nn.Module) -> None:
    """Put `module` into training mode, except what a tuning froze for good: features under `Head`, and statistics."""
    module.train()
    for part in module.modules():
        if getattr(part, _EVALUATES, False):
            part.eval()
    freeze_statistics(module)


def freeze_statistics(module: nn.Module) -> None:
    """Put the normalisation layers with running statistics that do not travel into evaluation mode.

    They are the layers whose own parameters are all frozen and, once anything of `module` is frozen, those without
    parameters.
    """
    all_trained = all(parameter.requires_grad for parameter in module.parameters())
    for part in module.modules():
        own = [parameter.requires_grad for parameter in part.parameters(recurse=False)]
        if _keeps_statistics(part) and not (any(own) if own else all_trained):
            part.eval()


def head_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the sub-modules that make the head. Raises BadInput for a model that has none."""
    prefix = getattr(module, "base_model_prefix", "")
    if not _is_hugging_face(module):
        owners = [name for name, part in module.named_modules() if name and list(part.parameters(recurse=False))]
        if owners:
            return (owners[-1],)
    elif prefix and isinstance(getattr(module, prefix, None), nn.Module):
        head = tuple(name for name, _ in module.named_children() if name != prefix)
        if head:
            return head
    raise BadInput(f"{type(module).__name__} has no head apart from its body; load a model that has one, or use Full()")


def _recommended(module: nn.Module) -> list[str] | str:
    """What peft recommends for this type of Hugging Face model: ends of names, or a regular expression."""
    from peft.utils import constants

    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ends = known.get(getattr(getattr(module, "config", None), "model_type", ""), [])
    return ends if isinstance(ends, str) else list(ends)


def _linear(module: nn.Module, possible: dict[str, nn.Module]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, part in possible.items() if isinstance(part, nn.Linear | Conv1D)]
    if linear and _is_hugging_face(module):
        return linear
    convolutions = [name for name, part in possible.items() if isinstance(part, nn.Conv2d) and part.groups == 1]
    return [name for name in possible if name in {*linear, *convolutions}]


def _adaptable(part: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)
    # nn.MultiheadAttention reads the weight of its output layer without calling the layer: factors would do nothing.
    return isinstance(part, kinds) and not isinstance(part, NonDynamicallyQuantizableLinear)


def _leave_fast_path(module: nn.Module) -> None:
    """Have `nn.TransformerEncoderLayer` call its layers in evaluation too: its fast path reads their bare weights."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
        elif isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False


def _keeps_statistics(part: nn.Module) -> bool:
    return isinstance(part, _NormBase) or hasattr(part, "running_mean") or hasattr(part, "running_var")


def _is_hugging_face(module: nn.Module) -> bool:
    return hasattr(module, "base_model_prefix")


def _outermost(module: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules among `names` that have parameters, less those inside another one."""
    distinct = [name for name in dict.fromkeys(names) if any(True for _ in module.get_submodule(name).parameters())]
    return [name for name in distinct if not _within(name, [other for other in distinct if other != name])]


def _within(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _ends(name: str, ends: Sequence[str] | str) -> bool:
    """Whether peft would take `name` for a target."""
    if isinstance(ends, str):
        return re.fullmatch(ends, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _exactly(names: Iterable[str]) -> str:
    return f"({'|'.join(re.escape(name) for name in names)})"


def _with_parameters(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if name and any(True for _ in part.parameters())]


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"it has {', '.join(names[:12])}{more}" if names else "it has none"


def _checked(tuning: Tuning, module: nn.Module) -> nn.Module:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise BadInput(f"{tuning} leaves nothing of {type(module).__name__} to train; use another tuning")
    return module


@contextmanager
def _without_noise_of_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft asks transformers for an attribute that transformers has renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # peft finds out by itself that GPT-2's layers store their weights transposed, and says so
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*", category=UserWarning)
        yield
