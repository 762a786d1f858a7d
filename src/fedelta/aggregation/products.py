"""What rules on low-rank factors have in common: products layer by layer, everything else by the weighted mean."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedelta.aggregation.factors import Pair, Product, half, pairs
from fedelta.aggregation.mean import Mean
from fedelta.core.errors import TooFewSites
from fedelta.core.messages import Update
from fedelta.core.parameters import Entry, Layout, Parameters

# The shares of the sites in all weights, and their products B_i A_i of one layer -> adapter's name -> product.
# "" stands for the names that the factors have.
WHOLE = Mean(bound=2.0**16)  # of whole weights: those of a head in closed form may be some hundreds
Layer = Callable[[Sequence[float], Sequence[Product]], Mapping[str, Product]]


def aggregated(updates: Iterable[Update], cohort: int, layer: Layer, mean: Mean) -> Update:
    """One update from those of sites whose factors are of any rank: by `layer`, and all else by `mean`.

    The updates are values, not differences, and have the same layout but for the ranks. Factors under another
    adapter's name are added behind their layer's. Raises TooFewSites as `mean` does.
    """
    taken = list(updates)
    if not taken:
        raise TooFewSites("no update arrived, so there is nothing to aggregate; look at why the sites are absent")
    layout = taken[0].values.layout
    rest = layout.only(lambda name: half(name) is None)
    total = mean((replace(update, values=update.values.part(rest)) for update in taken), cohort)
    weights = [update.weight for update in taken]
    shares = [weight / math.fsum(weights) for weight in weights]
    tensors: dict[str, Tensor] = dict(total.values)
    for pair in pairs(layout):
        for adapter, product in layer(shares, [pair.of(update.values) for update in taken]).items():
            tensors |= _named(pair, adapter, product, layout.by_name)
    values = _in_order(tensors, layout)
    return replace(total, values=values, kind="value")


def renamed(name: str, adapter: str) -> str:
    """The name that the factor `name` has under another adapter."""
    head, marker, tail = name.rpartition(".lora_")
    kind, _, rest = tail.partition(".")
    return f"{head}{marker}{kind}.{adapter}{'.weight' if rest.endswith('.weight') else ''}"


def _named(pair: Pair, adapter: str, product: Product, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    b, a = product
    shape_a, shape_b = entries[pair.a].shape, entries[pair.b].shape
    shaped = {pair.b: b.reshape(shape_b[0], -1, *shape_b[2:]), pair.a: a.reshape(-1, *shape_a[1:])}
    return {renamed(name, adapter) if adapter else name: tensor for name, tensor in shaped.items()}


def _in_order(tensors: Mapping[str, Tensor], layout: Layout) -> Parameters:
    """The tensors as float32 parameters: first what `layout` trains, new factors among it, then its buffers."""
    buffers = [entry.name for entry in layout.entries if entry.offset >= layout.trained]
    order = [name for name in layout.by_name if name not in buffers]
    order += [name for name in tensors if name not in layout.by_name]
    found = Layout.of(
        {name: torch.empty(tensors[name].shape, dtype=_dtype(layout, name)) for name in order},
        {name: torch.empty(tensors[name].shape, dtype=_dtype(layout, name)) for name in buffers},
    )
    values = Parameters.zeros(found)
    for name, tensor in tensors.items():
        values[name].copy_(tensor)
    return values


def _dtype(layout: Layout, name: str) -> torch.dtype:
    return layout.by_name[name].dtype if name in layout.by_name else torch.float32
