"""What of a pre-trained model is trained and shared: everything, or tensors that it has already.

A tuning sets `requires_grad`; what has it travels (see `fedelta.core.parameters`). All else stays at every party as it
was pre-trained. That includes the running statistics of frozen normalisation layers, so a module is put into training
mode by `train_mode`, not by `module.train()`. Tunings that add tensors are in `lora`, `prompts` and `bottleneck`.

`BitFit` is Ben Zaken et al., ACL 2022. `HeadAndNorms` is what Frankle et al., ICLR 2021, find for BatchNorm and
Zhao et al., ICLR 2024, for LayerNorm.
Limits: dropout that a model calls as a function follows the training flag of the module that calls it. The head of a
language model is pre-trained and as wide as the vocabulary: only `Full`, and `Head` where it is not tied, train it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fedelta.core.errors import BadInput
from fedelta.learning.structure import (
    blocks_of,
    head_of,
    is_language_model,
    is_normalisation,
    listing,
    new_head_of,
    outermost,
    within,
)

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
                raise BadInput(f"{type(module).__name__} has no part {name!r}; {listing(_with_parameters(module))}")
        _train_on_features(module, trained)
        return _checked(self, module)


@dataclass(frozen=True, kw_only=True, slots=True)
class LastLayers:
    """The last `count` blocks, what follows them (a last normalisation, a pooler) and the head.

    Blocks are the elements of the model's lists of modules: layers of a transformer, stages of a ResNet. What is before
    them is frozen and stays in evaluation mode, as with `Head`.
    """

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadInput(f"LastLayers.count must be >= 1, got {self.count}; use Head() for the head alone")

    def apply(self, module: nn.Module, fresh: Sequence[str] = ()) -> nn.Module:
        head, output = new_head_of(module), _output_layer(module)
        blocks = blocks_of(module, head or output)
        if len(blocks) < self.count:
            raise BadInput(
                f"{self} asks for more blocks than the {len(blocks)} that {type(module).__name__} has; lower the count"
            )
        order = [name for name, part in module.named_modules() if any(True for _ in part.parameters())]
        follow = [
            name
            for name in order[order.index(blocks[-self.count]) :]
            if not _holds(name, [*blocks, *output]) and not within(name, output)
        ]
        _train_on_features(module, [*follow, *head, *fresh])
        return _checked(self, module)


@dataclass(frozen=True, kw_only=True, slots=True)
class BitFit:
    """All biases and the head. A BatchNorm whose bias is trained goes on with its statistics, which travel with it."""

    def apply(self, module: nn.Module, fresh: Sequence[str] = ()) -> nn.Module:
        return _train_scattered(self, module, fresh, "biases", lambda _, name: name == "bias" or name.endswith("_bias"))


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadAndNorms:
    """The head and all normalisation layers. The statistics of BatchNorm are updated in training, and travel."""

    def apply(self, module: nn.Module, fresh: Sequence[str] = ()) -> nn.Module:
        return _train_scattered(
            self, module, fresh, "trainable normalisation layers", lambda owner, _: is_normalisation(owner)
        )


def evaluates(part: nn.Module) -> bool:
    """Whether a tuning keeps `part` in evaluation mode."""
    return bool(getattr(part, _EVALUATES, False))


def train_mode(module: nn.Module) -> None:
    """Put `module` into training mode, except what a tuning froze for good: features under `Head`, and statistics."""
    module.train()
    for part in module.modules():
        if evaluates(part):
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


def _train_on_features(module: nn.Module, trained: Sequence[str]) -> None:
    """Train the parts named, and keep all others in evaluation mode."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(within(name, trained))
    for name, part in module.named_modules():
        setattr(part, _EVALUATES, bool(name) and not _holds(name, trained) and not within(name, trained))


def _train_scattered(
    tuning: Tuning, module: nn.Module, fresh: Sequence[str], what: str, chosen: Callable[[nn.Module, str], bool]
) -> nn.Module:
    """Train the head, and everywhere else the parameters that are `chosen` by their owner and their name in it."""
    kept = outermost(module, (*new_head_of(module), *fresh))
    found = False
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            in_head = within(prefix, kept)
            parameter.requires_grad_(in_head or chosen(owner, name))
            found = found or (not in_head and parameter.requires_grad)
    if not found:
        raise BadInput(f"{type(module).__name__} has no {what} outside its head for {tuning}; use LoRA() or Head()")
    return module


def _output_layer(module: nn.Module) -> tuple[str, ...]:
    """The layer of a language model whose outputs are over the vocabulary."""
    if not is_language_model(module):
        return ()
    output = module.get_output_embeddings()  # type: ignore[operator]
    return tuple(name for name, part in module.named_modules() if part is output)


def _keeps_statistics(part: nn.Module) -> bool:
    return isinstance(part, _NormBase) or hasattr(part, "running_mean") or hasattr(part, "running_var")


def _holds(name: str, parts: Sequence[str]) -> bool:
    """Whether one of `parts` is inside the part `name`."""
    return any(part != name and within(part, (name,)) for part in parts)


def _with_parameters(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if name and any(True for _ in part.parameters())]


def _checked(tuning: Tuning, module: nn.Module) -> nn.Module:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise BadInput(f"{tuning} leaves nothing of {type(module).__name__} to train; use another tuning")
    return module
