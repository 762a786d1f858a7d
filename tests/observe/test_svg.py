from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from fedelta.observe.plots import COLOURS
from fedelta.observe.svg import inline_svg


def figure(background: str) -> Figure:
    figure = Figure(facecolor=background)
    axes = figure.add_subplot(facecolor=background)
    axes.plot([1, 3, 2], color=COLOURS[0], marker="o")
    axes.text(1, 2, '<b>#000000</b> "url(#x)"', color="#123456")
    return figure


def colours(element: ElementTree.Element) -> str:
    return " ".join(part.get("style", "") for part in element.iter())


def test_a_transparent_figure_follows_the_page() -> None:
    root = ElementTree.fromstring(inline_svg(figure("none"), "f0-", "a plot"))
    styles = colours(root)
    assert "var(--series-1)" in styles
    assert "var(--ink)" in styles
    assert "#000000" not in styles
    assert COLOURS[0] not in styles
    assert "#123456" in styles
    assert root.get("class") is None


def test_a_figure_with_a_background_keeps_its_colours() -> None:
    root = ElementTree.fromstring(inline_svg(figure("white"), "f0-", "a plot"))
    assert "var(" not in colours(root)
    assert COLOURS[0] in colours(root)
    assert root.get("class") == "own-background"


@pytest.mark.parametrize("background", ["none", "white"])
def test_text_is_left_alone(background: str) -> None:
    root = ElementTree.fromstring(inline_svg(figure(background), "f0-", "a < b"))
    assert '<b>#000000</b> "url(#x)"' in ["".join(part.itertext()) for part in root.iter("text")]
    assert root.get("aria-label") == "a < b"


def test_ids_of_two_pictures_differ() -> None:
    ids = [
        {part.get("id") for part in ElementTree.fromstring(inline_svg(figure("none"), prefix, "")).iter()} - {None}
        for prefix in ("f0-", "f1-")
    ]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])
