"""Small tensors beside the frozen layers of a pre-trained model, which `peft` puts there: LoRA, rsLoRA and (IA)^3.

LoRA is Hu et al., ICLR 2022, section 4.1: W + (alpha / rank) B A, with B = 0 at the start. rsLoRA (Kalajdzievski, 2023)
divides alpha by sqrt(rank) instead, so that the size of the update does not depend on the rank. (IA)^3 is Liu et al.,
NeurIPS 2022, section 3.3: keys, values and the inner activations of the feed-forward part are multiplied by learned
vectors, which are 1 at the start. All of them start at the model as it was pre-trained.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedelta.core.errors import BadInput
from fedelta.learning.structure import (
    is_hugging_face,
    layers_of,
    leave_fast_path,
    listing,
    new_head_of,
    outermost,
    within,
)

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRA:
    """Low-rank factors beside frozen weights.

    `targets` are names, or ends of names, of linear, convolution or embedding layers. By default they are what peft
    recommends for the type of model, otherwise every linear layer outside the head (and every convolution, for a module
    that is not of Hugging Face or has no linear layer). With `head`, the head is trained and saved as well, unless it
    is that of a language model, which is pre-trained.
    """

    rank: int = 8
    alpha: float = 16.0  # the product of the factors is scaled by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank) instead
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
        from peft import LoraConfig

        kept = outermost(module, (*(new_head_of(module) if self.head else ()), *fresh))
        places, pattern = self._places(module, kept)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # declared an int, used as a factor
            use_rslora=self.rslora,
            lora_dropout=self.dropout,
            target_modules=pattern,
            modules_to_save=saved_by_peft(module, kept),
        )
        return with_peft(module, config, kept, f"{self} on {places[0]!r} and the like")

    def _places(self, module: nn.Module, kept: Sequence[str]) -> tuple[list[str], list[str] | str]:
        """The layers that get factors, by full name, and how to tell peft."""
        outside = {name: part for name, part in module.named_modules() if name and not within(name, kept)}
        possible = {name: part for name, part in outside.items() if _adaptable(part)}
        ends: list[str] | str = list(self.targets)
        _check_targets("LoRA", module, self.targets, possible)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class IA3:
    """Learned vectors that scale keys, values and inner activations: by far the fewest numbers of all tunings.

    `targets` are names, or ends of names, of linear layers whose outputs are scaled, and `forward` of those whose
    inputs are. By default the model's layers are looked at: its key and value layers, and the last linear layer of each
    feed-forward part; where keys and values are computed in one with the queries (GPT-2), the outputs and inputs that
    peft recommends. With `head`, the head is trained and saved as well, unless it is that of a language model.

    Limits: weight decay draws the vectors towards 0, not 1; with AdamW set `weight_decay` to 0.
    """

    targets: tuple[str, ...] = ()
    forward: tuple[str, ...] = ()
    head: bool = True

    def apply(self, module: nn.Module, fresh: Sequence[str] = ()) -> nn.Module:
        from peft import IA3Config

        kept = outermost(module, (*(new_head_of(module) if self.head else ()), *fresh))
        outputs, inputs = self._places(module, kept)
        config = IA3Config(
            target_modules=_exactly([*outputs, *inputs]),
            feedforward_modules=_exactly(inputs),
            modules_to_save=saved_by_peft(module, kept),
        )
        return with_peft(module, config, kept, f"{self} on {[*outputs, *inputs][0]!r} and the like")

    def _places(self, module: nn.Module, kept: Sequence[str]) -> tuple[list[str], list[str]]:
        """The layers whose outputs are scaled, and those whose inputs are, by full name."""
        possible = {
            name: part for name, part in module.named_modules() if not within(name, kept) and _is_linear(part) and name
        }
        _check_targets("IA3", module, (*self.targets, *self.forward), possible)
        if self.targets or self.forward:
            inputs = [name for name in possible if _ends(name, self.forward)]
            return [name for name in possible if _ends(name, self.targets) and name not in inputs], inputs
        layers = layers_of(module, kept)
        outputs = [name for layer in layers for name in layer.keys_and_values()]
        if outputs:
            return outputs, [layer.forward[-1] for layer in layers]
        from peft.utils import constants

        model_type = getattr(getattr(module, "config", None), "model_type", "")
        targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(model_type, [])
        forward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type, [])
        inputs = [name for name in possible if _ends(name, forward)]
        outputs = [name for name in possible if _ends(name, targets) and name not in inputs]
        if not outputs:
            raise BadInput(
                f"{type(module).__name__} has no key and value layers by these names; name layers with targets "
                f"and forward: {listing(sorted({name.rpartition('.')[2] for name in possible}))}"
            )
        return outputs, inputs


def with_peft(module: nn.Module, config: "PeftConfig", kept: Sequence[str], what: str) -> nn.Module:
    """`module` with what `config` puts into it; what is `kept` is trained. Raises BadInput if peft cannot do it."""
    from peft import get_peft_model

    leave_fast_path(module)
    with without_noise_of_peft():
        try:
            adapted: nn.Module = get_peft_model(module, config)
        except ValueError as error:
            raise BadInput(f"peft cannot put {what}: {error}") from error
    if not is_hugging_face(module):
        for name in kept:
            module.get_submodule(name).requires_grad_(True)
    return adapted


def saved_by_peft(module: nn.Module, kept: Sequence[str]) -> list[str] | None:
    """What peft shall train and save besides its own.

    It means every module whose name ends so: exact for the names of a Hugging Face model, not for a plain "4".
    """
    return list(kept) if kept and is_hugging_face(module) else None


@contextmanager
def without_noise_of_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft asks transformers for an attribute that transformers has renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # peft finds out by itself that GPT-2's layers store their weights transposed, and says so
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*", category=UserWarning)
        yield


def _recommended(module: nn.Module) -> list[str] | str:
    """What peft recommends for this type of Hugging Face model: ends of names, or a regular expression."""
    from peft.utils import constants

    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ends = known.get(getattr(getattr(module, "config", None), "model_type", ""), [])
    return ends if isinstance(ends, str) else list(ends)


def _check_targets(tuning: str, module: nn.Module, targets: Sequence[str], possible: Iterable[str]) -> None:
    for target in targets:
        if not any(_ends(name, [target]) for name in possible):
            layers = sorted({name.rpartition(".")[2] for name in possible})
            what = "factors" if tuning == "LoRA" else "its vectors"
            raise BadInput(
                f"{tuning} target {target!r} is no layer of {type(module).__name__} that can have {what}; "
                f"{listing(layers)}"
            )


def _linear(module: nn.Module, possible: dict[str, nn.Module]) -> list[str]:
    linear = [name for name, part in possible.items() if _is_linear(part)]
    if linear and is_hugging_face(module):
        return linear
    convolutions = [name for name, part in possible.items() if isinstance(part, nn.Conv2d) and part.groups == 1]
    return [name for name in possible if name in {*linear, *convolutions}]


def _adaptable(part: nn.Module) -> bool:
    kinds = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return isinstance(part, kinds) or _is_linear(part)


def _is_linear(part: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # nn.MultiheadAttention reads the weight of its output layer without calling the layer: factors would do nothing.
    return isinstance(part, nn.Linear | Conv1D) and not isinstance(part, NonDynamicallyQuantizableLinear)


def _ends(name: str, ends: Sequence[str] | str) -> bool:
    """Whether peft would take `name` for a target."""
    if isinstance(ends, str):
        return re.fullmatch(ends, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _exactly(names: Iterable[str]) -> str:
    return f"({'|'.join(re.escape(name) for name in names)})"
