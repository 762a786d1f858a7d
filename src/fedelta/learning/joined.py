"""The examples of sites that train at once, one after the other.

Where the same sites come together in every round, joining their examples anew would cost more than all else that a
tiny site needs besides its training. So what was joined is kept once the same sites have come twice in a row, up to a
limit; with other sites in every round nothing is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

from fedelta.core.examples import Examples

_MOST = 2**29  # bytes that a process keeps


@dataclass(slots=True)
class _Together:
    """The sites that came together last, of those that begin with the same one."""

    sites: tuple[ref[Examples], ...]
    rows: Examples | None = None


def joined(sites: Sequence[Examples]) -> Examples:
    """As `Examples.cat`, of one site or more; it may be given again, and must not be written to."""
    same = tuple(map(ref, sites))
    last = _last.get(sites[0])
    if last is None or last.sites != same:
        _last[sites[0]] = _Together(same)
        return Examples.cat(sites)
    if last.rows is not None:
        return last.rows
    rows = Examples.cat(sites)
    if rows.nbytes + sum(kept.rows.nbytes for kept in _last.values() if kept.rows is not None) <= _MOST:
        last.rows = rows
    return rows


_last: WeakKeyDictionary[Examples, _Together] = WeakKeyDictionary()
