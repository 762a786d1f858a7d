"""LoRA-FAIR (Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
ICCV 2025, equation 8).

A and B are averaged as in FedIT, and the mean of B is corrected by D, such that (B + D) A is like the mean of products
W and D is small. Sites go on from B + D and A. The paper minimises S(W, (B + D) A) + lambda ||D|| for each layer by
gradient descent, and measures S by the cosine similarity; here it is 1 - cos + lambda ||D||_F. (That is from published
summaries of the paper; its own text was not at hand.)

The same minimum is found here without a matrix of the layer's size. There is no closed
form, but where the gradient is zero, D has the form (s W A^T - B A A^T) (A A^T + n I)^-1 with two numbers s and n: W is
compared at a scale s > 0, and n is the strength of a ridge. So only these two are searched for; in the basis of the
eigenvectors of A A^T the objective of a pair of them is a few sums over ranks. A descent ends it.

With similarity "frobenius", S is ||W - (B + D) A||_F^2 and the penalty lambda ||D||_F^2. That is not the paper's; it
has a closed form, s = 1 and n = lambda. Its error is never larger than FedIT's. A cosine does not see the size of a
product, so that the paper's objective promises only a cosine that is never smaller; with a small lambda its minimum may
be a product near 0, of which float32 holds less and less.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedelta.adapters.factors import check_new
from fedelta.aggregation.factors import Product, norm
from fedelta.aggregation.mean import Mean
from fedelta.aggregation.products import WHOLE, aggregated
from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Incoming, IncomingMany, loaded, value
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Sight, Site
from fedelta.learning.adapted import adapted
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training

Similarity = Literal["cosine", "frobenius"]
_STEPS = (1e-4, 1e-2, 0.1)  # away from no correction, in units of B
_NOISE = 1e-12  # of the largest eigenvalue of A A^T
_SIDE, _VALLEYS = 33, 4  # of a grid, and where finer ones begin
_GRIDS = 24  # each four times finer than the last: the first ten leave nothing that the objective would show


@dataclass(frozen=True, kw_only=True)
class CorrectedMean:
    """The mean of A, and the mean of B corrected towards the mean of products."""

    needs: ClassVar[Sight] = Sight.EACH

    penalty: float = 0.01  # lambda; the paper's is 0.01
    similarity: Similarity = "cosine"
    mean: Mean = WHOLE  # of all that is no factor

    def __post_init__(self) -> None:
        if not 0 < self.penalty < math.inf:
            raise BadInput(f"CorrectedMean.penalty must be a finite number > 0, got {self.penalty}")
        if self.similarity not in ("cosine", "frobenius"):
            raise BadInput(f"CorrectedMean.similarity must be 'cosine' or 'frobenius', got {self.similarity!r}")

    def refuse(self, update: Update) -> str | None:
        return self.mean.refuse(update)

    def __call__(self, updates: Iterable[Update], cohort: int) -> Update:
        return aggregated(updates, cohort, self._layer, self.mean)

    def _layer(self, shares: Sequence[float], products: Sequence[Product]) -> dict[str, Product]:
        weights = torch.tensor(shares, dtype=torch.float64)
        bs = torch.stack([b.double() for b, _ in products])
        as_ = torch.stack([a.double() for _, a in products])
        b, a = torch.tensordot(weights, bs, 1), torch.tensordot(weights, as_, 1)
        # (W - B A) A^T: not a difference of two large products, but sum_i w_i (B_i - B) (A_i - A) A^T
        missing = torch.einsum("u,udi,uij->dj", weights, bs - b, (as_ - a) @ a.T)
        values, vectors = torch.linalg.eigh(a @ a.T)
        seen = values > _NOISE * values.max()  # along the others A is nothing, and a correction would be rounding
        values, vectors = values[seen], vectors[:, seen]
        basis = _Basis(values, b @ vectors, missing @ vectors)
        scale, ridge = 1.0, self.penalty
        if self.similarity == "cosine":
            size = norm(zip(weights[:, None, None] * bs, as_, strict=True))
            scale, ridge = basis.most_alike(size, self.penalty)
            return {"": (b + basis.polished(basis.correction(scale, ridge), size, self.penalty) @ vectors.T, a)}
        return {"": (b + basis.correction(scale, ridge) @ vectors.T, a)}


@dataclass(frozen=True, kw_only=True)
class LoRAFAIR:
    """`task` has a model that is tuned by LoRA; all sites work at its rank. For the numbers see CorrectedMean."""

    kind: ClassVar[Kind] = "value"
    at_once: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    task: Task
    training: Training
    penalty: float = 0.01
    similarity: Similarity = "cosine"

    def __post_init__(self) -> None:
        _ = self.rule
        adapted(self.task.build(0))  # checked here, and not in the first round

    @property
    def rule(self) -> Rule:
        return CorrectedMean(penalty=self.penalty, similarity=self.similarity)

    def init(self, parameters: Parameters) -> Parameters:
        check_new("LoRA-FAIR", parameters)
        return parameters

    def parameters(self, state: Parameters) -> Parameters:
        return state

    def broadcast(self, state: Parameters, to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        return {"parameters": state.vector}, {}

    def layout(self, state: Parameters, party: PartyId) -> Layout:
        return state.layout

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        return loaded(self.task, incoming, examples)

    def local(self, incoming: Incoming, site: Site) -> Update:
        return value(self.task, self.training, incoming, site)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("LoRAFAIR trains its sites one by one")

    def step(self, state: Parameters, total: Update, round: int) -> Parameters:
        return total.values


@dataclass(frozen=True)
class _Basis:
    """A layer in the basis V of the eigenvectors of A A^T: `values` [rank], B V and (W - B A) A^T V, both [out, rank].

    The columns of a correction in this basis are independent of each other:
    ((s - 1) W A^T + (W - B A) A^T) V / (values + n), with W A^T V = B V values + (W - B A) A^T V.
    """

    values: Tensor
    b: Tensor
    missing: Tensor

    @property
    def target(self) -> Tensor:
        """W A^T V."""
        return self.b * self.values + self.missing

    def correction(self, scale: float, ridge: float) -> Tensor:
        """D V."""
        if ridge == math.inf:
            return torch.zeros_like(self.b)
        return ((scale - 1.0) * self.target + self.missing) / (self.values + ridge)

    def polished(self, found: Tensor, size: float, penalty: float) -> Tensor:
        """The D V to which a descent leads from `found`, or from a small step where that is 0; the lowest of all."""

        roots = self.values.sqrt()
        within = self.target / roots  # W in the space of A's rows; what lies outside of it is the same for all D
        share = float(within.norm()) / size if size > 0 else 0.0
        if not share > 0 or not float((self.b * roots).norm()) > 0:
            return found
        goal = within / within.norm()

        def objective(d: Tensor, penalty: float = penalty) -> Tensor:
            product = (self.b + d) * roots
            # 1 - cos but for a constant, without its cancellation: near cos = 1 a descent would see rounding only
            chord = goal - product / product.norm()
            value: Tensor = 0.5 * share * (chord**2).sum() + penalty * d.norm()
            return value

        zero = torch.zeros_like(found)
        with torch.enable_grad():
            d = zero.clone().requires_grad_()
            (slope,) = torch.autograd.grad(objective(d, 0.0), d)  # of the cosine: the norm's is the same all around
            away = -float(self.b.norm()) * slope / slope.norm().clamp(min=1e-300)
            moved = float(found.norm()) > _STEPS[0] * float(self.b.norm())
            starts = [found] if moved else [step * away for step in _STEPS]  # the norm has a kink at 0
            ends = [_descent(objective, start) for start in starts]
        ends = [one for one in (*ends, found, zero) if bool(one.isfinite().all())]
        return min(ends, key=lambda one: float(objective(one).nan_to_num(nan=math.inf)))

    def most_alike(self, size: float, penalty: float) -> tuple[float, float]:
        """The scale and the ridge with the least 1 - cos + penalty * ||D||; `size` is ||W||. A ridge of inf: D = 0."""
        b, t, m = self.b, self.target, self.missing
        bb, bt, bm, tt, tm, mm = ((x * y).sum(0) for x, y in ((b, b), (b, t), (b, m), (t, t), (t, m), (m, m)))

        def objective(log_scale: Tensor, log_ridge: Tensor) -> Tensor:
            shift, by = log_scale.expm1()[..., None], 1.0 / (self.values + log_ridge.exp()[..., None])
            change = (shift**2 * tt + 2.0 * shift * tm + mm) * by**2  # ||D||^2 by column
            inner = bt + (shift * tt + tm) * by  # <W A^T, B + D>
            product = (bb + 2.0 * (shift * bt + bm) * by + change) * self.values  # ||(B + D) A||^2
            cosine = inner.sum(-1) / (size * product.sum(-1).sqrt())
            return 1.0 - cosine + penalty * change.sum(-1).clamp(min=0.0).sqrt()

        squared = float((bb * self.values).sum())
        if not size > 0 or not squared > 0:  # no direction to compare with, or none to compare
            return 1.0, math.inf
        nothing = torch.full((1,), math.inf, dtype=torch.float64)
        unchanged = float(objective(torch.zeros_like(nothing), nothing))
        scale, ridge, least = _lowest(objective, math.log(float(self.values.max())))
        return (math.exp(scale), math.exp(ridge)) if least < unchanged else (1.0, math.inf)


def _descent(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    d = start.clone().requires_grad_()
    descent = torch.optim.LBFGS([d], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        descent.zero_grad()
        value = objective(d)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    descent.step(closure)  # type: ignore[no-untyped-call]
    return d.detach()


def _lowest(objective: Callable[[Tensor, Tensor], Tensor], level: float) -> tuple[float, float, float]:
    """Where `objective` is least, and how low.

    A grid over five decades of scales and thirty of ridges, around 1 and exp(`level`), and from each of its lowest
    valleys grids around the best of the last, finer if that was inside.
    """
    steps = torch.linspace(-1.0, 1.0, _SIDE, dtype=torch.float64)
    width_x, width_y = math.log(10.0) * 2.5, math.log(10.0) * 15.0
    xs, ys = width_x * steps, level + width_y * steps
    found = objective(xs[:, None], ys[None, :]).nan_to_num(nan=math.inf)
    lower = -nn.functional.max_pool2d(-found[None], 3, stride=1, padding=1)[0]
    valleys = torch.where(found <= lower, found, math.inf).flatten().argsort()[:_VALLEYS]
    starts = [(float(xs[cell // _SIDE]), float(ys[cell % _SIDE])) for cell in valleys.tolist()]
    return min((_descended(objective, start, (width_x, width_y), steps) for start in starts), key=lambda one: one[2])


def _descended(
    objective: Callable[[Tensor, Tensor], Tensor],
    start: tuple[float, float],
    widths: tuple[float, float],
    steps: Tensor,
) -> tuple[float, float, float]:
    (x, y), (width_x, width_y), least = start, (widths[0] / 8.0, widths[1] / 8.0), math.inf
    for _ in range(_GRIDS):
        xs, ys = x + width_x * steps, y + width_y * steps
        found = objective(xs[:, None], ys[None, :]).nan_to_num(nan=math.inf)
        row, column = divmod(int(found.argmin()), len(ys))
        x, y, least = float(xs[row]), float(ys[column]), float(found[row, column])
        if 0 < row < len(xs) - 1 and 0 < column < len(ys) - 1:
            width_x, width_y = width_x / 4.0, width_y / 4.0
    return x, y, least
