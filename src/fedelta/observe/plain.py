"""A report as plain JSON values and back, exactly.

JSON has no NaN and no infinities: they are written as the strings "NaN", "Infinity" and "-Infinity".
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast, get_args

from fedelta.core.errors import BadInput
from fedelta.core.messages import Plain
from fedelta.core.program import Report
from fedelta.core.release import Relation, Release, Unit
from fedelta.observe.manifest import short

T = TypeVar("T")


def to_plain(report: Report) -> dict[str, Plain]:
    """A report as plain JSON values; `from_plain` reads it back exactly."""
    return {
        "round": report.round,
        "metrics": _numbers_to_plain(report.metrics),
        "cohort": list(report.cohort),
        "per_site": {site: _numbers_to_plain(metrics) for site, metrics in report.per_site.items()},
        "absent": dict(report.absent),
        "refused": list(report.refused),
        "unmeasured": dict(report.unmeasured),
        "aggregation_errors": None
        if report.aggregation_errors is None
        else _numbers_to_plain(report.aggregation_errors),
        "releases": [_release_to_plain(release) for release in report.releases],
        "bytes_down": report.bytes_down,
        "bytes_up": report.bytes_up,
        "seconds": _numbers_to_plain(report.seconds),
        "stop": report.stop,
    }


def from_plain(plain: Plain) -> Report:
    """Read what `to_plain` wrote; what is missing has its default. Raises BadInput if it is anything else."""
    try:
        fields = {name: _READERS[name](value) for name, value in _dict(plain).items()}
        return Report(**fields)
    except (KeyError, TypeError) as error:
        raise BadInput(f"not the report of a round: {short(plain)}") from error


def _numbers_to_plain(numbers: Mapping[str, float]) -> dict[str, Plain]:
    return {name: _number_to_plain(float(value)) for name, value in numbers.items()}


def _number_to_plain(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _release_to_plain(release: Release) -> dict[str, Plain]:
    return {field.name: getattr(release, field.name) for field in fields(Release)} | {"event": dict(release.event)}


def _release(plain: Plain) -> Release:
    own = _dict(plain)
    unit, relation = own["unit"], own["relation"]
    if unit not in get_args(Unit) or relation not in get_args(Relation):
        raise TypeError(plain)
    return Release(
        event=_dict(own["event"]),
        unit=cast(Unit, unit),
        relation=cast(Relation, relation),
        of=None if own["of"] is None else _text(own["of"]),
        job=_text(own["job"]),
        round=_integer(own["round"]),
    )


def _number(plain: Plain) -> float:
    if type(plain) is float or type(plain) is int or plain in ("NaN", "Infinity", "-Infinity"):
        return float(plain)
    raise TypeError(plain)


def _integer(plain: Plain) -> int:
    if type(plain) is not int:
        raise TypeError(plain)
    return plain


def _text(plain: Plain) -> str:
    if not isinstance(plain, str):
        raise TypeError(plain)
    return plain


def _dict(plain: Plain) -> dict[str, Plain]:
    if not isinstance(plain, dict):
        raise TypeError(plain)
    return plain


def _list(plain: Plain) -> list[Plain]:
    if not isinstance(plain, list):
        raise TypeError(plain)
    return plain


def _texts(plain: Plain) -> tuple[str, ...]:
    return tuple(map(_text, _list(plain)))


def _each(read: Callable[[Plain], T]) -> Callable[[Plain], dict[str, T]]:
    return lambda plain: {name: read(value) for name, value in _dict(plain).items()}


_READERS: Mapping[str, Callable[[Plain], Any]] = {
    "round": _integer,
    "metrics": _each(_number),
    "cohort": _texts,
    "per_site": _each(_each(_number)),
    "absent": _each(_text),
    "refused": _texts,
    "unmeasured": _each(_text),
    "aggregation_errors": lambda plain: None if plain is None else _each(_number)(plain),
    "releases": lambda plain: tuple(map(_release, _list(plain))),
    "bytes_down": _integer,
    "bytes_up": _integer,
    "seconds": _each(_number),
    "stop": lambda plain: None if plain is None else _text(plain),
}
