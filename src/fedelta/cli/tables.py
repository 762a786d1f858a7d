"""Tables in the terminal that stay readable in a narrow one.

A word is never broken, and a short cell is not wrapped while there is room: so dates, names and numbers stay whole.
Longer text wraps between words. Where the columns do not fit even so, each row is told in lines, one for a column.
"""

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

_WHOLE = (24, 12)  # characters of a cell that is not wrapped: if they fit, and otherwise
_GAP = 2  # blanks between two columns


def new_table(*columns: str, texts: int = 1) -> Table:
    """A table whose first `texts` columns are words, and whose others are numbers. Cells are markup."""
    table = Table(box=SIMPLE_HEAD, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=any(columns), show_edge=False)
    for place, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if place < texts else "right", overflow="fold")
    return table


def show_table(console: Console, table: Table, heading: str = "") -> None:
    """Print a table of `new_table`, below an empty line and its heading if it has one."""
    if heading:
        console.print()
        console.print(heading, style="bold")
    fits = any(_fit(table, console.width, whole) for whole in _WHOLE)
    console.print(table if fits or not table.show_header else _records(table))


def _fit(table: Table, width: int, whole: int) -> bool:
    """Whether the columns fit; they get their widths, if they do."""
    sizes = [_sizes(column, whole) for column in table.columns]
    between = (_GAP + 1) * (len(sizes) - 1)  # and the blank that the box has there
    spare = width - between - sum(least for least, _ in sizes)
    if spare < 0:
        return False
    wished = sorted(range(len(sizes)), key=lambda place: sizes[place][1] - sizes[place][0])
    for rank, place in enumerate(wished):  # who needs little gets it; the others share what is left
        least, most = sizes[place]
        more = min(most - least, spare // (len(sizes) - rank))
        spare -= more
        table.columns[place].width = least + more
    return True


def _sizes(column: Column, whole: int) -> tuple[int, int]:
    """The least width of a column, and that in which nothing wraps."""
    header, cells = _plain(column.header), [_plain(cell) for cell in column.cells]
    words = max((cell_len(word) for text in (header, *cells) for word in text.split()), default=0)
    lines = max((cell_len(line) for text in cells for line in text.splitlines()), default=0)
    return max(words, min(lines, whole)), max(words, lines, cell_len(header))


def _records(table: Table) -> Table:
    """Each row as lines "name  value"; empty cells are left out."""
    records = Table.grid(padding=(0, _GAP, 0, 0))
    records.add_column(style="bold", no_wrap=True)
    records.add_column(overflow="fold")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        if records.rows:
            records.add_row()
        for column, cell in zip(table.columns, row, strict=True):
            if _plain(cell):
                records.add_row(column.header, cell)
    return records


def _plain(cell: object) -> str:
    """A cell without its markup."""
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
