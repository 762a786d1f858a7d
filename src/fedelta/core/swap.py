"""Another value in the place of one that lies somewhere within nested dataclasses."""

from dataclasses import fields, is_dataclass, replace
from typing import Any


def swapped(part: Any, old: object, new: object) -> Any:
    """`part` with `new` wherever it, or a dataclass in it, holds the object `old`; the same object if none does."""
    if part is old:
        return new
    if not is_dataclass(part) or isinstance(part, type):
        return part
    held = {field.name: getattr(part, field.name) for field in fields(part) if field.init}
    changed = {name: found for name, value in held.items() if (found := swapped(value, old, new)) is not value}
    return replace(part, **changed) if changed else part
