"""A page of results: what there is to say, before it becomes HTML.

`write_page` turns it into one self-contained file: inline SVG and CSS, no script, nothing fetched. All text is escaped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fedelta.core.errors import BadInput, FedeltaError
from fedelta.observe.files import replace_file
from fedelta.observe.svg import inline_svg

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, kw_only=True)
class Table:
    """`align` has a letter a column: "l" for text, "r" for numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    caption: str = ""

    def __post_init__(self) -> None:
        widths = {len(self.header), len(self.align), *(len(row) for row in self.rows)}
        if len(widths) != 1 or set(self.align) - {"l", "r"}:
            raise BadInput(f"a table needs one width and an alignment of 'l' and 'r', got {self.align!r} and {widths}")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A matplotlib figure with a sentence under it; a wide one takes the whole width of the page."""

    figure: "Figure"
    caption: str
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    heading: str
    text: Sequence[str] = ()  # paragraphs
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    summary: Sequence[str] = ()  # paragraphs under the title
    facts: Sequence[tuple[str, str]] = ()  # (label, value): the few numbers to see first
    sections: Sequence[Section] = ()
    footer: str = ""


def render(page: Page) -> str:
    """The page as HTML; the same text for the same page."""
    from markupsafe import Markup

    pictures: dict[int, Markup] = {}
    for plot in (plot for section in page.sections for plot in section.plots):
        picture = inline_svg(plot.figure, f"f{len(pictures)}-", plot.caption)
        pictures[id(plot)] = Markup(picture)  # an XML writer has escaped its text
    return _template().render(page=page, picture=lambda plot: pictures[id(plot)])


def write_page(path: Path | str, page: Page) -> None:
    """Write the page to `path`. Raises FedeltaError if it cannot be written."""
    try:
        replace_file(Path(path), render(page).encode())
    except OSError as error:
        raise FedeltaError(f"the report {path} cannot be written: {error.strerror}; choose another place") from error


@lru_cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    source = files("fedelta.observe").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)
