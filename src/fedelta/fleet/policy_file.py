"""Reading a site's policy from TOML. Nothing is taken for granted: a key that is missing is an error, not a permission.

Every section and every key below has to be there, and no other; where a limit is not meant, its value is "any". What is
wrong is said in one sentence that names the key and what it may be. docs/site-policy.md has an example.
"""

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import time
from pathlib import Path
from typing import Any, get_args
from zoneinfo import ZoneInfo

from fedelta.core.errors import BadInput
from fedelta.core.release import Unit
from fedelta.fleet.policy import DAYS, WAYS, WORK, Policy, Window

ANY = "any"
_MOST_BYTES = 2**20  # of a file: more is no policy
_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")
_LARGEST = 2**63 - 1

Reader = Callable[[Any], Any]  # from the value in the file to that in Policy; ValueError says what it may be


def read(path: Path | str) -> Policy:
    """The policy in a file. Raises BadInput."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise BadInput(f"the policy {path} cannot be read: {error.strerror}; give a file of this site's") from None
    if len(content) > _MOST_BYTES:
        raise BadInput(f"the policy {path} has more than {_MOST_BYTES} bytes; give the TOML file of a policy")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise BadInput(f"the policy {path} is not UTF-8; save it as text") from None
    return parse(text, str(path))


def parse(text: str, name: str = "the policy") -> Policy:
    """The policy in a text. Raises BadInput, and nothing else, whatever the text is."""
    try:
        plain = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{name} is not TOML: {error}; mend that line") from None
    _check_keys(name, "", plain, _SECTIONS)
    values: dict[str, Any] = {}
    for section, readers in _SECTIONS.items():
        table = plain[section]
        if not isinstance(table, dict):
            raise BadInput(f"{name}: {section} must be a section, got {_shown(table)}; begin it with [{section}]")
        _check_keys(name, f"{section}.", table, readers)
        for key, (field, reader) in readers.items():
            try:
                values[field] = reader(table[key])
            except ValueError as error:
                raise BadInput(f"{name}: {section}.{key} must be {error}, got {_shown(table[key])}") from None
    policy = Policy(**values)
    hidden = policy.collect is not None and "clear" not in policy.collect
    if policy.least > 1 and not hidden:
        raise BadInput(
            f"{name}: secure.least is {policy.least}, but secure.collect allows updates in the clear; name "
            '"masks" or "encryption" there, or take least = 1'
        )
    if policy.identities and policy.collect != frozenset(["masks"]):
        raise BadInput(f'{name}: secure.identities goes with secure.collect = ["masks"] alone; write that, or false')
    return policy


def _check_keys(name: str, prefix: str, found: Mapping[str, object], known: Mapping[str, object]) -> None:
    what = "key" if prefix else "section"
    for key in found:
        if key not in known:
            raise BadInput(f"{name} has an unknown {what} {_shown(prefix + key)}; known are {', '.join(known)}")
    for key in known:
        if key not in found:
            raise BadInput(f'{name} has no {what} {prefix}{key}; write it, with "any" where there is to be no limit')


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # of lists in lists, of a number of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:59]}…"


# Readers of values


def _or_any(reader: Reader) -> Reader:
    """As `reader`; None for "any"."""

    def either(value: Any) -> Any:
        if value == ANY and isinstance(value, str):
            return None
        try:
            return reader(value)
        except ValueError as error:
            raise ValueError(f'{error}, or "any"') from None

    return either


def _whole(least: int) -> Reader:
    def whole(value: Any) -> int:
        if type(value) is not int or not least <= value <= _LARGEST:
            raise ValueError(f"a whole number from {least}")
        return value

    return whole


def _between(low: float, high: float, said: str) -> Reader:
    def number(value: Any) -> float:
        try:
            found = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            found = math.nan
        if not low < found < high:  # also NaN
            raise ValueError(said)
        return found

    return number


def _one(*names: str) -> Reader:
    def one(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(" or ".join(f'"{name}"' for name in names))
        return value

    return one


def _some_of(known: Sequence[str]) -> Reader:
    def some(value: Any) -> frozenset[str]:
        return frozenset(_list(value, f"a list of some of {', '.join(known)}", lambda one: one in known))

    return some


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _digests(value: Any) -> frozenset[str]:
    said = "a list of digests of 64 hexadecimal digits, in small letters"
    return frozenset(_list(value, said, lambda one: re.fullmatch("[0-9a-f]{64}", one) is not None))


def _patterns(value: Any) -> tuple[str, ...]:
    return tuple(_list(value, "a list of names, in which * stands for any characters", bool))


def _list(value: Any, said: str, fits: Callable[[str], bool]) -> list[str]:
    """A list of distinct texts, at least one."""
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and fits(one) for one in value):
        raise ValueError(said)
    if len(set(value)) < len(value):
        raise ValueError(f"{said}, each once")
    return value


def _zone(value: Any) -> ZoneInfo:
    said = 'a time zone, such as "Europe/Rome" or "UTC" (of the system, or of the package tzdata)'
    if not isinstance(value, str):
        raise ValueError(said)
    try:
        return ZoneInfo(value)
    except (KeyError, ValueError, OSError):  # of no such zone, of what is no name, of a folder
        raise ValueError(said) from None


def _hours(value: Any) -> tuple[Window, ...]:
    said = 'a list of {days = ["mon", …], from = "HH:MM", to = "HH:MM"}'
    if not isinstance(value, list) or not value:
        raise ValueError(said)
    return tuple(_window(one, said) for one in value)


def _window(value: Any, said: str) -> Window:
    if not isinstance(value, dict) or value.keys() != {"days", "from", "to"}:
        raise ValueError(said)
    days = _list(value["days"], f"{said} with days of {', '.join(DAYS)}", DAYS.__contains__)
    begin = _time(value["from"], said)
    end = None if value["to"] == "24:00" else _time(value["to"], said)
    if begin == end:
        raise ValueError(f'{said} with two different times ("00:00" to "24:00" is a whole day)')
    return Window(days=frozenset(map(DAYS.index, days)), begin=begin, end=end)


def _time(value: Any, said: str) -> time:
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{said} with times from "00:00" to "24:00"')
    return time(int(match[1]), int(match[2]))


_SECTIONS: Mapping[str, Mapping[str, tuple[str, Reader]]] = {
    "experiments": {"digests": ("experiments", _or_any(_digests))},
    "work": {
        "requests": ("requests", _some_of(WORK)),
        "rounds": ("rounds", _or_any(_whole(1))),
    },
    "leaves": {
        "tensors": ("tensors", _or_any(_patterns)),
        "parameters": ("parameters", _or_any(_whole(1))),
        "bytes_per_reply": ("bytes_per_reply", _or_any(_whole(1))),
        "bytes_per_round": ("bytes_per_round", _or_any(_whole(1))),
        "bytes_per_day": ("bytes_per_day", _or_any(_whole(1))),
    },
    "privacy": {
        "unit": ("unit", _or_any(_one(*get_args(Unit)))),
        "epsilon": ("epsilon", _or_any(_between(0, math.inf, "a number above 0"))),
        "delta": ("delta", _or_any(_between(0, 1, "a number above 0 and below 1"))),
        "noise": ("noise", _or_any(_one("site"))),
    },
    "secure": {
        "collect": ("collect", _or_any(_some_of(WAYS))),
        "identities": ("identities", _flag),
        "least": ("least", _whole(1)),
    },
    "hours": {
        "zone": ("zone", _zone),
        "open": ("hours", _or_any(_hours)),
    },
}
