"""Text as tensors: tokenised once, padded to one width, and cut to what a batch needs.

`encode` pads all rows of a site to its longest row, so that a site's data is a few plain tensors; `trim` takes the
padding away again that no row of a batch needs, which is what padding batch by batch ("dynamic padding") would give.

Limits: no `token_type_ids` (models take them as zeros where they are not given); one text a row, no pairs. A model with
absolute positions under a tokenizer that pads on the left sees positions that depend on the width of the batch, with
dynamic padding as with `trim`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    texts: Sequence[str],
    targets: Tensor | Sequence[int] | Sequence[float],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> Examples:
    """Tokenise `texts`; inputs `input_ids` and `attention_mask`, int64 [n, longest row], at most `max_length` wide.

    A longer text is truncated; padding goes where the tokenizer puts it. Raises BadInput for no texts, a text that is
    not a string or has no tokens, targets of another length, or a `max_length` that the tokenizer cannot serve.
    """
    if len(texts) != len(targets):
        raise BadInput(f"{len(texts)} texts have {len(targets)} targets; give one target a text")
    if not len(texts):
        raise BadInput("there is no text to encode; give at least one row")
    _check_max_length(max_length, tokenizer)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadInput(f"the text of row {row} is {text!r}, not a string; drop or fill that row")
    if tokenizer.pad_token is None:
        raise BadInput("this tokenizer has no padding token; set tokenizer.pad_token, to its eos_token for instance")
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        padding=True,
        return_attention_mask=True,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    inputs = {name: encoded[name].to(torch.int64) for name in ("input_ids", "attention_mask")}
    empty = inputs["attention_mask"].sum(dim=1) == 0
    if empty.any():
        row = int(empty.nonzero()[0])
        raise BadInput(f"the text of row {row}, {texts[row]!r}, has no tokens; drop that row")
    return Examples(inputs, torch.as_tensor(targets))


def trim(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Drop the outer columns that are padding in every row, on the right and on the left.

    Every tensor of shape [n, width] or [n, width, k] is cut like `attention_mask` [n, width]. Inputs without such a
    mask, and a batch that is all padding, come back as they are. The results are views.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return inputs
    used = (mask != 0).any(dim=0).nonzero()
    if not len(used):
        return inputs
    columns = slice(int(used[0]), int(used[-1]) + 1)
    return {
        name: tensor[:, columns] if tensor.ndim in (2, 3) and tensor.shape[:2] == mask.shape else tensor
        for name, tensor in inputs.items()
    }


def _check_max_length(max_length: int, tokenizer: "PreTrainedTokenizerBase") -> None:
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length <= special:
        raise BadInput(
            f"max_length must be > {special}, got {max_length}: this tokenizer adds {special} special tokens to a text"
        )
    if max_length > tokenizer.model_max_length:
        raise BadInput(
            f"max_length must be <= {tokenizer.model_max_length}, which is all that this tokenizer's model reads, "
            f"got {max_length}"
        )
