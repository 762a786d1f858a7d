"""Making a forecast: load what the sites hold, rehearse a few of them, and carry over to the others.

A rehearsed site stands for those of its size: paces between two of them are interpolated by rows.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedelta.algorithms.federation import Federation
from fedelta.algorithms.forecast import Forecast, Group, SiteForecast, Tier
from fedelta.algorithms.forecast_encrypted import encrypted_bytes
from fedelta.algorithms.forecast_sums import masked_bytes
from fedelta.algorithms.private import Prospect
from fedelta.algorithms.rehearsal import Rehearsal, rehearse
from fedelta.core import codec
from fedelta.core.errors import BadInput, FedeltaError, TooFewSites
from fedelta.core.examples import Examples
from fedelta.core.messages import PartyId, Tensors
from fedelta.core.parameters import Layout
from fedelta.core.program import SiteData
from fedelta.learning.flat import FlatModel
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.privacy.example_level import ROWS
from fedelta.secure.aggregation import SecureAggregation
from fedelta.secure.homomorphic import HomomorphicEncryption

_AT_ONCE = 64  # sites whose own part of a broadcast is in memory
_DIFFER = 2.0  # rows of the largest site over the smallest, from which on they are looked at apart


def forecast(
    federation: Federation[Any], load: Callable[[str], object], names: Sequence[PartyId], *, seconds: float = 2.0
) -> Forecast:
    """The forecast of `federation` over the sites `names`; `load` and `names` are what its fleet would get.

    Loads the data of every site, and rehearses one site, or three where sizes differ, each with about `seconds` of
    training. Raises TooFewSites for fewer sites than must answer, BadInput if none can train or a rehearsal fails.
    """
    least = max(federation.min_sites, federation.collect.least)
    if len(names) < least:
        why = f"min_sites={least}" if least == federation.min_sites else f"{least} under {federation.collect}"
        raise TooFewSites(f"there are {len(names)} sites, and {why} must answer")
    messages = _Messages(federation, names)
    module = federation.model(messages.state)
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    model = FlatModel(module)
    layout, least = model.layout, model.least_batch
    del module, model  # a site's memory is measured beside them otherwise
    held = {name: _Held.by(load, name, federation, least) for name in names}
    chosen = _chosen(list(held.values()))
    rehearsed = [(called, one, _rehearsed(messages, one, load, seconds)) for called, one in chosen.items()]
    sites = _sites(federation, held, messages, [(one, rehearsal) for _, one, rehearsal in rehearsed])
    return Forecast(
        federation=federation,
        groups=_groups(layout),
        frozen=sum(parameter.numel() for parameter in frozen),
        frozen_bytes=sum(parameter.nbytes for parameter in frozen),
        sites=tuple(sites.values()),
        tiers=tuple(
            Tier(called=called, site=sites[one.name], rehearsal=found, prospect=messages.prospect(one))
            for called, one, found in rehearsed
        ),
        update_sizes=frozenset(federation.algorithm.layout(messages.state.algorithm, name).size for name in names),
    )


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a site has, by its sizes."""

    name: PartyId
    rows: int = 0
    held_back: int = 0
    steps: int = 0
    data_bytes: int = 0
    silent: bool = False  # its data cannot be loaded
    failures: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def by(cls, load: Callable[[str], object], name: PartyId, federation: Federation[Any], least: int) -> "_Held":
        """`least` rows make a batch."""
        try:
            data = _loaded(load, name)
        except (FedeltaError, OSError) as error:
            return cls(name=name, silent=True, failures=dict.fromkeys(("train", "evaluate", "statistics"), str(error)))
        task, training = federation.algorithm.task, federation.algorithm.training
        held_back = data.validation if data.validation is not None and len(data.validation) else None
        wrong = {
            "train": _unusable(task, data.train, least),
            "statistics": _unusable(task, data.train, 1),
            "evaluate": _unusable(task, held_back, 1) if held_back is not None else None,
        }
        return cls(
            name=name,
            rows=len(data.train),
            held_back=0 if held_back is None else len(held_back),
            steps=local_steps(training, len(data.train), least),
            data_bytes=_nbytes(data.train) + (0 if held_back is None else _nbytes(held_back)),
            failures={op: reason for op, reason in wrong.items() if reason is not None},
        )


class _Messages:
    """The requests of the first round."""

    def __init__(self, federation: Federation[Any], names: Sequence[PartyId]) -> None:
        self.federation = federation
        self.state = federation.begun(federation.init(), names)
        self._plain = {"parameters": federation.algorithm.parameters(self.state.algorithm).vector}
        if federation.privacy is not None and self.state.privacy is not None:
            self._plain |= federation.privacy.shared(self.state.privacy)

    def to(self, name: PartyId) -> dict[str, Tensors]:
        """All that a site gets, by the kind of the request."""
        shared, own = self.federation.broadcast(self.state, [name])
        return self._by_kind({**shared, **own.get(name, {})})

    def prospect(self, one: _Held) -> Prospect | None:
        """What the run will let out about a site."""
        guard, privacy = self.federation.guard, self.state.privacy
        return None if guard is None or privacy is None else guard.prospect(privacy, one.name, one.rows)

    def sizes(self, names: Sequence[PartyId]) -> dict[PartyId, dict[str, int]]:
        """Bytes of each kind of request to each site."""
        found = {}
        for start in range(0, len(names), _AT_ONCE):
            part = names[start : start + _AT_ONCE]
            shared, own = self.federation.broadcast(self.state, part)
            alike = {op: codec.size(tensors) for op, tensors in self._by_kind(shared).items()}
            for name in part:
                mine = self._by_kind({**shared, **own[name]}) if name in own else {}
                found[name] = {op: codec.size(tensors) for op, tensors in mine.items()} or dict(alike)
        return found

    def _by_kind(self, broadcast: Tensors) -> dict[str, Tensors]:
        federation = self.federation
        found = {"train": broadcast}
        if federation.validate_at_sites:
            found["evaluate"] = broadcast
        if federation.start is not None:
            found["statistics"] = self._plain
        return found


def _chosen(held: Sequence[_Held]) -> dict[str, _Held]:
    """The sites that stand for the others, by what they are called, in the order of their rows."""
    ordered = sorted((one for one in held if "train" not in one.failures), key=lambda one: one.rows)
    if not ordered:
        raise BadInput(f"no site can train; {held[0].name}: {held[0].failures['train']}")
    smallest, median, largest = ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]
    if largest.rows <= _DIFFER * smallest.rows:
        return {"median": median}
    tiers = {"smallest": smallest, "median": median, "largest": largest}
    return {called: one for called, one in tiers.items() if called != "median" or one.name != smallest.name}


def _rehearsed(messages: _Messages, one: _Held, load: Callable[[str], object], seconds: float) -> Rehearsal:
    try:
        return rehearse(
            messages.federation,
            messages.to(one.name),
            one.name,
            _loaded(load, one.name),
            steps=one.steps,
            seconds=seconds,
        )
    except FedeltaError as error:
        raise BadInput(f"site {one.name}, when its work was tried out: {error}") from error


def _sites(
    federation: Federation[Any],
    held: Mapping[PartyId, _Held],
    messages: _Messages,
    rehearsed: Sequence[tuple[_Held, Rehearsal]],
) -> dict[PartyId, SiteForecast]:
    down = messages.sizes(list(held))
    return {
        name: SiteForecast(
            name=name,
            rows=one.rows,
            held_back=one.held_back,
            steps=one.steps,
            data_bytes=one.data_bytes,
            silent=one.silent,
            failures={op: reason for op, reason in one.failures.items() if op in down[name]},
            bytes_down=down[name],
            bytes_up={op: _bytes_up(federation, op, one, rehearsed) for op in down[name]},
            seconds={op: _seconds(op, one, rehearsed) for op in down[name]},
        )
        for name, one in held.items()
    }


def _bytes_up(federation: Federation[Any], op: str, one: _Held, rehearsed: Sequence[tuple[_Held, Rehearsal]]) -> int:
    if op in one.failures:
        return 0
    _, nearest = min(rehearsed, key=lambda other: abs(other[0].rows - one.rows))
    if isinstance(federation.collect, SecureAggregation):
        whole = None if federation.privacy is None else federation.privacy.whole
        return masked_bytes(federation.collect, nearest.replies[op].pieces, _public(federation, op), whole)
    if isinstance(federation.collect, HomomorphicEncryption):
        return encrypted_bytes(federation.collect, nearest.replies[op].pieces, _public(federation, op))
    return nearest.bytes_up_nothing if op == "evaluate" and not one.held_back else nearest.replies[op].bytes


def _public(federation: Federation[Any], op: str) -> Sequence[str]:
    """The numbers that a guarantee makes known, and that travel in the clear beside an update under masks."""
    privacy = federation.privacy
    return [ROWS] if privacy is not None and op == "train" and ROWS in privacy.numbers else []


def _seconds(op: str, one: _Held, rehearsed: Sequence[tuple[_Held, Rehearsal]]) -> float:
    if op in one.failures:
        return 0.0
    rows = [other.rows for other, _ in rehearsed]
    paces = [rehearsal.paces[op] for _, rehearsal in rehearsed]
    fixed, each = (np.interp(one.rows, rows, [getattr(pace, part) for pace in paces]) for part in ("fixed", "each"))
    units = {"train": one.steps, "evaluate": one.held_back, "statistics": one.rows}[op]
    return float(fixed + each * units)


def _groups(layout: Layout) -> tuple[Group, ...]:
    sums: dict[tuple[str, bool], list[int]] = {}
    for entry in layout.entries:
        owner = re.sub(r"(?<![^.])\d+(?![^.])", "*", entry.name.rpartition(".")[0])
        count = sums.setdefault((owner, entry.offset >= layout.trained), [0, 0])
        count[0] += 1
        count[1] += entry.numel
    return tuple(
        Group(name=name, tensors=tensors, elements=elements, buffers=buffers)
        for (name, buffers), (tensors, elements) in sums.items()
    )


def local_steps(training: Training, rows: int, least: int) -> int:
    """Of a site's training in a round, as `learning.batches` cuts them; `least` rows make a batch."""
    if training.steps is not None:
        return training.steps
    full, rest = divmod(rows, training.batch)
    return (training.epochs or 0) * (full + (rest >= max(1, least)))


def _unusable(task: Task, examples: Examples, least: int) -> str | None:
    try:
        task.check(examples)
    except BadInput as error:
        return str(error)
    return f"it has {len(examples)} rows and needs {least}" if len(examples) < least else None


def _loaded(load: Callable[[str], object], name: PartyId) -> SiteData:
    given: Any = load(name)  # SiteData.of checks the type
    return SiteData.of(given)


def _nbytes(examples: Examples) -> int:
    return sum(tensor.nbytes for tensor in (*examples.inputs.values(), examples.targets))
