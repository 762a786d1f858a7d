"""What a secure sum costs a site and the coordinator: 1M parameters, 100 sites, of which 10 drop out at the worst step.

    python -m benchmarks.secure_sum [--sites 100] [--parameters 1000000] [--dropouts 10] [--bits 32] [--repeats 3]

Both halves of the protocol in one process, on one core, without a network: every site's steps are timed one by one, and
the sums over all sites are shown, divided by the number of those that survive. The dropouts are lost after they have
shared their secrets and before their masked update comes, when their masking keys have to be put together and their
masks with every survivor computed anew. The sum is compared with that of the survivors' integers.
"""

import argparse
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedelta.core import codec
from fedelta.core.grid import Terms
from fedelta.core.messages import Tensors
from fedelta.secure import protocol_site
from fedelta.secure.agreement import signed
from fedelta.secure.graph import Shape, shape
from fedelta.secure.protocol_coordinator import STEPS, CoordinatorSum
from fedelta.secure.protocol_site import SiteSum
from fedelta.secure.ring import Form, Ring

T = TypeVar("T")
PARTS = {  # what a site spends its time on -> the functions of protocol_site.py that do it
    "update to integers": ("encode",),
    "keys are agreed on": ("agree", "mask_key"),
    "masks": ("add_mask",),
    "shares: made, encrypted, opened": ("split", "seal", "unseal"),
    "signatures checked": ("check_keys", "signed"),
}


class Watch:
    """Seconds by what they were spent on, one entry for each call."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.within: dict[str, float] = defaultdict(float)  # of functions, all calls together

    def wrapped(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        def timed(*values: Any) -> T:
            began = time.perf_counter()
            found = function(*values)
            self.within[name] += time.perf_counter() - began
            return found

        return timed

    def of(self, name: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        found = work()
        self.seconds[name].append(time.perf_counter() - began)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--dropouts", type=int, default=10)
    parser.add_argument("--bits", type=int, choices=(32, 64), action="append", help="both, if not said otherwise")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    widths = options.bits or [32, 64]
    rounds = {bits: [] for bits in widths}  # type: dict[int, list[Round]]
    for _ in range(options.repeats):
        for bits in widths:  # interleaved
            rounds[bits].append(Round(options.sites, options.parameters, options.dropouts, bits))
    shown = shape(options.sites, 0.1, 0.2)
    print(
        f"{options.parameters:,} parameters, {options.sites} sites, {options.dropouts} lost; each site masks with "
        f"{shown.neighbours} neighbours that it draws, {shown.threshold} of whom unmask it. Medians of "
        f"{options.repeats} rounds, one core; peak memory of the process with all sites in it "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB.\n"
    )
    print("\n".join(table(rounds)))


class Round:
    """One secure sum, and what it took."""

    def __init__(self, sites: int, parameters: int, dropouts: int, bits: int) -> None:
        self.site, self.coordinator = Watch(), Watch()
        self.up: dict[str, int] = defaultdict(int)
        self.down: dict[str, int] = defaultdict(int)
        names = [f"site-{place:04d}" for place in range(sites)]
        lost = set(names[:: max(1, sites // dropouts)][:dropouts]) if dropouts else set()
        draw = np.random.default_rng(0)
        updates = {name: torch.from_numpy(draw.standard_normal(parameters, dtype=np.float32) * 0.01) for name in names}
        self.plain = codec.size({"difference": updates[names[0]]})
        ring = Ring(bits=bits, own=Terms(bound=4.0, weight_bound=2.0**10) if bits == 32 else None)
        halves, total = _parties(names)
        with ExitStack() as patches:
            for name in (name for names in PARTS.values() for name in names if name != "encode"):
                timed = self.site.wrapped(name, getattr(protocol_site, name))
                patches.enter_context(patch.object(protocol_site, name, timed))
            self._run(updates, lost, ring, halves, total)

    def _run(
        self,
        updates: Mapping[str, torch.Tensor],
        lost: Collection[str],
        ring: Ring,
        halves: Mapping[str, SiteSum],
        total: CoordinatorSum,
    ) -> None:
        terms, sites = Terms(), len(updates)
        expected: Mapping[str, np.ndarray] = {}
        integers: Mapping[str, np.ndarray] = {}
        for step in STEPS:
            asked = self.coordinator.of(step, total.ask)
            for name, body in asked.bodies.items():
                if step == "masked" and name in lost:
                    continue
                told = {**asked.shared, **body}
                self.down[name] += codec.size(told)
                if step == "masked":
                    update = {"difference": updates[name], "weight": torch.tensor(10.0, dtype=torch.float64)}
                    form = Form.of(update)
                    integers = self.site.of("encode", lambda: ring.integers(update, form, terms, sites))  # noqa: B023
                    expected = {key: expected.get(key, 0) + vector for key, vector in integers.items()}
                signed.cache_clear()  # no site has what another one has checked
                reply = self.site.of(step, lambda: _answered(halves[name], step, told, integers))  # noqa: B023
                self.up[name] += codec.size(reply)
                self.coordinator.of(step, lambda: total.take(name, reply))  # noqa: B023
        sums, survivors = self.coordinator.of("total", total.total)
        assert set(survivors) == updates.keys() - lost
        assert all(np.array_equal(sums[key], expected[key]) for key in expected)


def _parties(names: list[str]) -> tuple[dict[str, SiteSum], CoordinatorSum]:
    """The sites and the coordinator, at the default shares of colluding sites and dropouts."""
    sites = len(names)
    rule = partial(_shape, sites)
    halves = {
        name: SiteSum(name=name, context=b"benchmark", cohort=sites, shape=rule, identity=Ed25519PrivateKey.generate())
        for name in names
    }
    return halves, CoordinatorSum(context=b"benchmark", cohort=sites, shape=rule, names=names)


def _shape(sites: int, listed: int) -> Shape:
    return shape(sites, 0.1, 0.2, listed=listed)


def _answered(site: SiteSum, step: str, told: Tensors, integers: Mapping[str, np.ndarray]) -> Tensors:
    match step:
        case "keys":
            return site.keys()
        case "shares":
            return site.shares(told)
        case "masked":
            return site.masked(told, integers)
        case "survivors":
            return site.survivors(told)
    return site.reveal(told)


def table(rounds: Mapping[int, list[Round]]) -> list[str]:
    head = "| " + " | ".join(["", *(f"{bits} bits" for bits in rounds)]) + " |"
    lines = [head, "|---|" + "---:|" * len(rounds)]

    def row(name: str, value: Callable[[Round], float], form: str) -> None:
        cells = [form.format(median(value(one) for one in found)) for found in rounds.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")

    for text, functions in PARTS.items():
        row(f"a site: {text}", partial(_part, functions), "{:.1f} ms")
    row("a site: all else", lambda one: _in_all(one) - sum(_part(names, one) for names in PARTS.values()), "{:.1f} ms")
    row("**a site, in all**", _in_all, "{:.0f} ms")
    row("a site sends, in units of the plain update", lambda one: median(one.up.values()) / one.plain, "{:.3f}")
    row("a site gets", lambda one: median(one.down.values()) / 1e3, "{:.0f} kB")
    row("coordinator: adding a masked update", lambda one: 1e3 * median(one.coordinator.seconds["masked"]), "{:.1f} ms")
    row("coordinator: taking all masks off", lambda one: sum(one.coordinator.seconds["total"]), "{:.2f} s")
    row(
        "coordinator: all else",
        lambda one: sum(
            sum(found) for step, found in one.coordinator.seconds.items() if step not in ("masked", "total")
        ),
        "{:.2f} s",
    )
    return lines


def _part(functions: Collection[str], one: Round) -> float:
    """Milliseconds of a site, the mean over all."""
    sites = len(one.site.seconds["masked"])
    return (
        1e3
        * sum(sum(one.site.seconds["encode"]) if name == "encode" else one.site.within[name] for name in functions)
        / sites
    )


def _in_all(one: Round) -> float:
    return 1e3 * sum(sum(found) for found in one.site.seconds.values()) / len(one.site.seconds["masked"])


if __name__ == "__main__":
    main()
