"""Sums of low-rank products against dense matrices in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedelta.aggregation.factors import Meter, Product, at_rank, half, norm, pairs, spectrum, stacked
from fedelta.core.messages import Kind, Update
from fedelta.core.parameters import Layout, Parameters
from fedelta.learning.lora import LoRA


class Several(nn.Module):
    """A layer of each type that peft puts factors beside."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embedding, self.linear = nn.Embedding(7, 5), nn.Linear(5, 4)
        self.filters, self.transposed = nn.Conv2d(2, 3, (3, 2)), Conv1D(6, 5)
        self.last = nn.Linear(4, 2)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_pairs_are_found_under_the_names_of_peft() -> None:
    targets = ("embedding", "linear", "filters", "transposed")
    layout = Parameters.of(LoRA(rank=2, targets=targets, head=False).apply(Several())).layout
    found = {pair.layer.removeprefix("base_model.model."): pair for pair in pairs(layout)}
    assert set(found) == set(targets)
    assert {name for pair in found.values() for name in (pair.a, pair.b)} == set(layout.by_name)
    parameters = Parameters.zeros(layout)
    shapes = {name: tuple(tuple(side.shape) for side in pair.of(parameters)) for name, pair in found.items()}
    assert shapes == {
        "embedding": ((5, 2), (2, 7)),
        "linear": ((4, 2), (2, 5)),
        "filters": ((3, 2), (2, 2 * 3 * 2)),
        "transposed": ((6, 2), (2, 5)),
    }
    for pair in found.values():
        assert (half(pair.a), half(pair.b)) == ("A", "B")
    assert half("base_model.model.linear.weight") is None
    smaller = at_rank(layout, 1)
    assert all(pair.of(Parameters.zeros(smaller))[1].shape[0] == 1 for pair in pairs(smaller))
    assert at_rank(layout, 3) == layout


def test_a_factor_alone_is_no_pair() -> None:
    a, b = "layer.lora_A.default.weight", "layer.lora_B.default.weight"
    other = "layer.lora_B.residual.weight"
    assert pairs(Layout.of({a: torch.zeros(1, 2), other: torch.zeros(2, 1), "bias": torch.zeros(2)})) == ()
    assert [pair.b for pair in pairs(Layout.of({b: torch.zeros(2, 1), a: torch.zeros(1, 2)}))] == [b]


@st.composite
def products(draw: st.DrawFn) -> list[Product]:
    """Up to five of one layer, of any ranks, also more than the sides of the layer."""
    out, inside = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ranks = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    return [(torch.randn(out, rank, generator=g), torch.randn(rank, inside, generator=g)) for rank in ranks]


def dense(given: list[Product]) -> Tensor:
    return sum((b.double() @ a.double() for b, a in given), torch.zeros((), dtype=torch.float64))


@given(given=products())
def test_stacks_and_norms_are_those_of_the_dense_sum(given: list[Product]) -> None:
    b, a = stacked(given)
    assert torch.allclose(b.double() @ a.double(), dense(given), atol=1e-10)
    assert math.isclose(norm(given), float(dense(given).norm()), rel_tol=1e-10)


@given(given=products())
def test_the_norm_of_what_cancels_is_not_noise(given: list[Product]) -> None:
    """A millionth of a product is left: float32 would have none of it."""
    exact = [(b.double(), a.double()) for b, a in given]
    left = [*exact, *((-(1 - 1e-6) * b, a) for b, a in exact)]
    terms = sum(float((b @ a).norm()) for b, a in exact)  # which may cancel by themselves
    assert math.isclose(norm(left), 1e-6 * float(dense(given).norm()), rel_tol=1e-6, abs_tol=1e-13 * terms)


@given(given=products(), rank=st.integers(1, 12))
def test_spectra_are_those_of_the_dense_sum(given: list[Product], rank: int) -> None:
    matrix = dense(given)
    u, s, vh = spectrum(given, rank)
    count = min(rank, sum(len(a) for _, a in given), *matrix.shape)
    dense_u, dense_s, dense_vh = torch.linalg.svd(matrix, full_matrices=False)
    assert s.shape == (count,)
    assert torch.allclose(s, dense_s[:count], atol=1e-9)
    best = (dense_u[:, :count] * dense_s[:count]) @ dense_vh[:count]
    assert torch.allclose((u * s) @ vh, best, atol=1e-7)
    assert torch.allclose(u.T @ u, torch.eye(count, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(vh @ vh.T, torch.eye(count, dtype=torch.float64), atol=1e-9)


# The meter.

LAYERS = ("first", "second")


def names(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def random(shapes: dict[str, tuple[int, ...]], g: torch.Generator) -> Parameters:
    layout = Layout.of({name: torch.empty(shape) for name, shape in shapes.items()})
    return Parameters(layout, torch.randn(layout.size, generator=g))


def shapes(rank: int, halves: str, sides: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"bias": (2,)}
    for layer, (out, inside) in sides.items():
        a, b = names(layer)
        found |= ({a: (rank, inside)} if "A" in halves else {}) | ({b: (out, rank)} if "B" in halves else {})
    return found


def whole(update: Update, before: Parameters, layer: str) -> Tensor:
    """The product after an update, dense."""
    sides = []
    for name in reversed(names(layer)):
        own = update.values[name].double() if name in update.values else None
        start = before[name].double() if own is None or update.kind == "difference" else torch.zeros(())
        sides.append(start if own is None else start + own)
    return sides[0] @ sides[1]


def check(updates: list[Update], total: Update, before: Parameters) -> None:
    """The meter against dense matrices; a layer whose mean is 0 has no error. Shares are of what is in float32."""
    meter = Meter(before)
    assert list(meter.watch(updates)) == updates
    overall, by_layer = meter.errors(total)
    weight = math.fsum(update.weight for update in updates)
    squares: dict[str, tuple[float, float]] = {}
    for layer in LAYERS:
        exact = sum((u.weight / weight * whole(u, before, layer) for u in updates), torch.zeros(()))
        if exact.norm() > 0:
            squares[layer] = (float((exact - whole(total, before, layer)).norm() ** 2), float(exact.norm() ** 2))
    assert set(by_layer) == set(squares)
    for layer, (error, size) in squares.items():
        assert math.isclose(by_layer[layer], math.sqrt(error / size), rel_tol=1e-6, abs_tol=1e-6)
    if squares:
        error, size = (sum(column) for column in zip(*squares.values(), strict=True))
        assert overall is not None
        assert math.isclose(overall, math.sqrt(error / size), rel_tol=1e-6, abs_tol=1e-6)
    else:
        assert overall is None


@settings(max_examples=60)
@given(
    kind=st.sampled_from(("difference", "value")),
    halves=st.sampled_from(("AB", "A", "B")),
    sites=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    given=st.data(),
)
def test_the_meter_reads_what_dense_matrices_say(
    kind: Kind, halves: str, sites: int, seed: int, given: st.DataObject
) -> None:
    g = torch.Generator().manual_seed(seed)
    sides = {layer: (given.draw(st.integers(1, 6)), given.draw(st.integers(1, 6))) for layer in LAYERS}
    rank = given.draw(st.integers(1, 4))
    before = random(shapes(rank, "AB", sides), g)
    weights = given.draw(st.lists(st.floats(0.1, 1000), min_size=sites, max_size=sites))
    mixed = kind == "value" and halves == "AB"  # only whole values can be of other ranks
    ranks = [given.draw(st.integers(1, 4)) if mixed else rank for _ in range(sites)]
    updates = [
        Update(values=random(shapes(own, halves, sides), g), kind=kind, weight=weight)
        for own, weight in zip(ranks, weights, strict=True)
    ]
    check(updates, Update(values=random(shapes(rank, halves, sides), g), kind=kind), before)


def test_many_sites_are_summed_in_no_more_than_the_layer() -> None:
    g = torch.Generator().manual_seed(0)
    sides = {"first": (3, 5), "second": (6, 2)}
    before = random(shapes(2, "AB", sides), g)
    updates = [Update(values=random(shapes(2, "AB", sides), g), weight=1.0 + site % 7) for site in range(60)]
    check(updates, Update(values=random(shapes(2, "AB", sides), g)), before)
    meter = Meter(before)
    for _ in meter.watch(updates):
        kept = [sum(b.numel() + a.numel() for b, a in own.products) for own in meter._sums.values()]
        assert max(kept) <= 3 * 6 * (6 + 6)


def test_nothing_learned_has_no_error() -> None:
    g = torch.Generator().manual_seed(0)
    sides = {"first": (3, 5), "second": (6, 2)}
    before = random(shapes(2, "AB", sides), g)
    for layer in LAYERS:
        before[names(layer)[1]].zero_()
    nothing = Update(values=Parameters.zeros(before.layout))
    check([nothing, nothing], nothing, before)
    only_bias = Update(values=random({"bias": (2,)}, g))
    assert list((meter := Meter(before)).watch([only_bias])) == [only_bias]
    assert meter.errors(only_bias) == (None, {})
