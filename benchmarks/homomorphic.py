"""What encrypted sums cost: a LoRA update of 300k numbers, and one of 1M, from 10 sites.

    python -m benchmarks.homomorphic [--sites 10] [--numbers 300000] [--repeats 3]

Sites, coordinator and key party in one process, on one core, without a network. The mean is compared with that of the
same float32 updates, weighted in float64, and with the bound that the collect states for it.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from fedelta.core import codec
from fedelta.core.grid import Terms
from fedelta.core.messages import Reply, Request, Tensors
from fedelta.core.program import Site
from fedelta.secure import ckks
from fedelta.secure.ckks import Total
from fedelta.secure.homomorphic import CIPHERTEXTS, HomomorphicEncryption
from fedelta.secure.key_party import KeyParty, Statement
from fedelta.secure.ring import Form

T = TypeVar("T")
WEIGHT = 512.0  # rows of a site, the first of which has one row


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds, and what came of them."""

    encrypt: float  # of one site
    add: float  # of one update, at the coordinator
    open: float  # of the sum, at the key party
    bytes: int
    plain: int
    error: float
    bound: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--numbers", type=int, action="append", help="300,000 and 1,000,000, if not said otherwise")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    party = KeyParty(most=options.sites, once=False)
    collect = HomomorphicEncryption(most=options.sites, public=party.public, opener=party)
    costs = {
        size: [cost(collect, party, options.sites, size, seed) for seed in range(options.repeats)]
        for size in options.numbers or [300_000, 1_000_000]
    }
    precision = collect.precision
    print(
        f"{options.sites} sites; {precision.bits} bits for a number of one site, {ckks.PER:,} numbers in a ciphertext "
        f"of {ckks.WIDTH:,} bytes. Medians of {options.repeats} rounds, one core; errors are the largest of all.\n"
    )
    print("\n".join(table(costs)))


def cost(collect: HomomorphicEncryption, party: KeyParty, sites: int, numbers: int, seed: int) -> Cost:
    draw = torch.Generator().manual_seed(seed)
    weights = [1.0, *[WEIGHT] * (sites - 1)]
    total, mean = Total(), torch.zeros(numbers, dtype=torch.float64)
    encrypt, add, sizes = [], [], []
    update: Tensors = {}
    for place, weight in enumerate(weights):
        values = 0.01 * torch.randn(numbers, generator=draw)
        mean += values.double() * (weight / sum(weights))
        update = {"difference": values, "weight": torch.tensor(weight, dtype=torch.float64)}
        seconds, reply = timed(lambda: encrypted(collect, update, f"site-{place}"))  # noqa: B023
        encrypt.append(seconds)
        sizes.append(codec.size(reply.body))
        rows = reply.body[CIPHERTEXTS].numpy()
        add.append(timed(lambda: total.add(rows))[0])  # noqa: B023
    statement = Statement(job="benchmark", round=seed, op="train", attempt=0, sites=sites)
    summed = torch.from_numpy(total.rows())
    seconds, sums = timed(lambda: party.opened(statement, summed))
    found: Tensor = collect.digits(Terms()).mean(sums.numpy().reshape(-1), Form.of(update))["difference"]
    return Cost(
        encrypt=median(encrypt),
        add=median(add),
        open=seconds,
        bytes=max(sizes),
        plain=codec.size(update),
        error=float((found.double() - mean).abs().max()),
        bound=collect.error(sites, sum(weights)) + 2.0**-24 * float(mean.abs().max()),
    )


def encrypted(collect: HomomorphicEncryption, update: Tensors, name: str) -> Reply:
    site = Site(id=name, data=lambda: (_ for _ in ()).throw(AssertionError))
    return collect.handle(Request(to=name, op="train", round=1), site, lambda: update, Terms())


def timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def table(costs: dict[int, list[Cost]]) -> list[str]:
    lines = ["| | " + " | ".join(f"{size:,} numbers" for size in costs) + " |", "|---|" + "---:|" * len(costs)]

    def row(name: str, value: Callable[[list[Cost]], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(value(found) for found in costs.values()) + " |")

    row("a site: to encrypt its update", lambda found: f"{median(one.encrypt for one in found):.2f} s")
    row("a site sends", lambda found: f"{found[0].bytes / 1e6:.1f} MB")
    row("  in units of the plain update", lambda found: f"{found[0].bytes / found[0].plain:.2f}")
    row("coordinator: to read and add one update", lambda found: f"{median(one.add for one in found):.3f} s")
    row("key party: to open the sum", lambda found: f"{median(one.open for one in found):.2f} s")
    row("largest error of the mean", lambda found: f"{max(one.error for one in found):.1e}")
    row("  its stated bound", lambda found: f"{max(one.bound for one in found):.1e}")
    return lines


if __name__ == "__main__":
    main()
