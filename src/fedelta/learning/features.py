"""Features: what a model computes of its inputs before some last parts of it.

They are read off by having those parts pass on what they get: whatever the model does with their outputs (choosing
those of the last token, say) it then does with the features. That this is sound is checked on every batch that is used:
the parts, applied to the features, must give the model's outputs.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.learning.plan import Plan
from fedelta.learning.training import autocast, by_length, predict, prepared

_BATCH, _BATCH_BYTES = 256, 2**24  # rows computed at once: no more than this, and than have so many bytes of inputs
_PROBED = 8  # rows of a batch on which features are checked
# Of the largest output; a model that the features do not explain is off by its whole outputs.
_TOLERANCE, _TOLERANCE_BF16 = 1e-3, 3e-2


class NoFeatures(BadInput):
    """The outputs of a model are not those of its last parts on one tensor per row."""


def head_layer(module: nn.Module, classes: int) -> str:
    """The name of the last linear layer that is trained and has `classes` outputs. Raises BadInput for none."""
    names: list[str] = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == classes and part.weight.requires_grad
    ]
    if not names:
        raise BadInput(
            f"{type(module).__name__} has no linear layer with {classes} outputs that is trained, so that its head "
            "cannot be solved in closed form; leave `start` out"
        )
    return names[-1]


@torch.no_grad()
def features(
    module: nn.Module, parts: Sequence[str], examples: Examples, plan: Plan, out: Tensor, *, checked: bool = True
) -> Tensor:
    """The features of every row, written into `out` [n, ...]; `module` is put into evaluation mode.

    `parts` are the names of the last parts, in the order in which they are called. Raises NoFeatures if the model's
    outputs are not what these parts make of the features, or if those of a row depend on the rows beside it: on the
    shortest and the longest row, which are also read alone. Not where they need not be `checked`.
    """
    module.eval()
    width = sum(tensor[0].numel() * tensor.element_size() for tensor in examples.inputs.values()) if len(out) else 0
    batch = max(_PROBED, min(_BATCH, _BATCH_BYTES // max(1, width)))
    order = by_length(examples)
    for rows in torch.split(order, batch):
        out[rows] = _of_batch(module, parts, examples[rows], plan, checked).to(out.dtype).cpu()
    for row in (order[:1], order[-1:]) if checked and len(order) > 1 else ():
        alone = _of_batch(module, parts, examples[row], plan).to(out.dtype).cpu()
        if not _close(alone, out[row], _TOLERANCE_BF16 if plan.bf16 else _TOLERANCE):
            raise NoFeatures(f"what {type(module).__name__} makes of a row depends on how far others are padded")
    return out


@torch.no_grad()
def feature_shape(module: nn.Module, parts: Sequence[str], examples: Examples, plan: Plan) -> torch.Size:
    """The shape of the features of one row, found on the first rows. Raises NoFeatures as `features` does."""
    module.eval()
    return _of_batch(module, parts, examples[:_PROBED], plan).shape[1:]


def check_features(module: nn.Module, parts: Sequence[str], examples: Examples, plan: Plan) -> None:
    """Raise NoFeatures as `features` does, on the shortest and the longest row and some between them."""
    order = by_length(examples)
    some = examples[order[torch.linspace(0, len(order) - 1, min(_PROBED, len(order))).long()]]
    features(module, parts, some, plan, torch.empty(len(some), *feature_shape(module, parts, some, plan)))


def _of_batch(module: nn.Module, parts: Sequence[str], rows: Examples, plan: Plan, checked: bool = True) -> Tensor:
    inputs = prepared(rows, plan).inputs
    last = [module.get_submodule(name) for name in parts]
    tolerance = _TOLERANCE_BF16 if plan.bf16 else _TOLERANCE
    with autocast(plan):
        if not checked:
            return _passed_on(module, last, inputs)
        outputs = predict(module, {name: tensor[:_PROBED] for name, tensor in inputs.items()})
        try:
            values = _passed_on(module, last, inputs)
            explained = values[:_PROBED]
            for part in last:
                explained = part(explained)
            same = _close(explained, outputs, tolerance)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
            same = False  # parts that need, or give, more than a tensor
    if not same or len(values) != len(rows):
        raise NoFeatures(
            f"the outputs of {type(module).__name__} are not what its {' and '.join(map(repr, parts))} makes of one "
            "tensor of features a row"
        )
    return values


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether they are alike in all rows that are finite: the others tell nothing of how a model computes."""
    if found.shape != expected.shape:
        return False
    told = expected.reshape(len(expected), -1).isfinite().all(dim=1)
    found, expected = found[told].float(), expected[told].float()
    return not len(expected) or torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


def _passed_on(module: nn.Module, parts: Sequence[nn.Module], inputs: Mapping[str, Tensor]) -> Tensor:
    """The outputs of `module` where `parts` give what they get."""
    with ExitStack() as hooks:
        for part in parts:
            hook = part.register_forward_hook(lambda _, given, __: given[0])
            hooks.callback(hook.remove)
        return predict(module, inputs)
