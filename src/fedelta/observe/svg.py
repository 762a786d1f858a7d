"""A matplotlib figure as SVG inside an HTML page.

The ids of several inline pictures share one page, so only those that something refers to are kept, with a prefix. Text
stays text. In a figure whose background is transparent, the colours that `plots` draws with, black and white become
CSS variables of the page, so that it follows the page's light or dark scheme. A figure with a background of its own
keeps all its colours, and has the class "own-background".
"""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from fedelta.observe.plots import COLOURS, INK, MUTED, RULE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VARIABLES = {colour: f"var(--series-{position})" for position, colour in enumerate(COLOURS, start=1)}
_VARIABLES |= {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"}
_VARIABLES |= {"#000000": "var(--ink)", "#ffffff": "var(--paper)"}
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


def inline_svg(figure: "Figure", prefix: str, label: str) -> str:
    """The figure as an `<svg>` element: the same text for the same figure and prefix.

    `prefix` tells its ids from those of other pictures on the page; `label` is what a screen reader says.
    """
    import matplotlib
    from matplotlib.colors import to_rgba

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedelta"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root)
    own_background = to_rgba(figure.get_facecolor())[3] > 0
    colours = {} if own_background else _VARIABLES
    referred = {name for element in root.iter() for value in element.attrib.values() for name in _references(value)}
    for element in root.iter():
        element.attrib = {
            name: _rewritten(name, value, prefix, colours)
            for name, value in element.attrib.items()
            if name != "id" or value in referred
        }
    width = root.attrib.pop("width", "")
    root.attrib.pop("height", None)
    root.attrib |= {"style": f"max-width: {width}", "role": "img", "aria-label": label}
    if own_background:
        root.attrib["class"] = "own-background"
    return ElementTree.tostring(root, encoding="unicode")


def _strip(element: ElementTree.Element) -> None:
    """Drop namespaces, which HTML does without, metadata, and styles that would leak into the page."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    for child in list(element):
        if child.tag.rpartition("}")[2] in ("metadata", "style"):
            element.remove(child)
        else:
            _strip(child)


def _references(value: str) -> list[str]:
    return [value[1:]] if value.startswith("#") else _REFERENCE.findall(value)


def _rewritten(name: str, value: str, prefix: str, colours: Mapping[str, str]) -> str:
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    value = _REFERENCE.sub(rf"url(#{prefix}\1)", value)
    if name == "style":
        value = _COLOUR.sub(lambda found: colours.get(found.group(), found.group()), value)
    return value
