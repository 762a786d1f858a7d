"""Which rows of its data a site takes in which step.

An epoch is one permutation of the rows, cut into batches; the last of an epoch may be smaller. All randomness comes
from the seed of the site in that round, so one site alone and the same site among others take the same batches.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedelta.core.seeds import derive_each, permutations

Integers = npt.NDArray[np.int64]


def batches(n: int, batch: int, epochs: int | None, steps: int | None, seed: int, least: int = 1) -> Iterator[Tensor]:
    """Row indices of each step over `n` rows, for `epochs` epochs or `steps` steps.

    What is left at the end of an epoch is dropped if it is fewer than `least` rows.
    """
    left = steps if steps is not None else math.inf
    epoch = 0
    while left > 0 and (epochs is None or epoch < epochs):
        order = torch.from_numpy(permutations(_seeds([seed], epoch), np.array([n]))[0])
        for rows in torch.split(order, batch):
            if left <= 0:
                return
            if len(rows) < least:
                continue
            yield rows
            left -= 1
        epoch += 1


@dataclass(frozen=True)
class Steps:
    """The steps of k sites side by side: step t of site i takes the rows `rows[i, t, :counts[i, t]]`.

    Behind a site's last step its counts are 0. Places beyond a count hold some row of the site.
    """

    rows: Tensor  # int64 [k, most steps, batch]
    counts: Tensor  # int64 [k, most steps]

    @classmethod
    def of(
        cls, sizes: Sequence[int], batch: int, epochs: int | None, steps: int | None, seeds: Sequence[int]
    ) -> "Steps":
        """For sites with `sizes[i]` rows >= 1: the very batches that `batches` gives for each."""
        n: Integers = np.asarray(sizes, dtype=np.int64)
        an_epoch = -(-n // batch)
        done = an_epoch * epochs if epochs is not None else np.full_like(n, steps or 0)
        most = int(done.max())
        rows = np.zeros((len(n), most, batch), dtype=np.int64)
        counts = np.zeros((len(n), most), dtype=np.int64)
        each = np.arange(int(an_epoch.max()))  # batches of an epoch
        for epoch in range(int((-(-done // an_epoch)).max())):
            at = epoch * an_epoch[:, None] + each
            valid = (each < an_epoch[:, None]) & (at < done[:, None])
            order = _cut(permutations(_seeds(seeds, epoch), n), n, batch)
            site = np.nonzero(valid)[0]
            rows[site, at[valid]] = order[valid]
            counts[site, at[valid]] = np.minimum(batch, n[:, None] - each * batch)[valid]
        return cls(torch.from_numpy(rows), torch.from_numpy(counts))

    def laid_out(self, order: Tensor, sizes: Sequence[int]) -> "Steps":
        """The same with the sites in another order, and row numbers within all sites' rows one after the other."""
        first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        return Steps((self.rows + first[:, None, None])[order], self.counts[order])


def _cut(order: Integers, n: Integers, batch: int) -> npt.NDArray[Any]:
    """Permutations [k, most rows] as batches [k, most batches, batch]; what is no row of a site is its row 0."""
    order = np.where(order < n[:, None], order, 0)
    padded = np.pad(order, ((0, 0), (0, -order.shape[1] % batch)))
    return padded.reshape(len(n), -1, batch)


def _seeds(seeds: Sequence[int], epoch: int) -> npt.NDArray[np.uint64]:
    return np.array(derive_each((), seeds, ("batches", epoch)), dtype=np.uint64)
