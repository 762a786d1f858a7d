"""Adding real numbers as integers: every product weight × value is rounded once to a multiple of a power of two.

Integer addition is associative, so sums do not depend on order or grouping, and they can be taken modulo a power of
two, where masks cancel. The power of two is fixed before anything is added, from declared bounds and the most that is
added, so that no sum can wrap around.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedelta.core.errors import BadInput

_LIMITS = (2.0**-100, 2.0**100)  # of both bounds, so that no scale overflows float64
_CHUNK = 2**18  # elements: buffers of 2 MB, which stay in the last cache
_SMALL = 2.0**51
_SHIFT = 1.5 * 2.0**52
_SHIFT_BITS = 0x4338_0000_0000_0000  # of _SHIFT as a float64


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On what terms updates are added: bounds on every |value| and on the weight of one site.

    `whole` is for vectors of whole numbers, which are added as they are, modulo 2**whole: then nothing is out of
    bounds, and no weight but 1 is possible. `asked` is for noise that was made for a sum over so many sites.
    """

    bound: float = 2.0**8
    weight_bound: float = 2.0**20
    public: frozenset[str] = field(default=frozenset())  # names of sums that are no secret of a site
    whole: Literal[16, 32] | None = None
    asked: int | None = None  # sites

    def __post_init__(self) -> None:
        for name in ("bound", "weight_bound"):
            if not _LIMITS[0] <= getattr(self, name) <= _LIMITS[1]:
                raise BadInput(f"{name} must be from 2**-100 to 2**100, got {getattr(self, name)}")

    def exponent(self, cohort: int, bits: int = 64) -> int:
        """Binary digits behind the point: 2**exponent is the largest scale with which no sum over a cohort can wrap.

        The largest possible |sum| has two bits less than the integers: 2**(bits - 1) itself would wrap.
        """
        return bits - 2 - _ceil_log2(cohort) - _ceil_log2(self.bound) - _ceil_log2(self.weight_bound)


def magnitude(tensor: Tensor) -> float:
    """Largest |element|, 0 of none; NaN if one is NaN."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(-low.item(), high.item())


def add_products(total: npt.NDArray[Any], vector: Tensor, scale: float, largest: float) -> None:
    """total += round(vector × scale), halves to the even one; `largest` is the magnitude of `vector`.

    `total` is int64, or int32 where all products fit.
    """
    small = largest * scale <= _SMALL
    _spread(partial(_add_products, total, vector, scale, small), len(total))


def divide(vector: Tensor, total: npt.NDArray[Any], exponent: int, weight: float) -> None:
    """vector = total / 2**exponent / weight, in float64, then rounded to the vector's dtype."""
    _spread(partial(_divide, vector, total, exponent, weight), len(total))


def halves(values: Tensor, coarse: float, bound: float) -> tuple[Tensor, Tensor]:
    """float64 values as what lies on the grid `coarse`, added with no error, and the rest, enlarged to `bound`.

    Small eigenvalues of moments, say, would drown in one grid that is wide enough for all.
    """
    on_grid = (values / coarse).round() * coarse
    return on_grid, (values - on_grid) / coarse * bound


def joined(coarsely: Tensor, finely: Tensor, coarse: float, bound: float) -> Tensor:
    """The values of which `halves` made these, or the means of many."""
    return coarsely + finely * coarse / bound


def _add_products(total: npt.NDArray[Any], vector: Tensor, scale: float, small: bool, starts: range) -> None:
    """As `add_products`, for the chunks at `starts`; the product in float64.

    `small` says that no |product| exceeds 2**51. Then there is a faster way with the same result: after the addition of
    1.5 × 2**52 neighbouring floats are 1 apart, so that the hardware rounds, and the low bits are the integer.
    """
    products = np.empty(min(_CHUNK, len(vector)))
    for start in starts:
        part = vector[start : start + _CHUNK]
        product = products[: len(part)]
        product[:] = _array(part)
        product *= scale
        if small:
            product += _SHIFT
            integers = product.view(np.int64)
            integers -= _SHIFT_BITS
        else:
            integers = np.rint(product, out=product).astype(np.int64)
        place = total[start : start + _CHUNK]
        np.add(place, integers, out=place, casting="same_kind")


def _divide(vector: Tensor, total: npt.NDArray[Any], exponent: int, weight: float, starts: range) -> None:
    unit = math.ldexp(1.0, -exponent)
    quotients = np.empty(min(_CHUNK, len(vector)))
    for start in starts:
        part = vector[start : start + _CHUNK]
        quotient = np.multiply(total[start : start + _CHUNK], unit, out=quotients[: len(part)])
        quotient /= weight
        if part.dtype is torch.bfloat16:
            part.copy_(torch.from_numpy(quotient))
        else:
            part.numpy()[:] = quotient


def _array(values: Tensor) -> npt.NDArray[Any]:
    """The same numbers for NumPy, which has no bfloat16."""
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()


def _spread(work: Callable[[range], None], size: int) -> None:
    """Call `work` with the starts of all chunks of `size` elements, divided among as many threads as PyTorch uses.

    With NumPy, and not PyTorch, whose threads wait for each other after every operation: with workers on the other
    cores that takes a hundred times as long. Here they wait once.
    """
    starts = range(0, size, _CHUNK)
    threads = min(torch.get_num_threads(), len(starts) // 2)
    if threads < 2:
        work(starts)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [starts[first::threads] for first in range(threads)]))


def _ceil_log2(number: float) -> int:
    """The smallest e with number <= 2**e; exact."""
    mantissa, exponent = math.frexp(number)
    return exponent - 1 if mantissa == 0.5 else exponent
