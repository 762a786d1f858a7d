"""Privacy events as plain values, so that a report, a ledger and the wire can hold them: JSON in place of classes.

An event is a mapping with one key, its kind, and says what was done, not what it costs (privacy/accounting.py). The
kinds are those of dp-accounting's `DpEvent` that a mechanism of ours needs:

    {"gaussian": {"noise_multiplier": 1.1}}
    {"poisson_sampled": {"rate": 0.01, "event": …}}
    {"sampled_without_replacement": {"size": 10, "of": 1000, "event": …}}
    {"self_composed": {"count": 50, "event": …}}
    {"composed": […, …]}
    {"tree_aggregation": {"noise_multiplier": 1.1, "steps": 100}}
    {"concentrated": {"rho": 0.4}}
    {"no_op": {}}, {"non_private": {}}

A ledger may come from somebody else, so `from_plain` takes nothing but this list, with numbers in range and at most 16
levels deep; no name in it is looked up anywhere.

`noise_multiplier` is standard deviation / sensitivity, and the sensitivity is that of the relation which the release
states: for values that are clipped to the norm C and summed, C where a unit counts as nothing in the other data set
(add_or_remove_one, replace_special), and 2 C where it has another one in its place (replace_one).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedelta.core.errors import BadInput
from fedelta.core.messages import Plain

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Event = dict[str, Plain]

NOISE = (1e-6, 1e6)  # noise multipliers that accountants can compute with
RHO = (0.5 / NOISE[1] ** 2, 0.5 / NOISE[0] ** 2)  # of Gaussian mechanisms with these
MOST = 10**9  # steps, repetitions, units
DEEPEST = 16
SAMPLED = "a sampled event must be a gaussian, or gaussians composed on one sample"


def gaussian(noise_multiplier: float) -> Event:
    """N(0, (noise_multiplier * sensitivity)^2) added to each number. Any relation."""
    return {"gaussian": {"noise_multiplier": noise_multiplier}}


def poisson_gaussian(rate: float, noise_multiplier: float) -> Event:
    """The same on the units of a Poisson sample: each is in it with probability `rate`, independently.

    Relation add_or_remove_one, or replace_special where the number of units is public; sensitivity C. What is released
    must not depend on the size of the sample otherwise than through the sum: divide by the expected size.
    """
    return {"poisson_sampled": {"rate": rate, "event": gaussian(noise_multiplier)}}


def without_replacement_gaussian(size: int, of: int, noise_multiplier: float) -> Event:
    """The same on a uniformly random set of `size` of `of` units. Relation replace_one; RDP accountant only.

    The standard deviation must be noise_multiplier * 2 C for a sum of values clipped to the norm C. The bound is
    Theorem 9 of Wang, Balle and Kasiviswanathan (AISTATS 2019), tightened for the Gaussian mechanism as in Theorem 27
    of its long version (arXiv 1808.00087). Of the mechanism it takes nothing but the Renyi curve for two inputs of
    `size` units that differ in one; dp-accounting takes alpha / (2 z^2), which is that curve if z is the standard
    deviation over the distance of the two sums. A value of norm C in place of its opposite moves a sum by 2 C.
    """
    return {"sampled_without_replacement": {"size": size, "of": of, "event": gaussian(noise_multiplier)}}


def steps(rate: float, noise_multiplier: float, count: int) -> Event:
    """DP-SGD: `count` Gaussian mechanisms, each on a Poisson sample of its own. Relations as poisson_gaussian."""
    return repeated(poisson_gaussian(rate, noise_multiplier), count)


def repeated(event: Mapping[str, Plain], count: int) -> Event:
    """The same `count` times, each with noise of its own."""
    return {"self_composed": {"count": count, "event": dict(event)}}


def concentrated(rho: float) -> Event:
    """rho-zero-concentrated DP (Bun & Steinke, TCC 2016): Renyi divergences up to rho * alpha. RDP accountant only.

    A Gaussian mechanism with the noise multiplier z has rho = 1 / (2 z^2); "1/2 epsilon^2-concentrated" is
    rho = epsilon^2 / 2. Any relation; where a unit is replaced, rho is that of the replacement: four times the one of
    a unit that counts as nothing in the other data set.
    """
    return {"concentrated": {"rho": rho}}


def no_op() -> Event:
    """Nothing about the data."""
    return {"no_op": {}}


def from_plain(event: Mapping[str, Plain]) -> "DpEvent":
    """dp-accounting's event. Raises BadInput for anything that is not of the form above."""
    return _event(event, DEEPEST)


def to_plain(event: "DpEvent") -> Event:
    """The plain form. Raises BadInput for a kind of event that has none."""
    import dp_accounting as dp

    match event:
        case dp.NoOpDpEvent():
            return {"no_op": {}}
        case dp.NonPrivateDpEvent():
            return {"non_private": {}}
        case dp.GaussianDpEvent(noise_multiplier=noise):
            return gaussian(float(noise))
        case dp.PoissonSampledDpEvent(sampling_probability=rate, event=inner):
            return {"poisson_sampled": {"rate": float(rate), "event": to_plain(inner)}}
        case dp.SampledWithoutReplacementDpEvent(source_dataset_size=of, sample_size=size, event=inner):
            return {"sampled_without_replacement": {"size": int(size), "of": int(of), "event": to_plain(inner)}}
        case dp.SelfComposedDpEvent(event=inner, count=count):
            return {"self_composed": {"count": int(count), "event": to_plain(inner)}}
        case dp.ComposedDpEvent(events=events):
            return {"composed": [to_plain(inner) for inner in events]}
        case dp.SingleEpochTreeAggregationDpEvent(noise_multiplier=noise, step_counts=int(count)):
            return {"tree_aggregation": {"noise_multiplier": float(noise), "steps": count}}
        case dp.ZCDpEvent(rho=rho, xi=0):
            return concentrated(float(rho))
    raise BadInput(f"{type(event).__name__} has no plain form; use one of the events that privacy/events.py lists")


def _event(event: Plain | Mapping[str, Plain], levels: int) -> "DpEvent":
    import dp_accounting as dp

    if levels == 0:
        raise BadInput(f"a privacy event is nested more than {DEEPEST} levels deep; nothing of ours writes that")
    if not isinstance(event, Mapping) or len(event) != 1:
        raise BadInput(f"a privacy event must be a mapping from its kind to its numbers, got {_shown(event)}")
    ((kind, value),) = event.items()
    match kind:
        case "no_op":
            _fields(kind, value)
            return dp.NoOpDpEvent()
        case "non_private":
            _fields(kind, value)
            return dp.NonPrivateDpEvent()
        case "gaussian":
            (noise,) = _fields(kind, value, "noise_multiplier")
            return dp.GaussianDpEvent(_number(kind, "noise_multiplier", noise, *NOISE))
        case "tree_aggregation":
            noise, count = _fields(kind, value, "noise_multiplier", "steps")
            return dp.SingleEpochTreeAggregationDpEvent(
                _number(kind, "noise_multiplier", noise, *NOISE), _whole(kind, "steps", count, MOST)
            )
        case "concentrated":
            (rho,) = _fields(kind, value, "rho")
            return dp.ZCDpEvent(_number(kind, "rho", rho, *RHO))
        case "self_composed":
            count, inner = _fields(kind, value, "count", "event")
            return dp.SelfComposedDpEvent(_event(inner, levels - 1), _whole(kind, "count", count, MOST))
        case "composed":
            if not isinstance(value, list):
                raise BadInput(f"composed must be a list of events, got {_shown(value)}")
            return dp.ComposedDpEvent([_event(inner, levels - 1) for inner in value])
        case "poisson_sampled":
            rate, inner = _fields(kind, value, "rate", "event")
            return dp.PoissonSampledDpEvent(_number(kind, "rate", rate, 0, 1), _gaussians(inner, levels - 1))
        case "sampled_without_replacement":
            size, of, inner = _fields(kind, value, "size", "of", "event")
            units = _whole(kind, "of", of, MOST)
            return dp.SampledWithoutReplacementDpEvent(
                units, _whole(kind, "size", size, units), _gaussians(inner, levels - 1)
            )
    raise BadInput(f"there is no privacy event {_shown(kind)}; privacy/events.py lists those that there are")


def _gaussians(event: Plain, levels: int) -> "DpEvent":
    """Checked as _event, and to be one Gaussian mechanism or several on the same sample."""
    found = _event(event, levels)
    if not _is_gaussian(found):
        raise BadInput(f"{SAMPLED}; got {_shown(event)}")
    return found


def _is_gaussian(event: "DpEvent") -> bool:
    import dp_accounting as dp

    match event:
        case dp.GaussianDpEvent():
            return True
        case dp.SelfComposedDpEvent(event=inner):
            return _is_gaussian(inner)
        case dp.ComposedDpEvent(events=events):
            return bool(events) and all(_is_gaussian(inner) for inner in events)
    return False


def _fields(kind: str, value: Plain, *names: str) -> list[Any]:
    """The values of these names, of which there are no more and no fewer."""
    if not isinstance(value, Mapping) or set(value) != set(names):
        raise BadInput(f"{kind} must have {', '.join(names) or 'no fields'}, got {_shown(value)}")
    return [value[name] for name in names]


def _number(kind: str, name: str, value: Plain, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise BadInput(f"{name} of {kind} must be a number from {least:g} to {most:g}, got {_shown(value)}")
    return float(value)


def _whole(kind: str, name: str, value: Plain, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise BadInput(f"{name} of {kind} must be a whole number from 1 to {most:,}, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value in an error: what somebody else wrote may be long, or nested too deeply to be printed."""
    if isinstance(value, Mapping | list):
        return f"a {type(value).__name__} with {len(value)} entries"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MOST**2:
        return "a whole number that is out of range"
    return repr(value)[:80] if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"
