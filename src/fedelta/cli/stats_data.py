"""What `fedelta stats` reads: a table for each site, and which sort of column each is.

In a deployment columns are agreed on before; in this simulation all tables are here, and a column of which nothing is
said is one of numbers if all of its values are, and otherwise one of text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.data.names import in_order
from fedelta.data.partition import by_column
from fedelta.data.tables import check_column, read_table
from fedelta.statistics.columns import MISSING, Category, Column, Number, is_missing, marks_of, number_of, rows_of

if TYPE_CHECKING:
    import pandas

_MOST_SITES = 1000
_ENOUGH = 0.5  # share of text among the distinct values of a column of text


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The sites' tables, and what was said of their columns."""

    tables: Mapping[str, "pandas.DataFrame"]
    only: tuple[str, ...]
    label: str | None
    missing: tuple[str, ...]
    declared: Mapping[str, Column]

    @classmethod
    def take(cls, options: Mapping[str, Any], label: str | None) -> "Source":
        """From the parsed options. Raises BadInput for files or columns that are not there, and for contradictions."""
        columns = None if options["columns"] is None else options["columns"].split(",")
        if options["data"] is not None:
            tables = _divided(_table(options["data"], columns, options["no_header"]), options["by"])
        else:
            tables = {}
            for text in options["sites"]:
                name, file = _pair(text, "--site", "NAME=FILE")
                if name in tables:
                    raise BadInput(f"site {name!r} is given twice; each site has one table")
                tables[name] = _table(file, columns, options["no_header"])
        _check_alike(tables)
        first = next(iter(tables.values()))
        there = [str(name) for name in first.columns if name != options["by"]]
        only = there if options["only"] is None else [name.strip() for name in options["only"].split(",")]
        declared = _declared(options["ranges"], options["categories"])
        for name in (*only, *declared, *([] if label is None else [label])):
            check_column(first, name)
        if label is not None and label not in only:
            only.append(label)
        left_out = [name for name in declared if name not in only]
        if left_out:
            raise BadInput(f"--range or --categories is given for {left_out[0]!r}, which is not among --only; add it")
        return cls(
            tables=tables,
            only=tuple(dict.fromkeys(only)),
            label=label,
            missing=options["missing"] or MISSING,
            declared=declared,
        )

    @property
    def names(self) -> list[str]:
        return list(self.tables)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Raises BadInput for a column of numbers with text in it."""
        return tuple(self.declared.get(name) or self._guessed(name) for name in self.only)

    @property
    def not_told(self) -> list[str]:
        """Columns of text, of which no value is declared."""
        return [column.name for column in self.columns if isinstance(column, Category) and not column.values]

    def rows(self) -> dict[str, Examples]:
        """Of each site. Raises BadInput, with the site, for values that are no numbers where they must be."""
        found = {}
        for name, table in self.tables.items():
            try:
                found[name] = rows_of(table, self.columns, self.missing)
            except BadInput as error:
                raise BadInput(f"site {name}: {error}") from None
        return found

    def check_ranges(self) -> None:
        """Raise BadInput if a column of numbers has no range."""
        unknown = [column.name for column in self.columns if isinstance(column, Number) and column.low is None]
        if unknown:
            name = unknown[0]
            raise BadInput(
                f"--epsilon needs a range for every column of numbers, since to look for one takes counts without "
                f"noise, and {name!r} has none; give --range {name}=LOW:HIGH or --categories {name}=A,B,…, from what "
                "the column means and not from its values, or leave it out with --only"
            )

    def _guessed(self, name: str) -> Column:
        import pandas

        kinds = [table[name].dtype for table in self.tables.values()]
        known = [values for kind in kinds if (values := _known(kind)) is not None]
        if known:
            return Category(name=name, values=_union(known))
        if all(pandas.api.types.is_numeric_dtype(kind) for kind in kinds):
            return Number(name=name)
        marks = marks_of(self.missing)
        texts, numbers, where = [], 0, ""
        for site, table in self.tables.items():
            for value in _distinct(site, table, name):
                if is_missing(value, marks):
                    continue
                if number_of(value) is not None:
                    numbers += 1
                else:
                    texts.append(value)
                    where = where or site
        if not texts:
            return Number(name=name)
        if len(texts) >= _ENOUGH * (len(texts) + numbers):
            if name == self.label:
                raise BadInput(
                    f"the label {name!r} is text, and its values are not declared; give --categories {name}=A,B,…"
                )
            return Category(name=name)
        shown = texts[0] if len(texts[0]) <= 40 else texts[0][:37] + "..."
        raise BadInput(
            f"column {name!r} has {shown!r} at {where}, and numbers mostly; give --missing {shown!r} if that means no "
            f"value, --categories {name}=A,B,… if it is one, or leave the column out with --only"
        )


def _known(kind: Any) -> tuple[str, ...] | None:
    """The values that a type of columns names by itself."""
    import pandas

    if isinstance(kind, pandas.CategoricalDtype):
        return tuple(map(str, kind.categories))
    return ("False", "True") if pandas.api.types.is_bool_dtype(kind) else None


def _union(known: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The values of all sites, the same for any order of these: as they are, if all agree; else numbers first."""
    if len(set(known)) == 1:
        return known[0]
    alike: dict[tuple[bool, float, str], str] = {}
    for text in sorted({value for values in known for value in values}, key=lambda value: (len(value), value)):
        number = number_of(text)
        is_text = number is None or not math.isfinite(number)
        alike.setdefault((is_text, 0.0 if is_text or number is None else number, text.strip() * is_text), text)
    return tuple(alike[key] for key in sorted(alike))


def _distinct(site: str, table: "pandas.DataFrame", name: str) -> list[str]:
    try:
        return [str(value) for value in table[name].dropna().unique()]
    except TypeError:
        raise BadInput(
            f"column {name!r} of {site} has lists in it, and only numbers and text are counted; leave it out "
            "with --only"
        ) from None


def _table(source: str, columns: Sequence[str] | None, no_header: bool) -> "pandas.DataFrame":
    if no_header and columns is None:
        columns = [str(place + 1) for place in range(read_table(source).shape[1])]
    table = read_table(source, columns)
    table.columns = table.columns.map(str)
    if columns is None and len(table.columns) > 1 and all(number_of(name) is not None for name in table.columns):
        raise BadInput(
            f"the first line of {source} is of numbers, and not of names; give --no-header, or --columns A,B,…"
        )
    return table


def _divided(table: "pandas.DataFrame", by: str) -> "dict[str, pandas.DataFrame]":
    check_column(table, by)
    groups = by_column(table[by])
    if len(groups) > _MOST_SITES:
        raise BadInput(
            f"column {by!r} has {len(groups):,} values, too many to be sites; --by is the column of the sites"
        )
    rest = table.drop(columns=by)
    return {name: rest.iloc[groups[name]] for name in in_order(groups)}


def _check_alike(tables: "Mapping[str, pandas.DataFrame]") -> None:
    (first, one), *others = tables.items()
    for name, other in others:
        lacks = [str(column) for column in one.columns if column not in other.columns]
        more = [str(column) for column in other.columns if column not in one.columns]
        if lacks or more:
            which, place, elsewhere = (lacks[0], name, first) if lacks else (more[0], first, name)
            raise BadInput(f"{place} has no column {which!r}, and {elsewhere} has; columns are the same at all sites")


def _declared(ranges: Sequence[str], categories: Sequence[str]) -> dict[str, Column]:
    found: dict[str, Column] = {}
    for text in ranges:
        name, given = _pair(text, "--range", "COLUMN=LOW:HIGH")
        low, separator, high = given.partition(":")
        ends = number_of(low), number_of(high)
        if not separator or ends[0] is None or ends[1] is None:
            raise BadInput(f"--range {text} is not of the form COLUMN=LOW:HIGH with two numbers")
        _add(found, Number(name=name, low=ends[0], high=ends[1]))
    for text in categories:
        name, given = _pair(text, "--categories", "COLUMN=A,B,…")
        _add(found, Category(name=name, values=tuple(value.strip() for value in given.split(","))))
    return found


def _add(found: dict[str, Column], column: Column) -> None:
    if column.name in found:
        raise BadInput(f"{column.name!r} has two declarations; give one --range or one --categories")
    found[column.name] = column


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise BadInput(f"{option} {text} is not of the form {form}")
    return name, value
