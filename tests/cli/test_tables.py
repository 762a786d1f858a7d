"""Tables of commands in terminals of every width: no word is ever broken, and no line too long."""

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.markup import escape

from fedelta.cli.tables import new_table, show_table

WORDS = st.text(alphabet="abcdef0123[]-", min_size=1, max_size=20)
CELLS = st.lists(WORDS, max_size=8).map(" ".join)
ROWS = st.integers(1, 7).flatmap(lambda count: st.lists(st.lists(CELLS, min_size=count, max_size=count), max_size=4))
SITE = ["hospital-north", "2026-11-22 23:12", "1,200", "3", "2026-11-22", "2027-02-20\n(soon)"]
SITES = ["site", "last seen (UTC)", "rounds", "failures", "quarantine since", "certificate until"]


def shown(names: list[str], rows: list[list[str]], width: int) -> list[str]:
    table = new_table(*names, texts=len(names))
    for row in rows:
        table.add_row(*map(escape, row))
    file = io.StringIO()
    show_table(Console(file=file, width=width, highlight=False), table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@given(rows=ROWS, width=st.integers(40, 200))
def test_every_word_is_whole_and_no_line_is_too_long(rows: list[list[str]], width: int) -> None:
    names = [f"column {place}" for place in range(len(rows[0]) if rows else 1)]
    lines = shown(names, rows, width)
    assert all(len(line) <= width for line in lines)
    there = [word for line in lines for word in line.split()]
    for row in rows:
        for word in " ".join(row).split():
            there.remove(word)  # raises where it is not there, or not as often


def test_sites_have_a_line_each_at_80_columns() -> None:
    lines = shown(SITES, [SITE], 80)
    assert any(line.split() == " ".join(SITE).replace("\n(soon)", "").split() for line in lines)


def test_where_columns_do_not_fit_each_row_is_told_in_lines() -> None:
    lines = shown(SITES, [SITE, ["b", *SITE[1:]]], 60)
    assert "site               hospital-north" in lines
    assert lines.count("last seen (UTC)    2026-11-22 23:12") == 2


def test_dates_and_short_values_are_not_wrapped_while_there_is_room() -> None:
    lines = shown(["time", "what"], [["2026-11-22 23:12:19", "a long story " * 20]], 60)
    assert any(line.startswith("2026-11-22 23:12:19   a long story a long story") for line in lines)
