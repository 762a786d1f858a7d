"""The overview: counts, skew, table and plot."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedelta.core.errors import BadInput
from fedelta.data.overview import Overview, overview
from fedelta.data.partition import IID, Dirichlet, Shards

site_labels = st.dictionaries(st.text(max_size=40), st.lists(st.integers(0, 3), max_size=20), min_size=1, max_size=30)


def printed(seen: Overview, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(seen.table())
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def of_partition(part: IID | Dirichlet | Shards, classes: int, sites: int, each: int) -> Overview:
    labels = np.repeat(np.arange(classes), each)
    rows = part(labels, sites, 0)
    return overview({f"site-{k}": labels[own] for k, own in enumerate(rows)}, [f"c{c}" for c in range(classes)])


@given(site_labels)
def test_counts_and_skew_against_plain_python(sites: dict[str, list[int]]) -> None:
    seen = overview(sites, "abcd")
    assert seen.names == tuple(sites)
    assert seen.classes == ("a", "b", "c", "d")
    assert seen.counts.tolist() == [[labels.count(c) for c in range(4)] for labels in sites.values()]
    everything = [label for labels in sites.values() for label in labels]
    distances = [
        sum(abs(labels.count(c) / len(labels) - everything.count(c) / len(everything)) for c in range(4)) / 2
        for labels in sites.values()
        if labels
    ]
    assert seen.skew() == pytest.approx(sum(distances) / max(len(distances), 1))
    assert 0 <= seen.skew() <= 1


def test_skew_from_none_to_all() -> None:
    assert overview({"a": [0, 1], "b": [0, 0, 1, 1]}, ["x", "y"]).skew() == 0
    assert overview({str(k): [k] * 5 for k in range(10)}, [str(k) for k in range(10)]).skew() == pytest.approx(0.9)
    iid, mild, strong = (
        of_partition(part, 10, 20, 600).skew() for part in (IID(), Dirichlet(alpha=1.0), Dirichlet(alpha=0.1))
    )
    assert iid < 0.1 < mild < strong < 1


def test_a_table_of_few_sites_shows_every_number() -> None:
    seen = overview({"rome": [0, 0, 1], "oslo": []}, ["spam", "ham"])
    lines = printed(seen).splitlines()
    cells = [line.split() for line in lines if line.strip() and "──" not in line]
    assert cells[:4] == [
        ["site", "rows", "spam", "ham"],
        ["rome", "3", "2", "1"],
        ["oslo", "0", "·", "·"],
        ["all", "2", "3", "2", "1"],
    ]
    assert seen.summary().startswith("rows per site: 0 to 3")


def test_a_table_of_many_sites_is_short_and_loses_no_row() -> None:
    text = printed(of_partition(Shards(), 10, 100, 6000))
    assert len(text.splitlines()) < 32
    assert "site-19 " in text
    assert "site-20 " not in text
    assert "… 80 more" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    shown = sum(int(cells[1]) for name, cells in rows.items() if name.startswith("site-"))
    assert shown + int(rows["…"][3].replace(",", "")) == 60_000
    assert rows["all"][1:3] == ["100", "60,000"]


def test_a_table_of_many_classes_names_the_most_frequent() -> None:
    text = printed(overview({"a": [0, 5, 5], "b": []}, [f"kind {c}" for c in range(13)]))
    assert "kind 5 (67%)" in text
    assert "kind 4" not in text
    b_line = next(line for line in text.splitlines() if line.split()[:1] == ["b"])
    assert b_line.split() == ["b", "0", "0", "–"]


def test_names_in_a_table_are_no_markup() -> None:
    text = printed(overview({"[bold]a": [0], "b[/x]": [1]}, ["[red]", "[/]"]))
    assert all(name in text for name in ("[bold]a", "b[/x]", "[red]", "[/]"))
    assert "[/]3 (100%)" in printed(overview({"a": [3]}, [f"[/]{c}" for c in range(13)]))


@pytest.mark.parametrize(("sites", "classes"), [(1, 1), (8, 10), (130, 10), (30, 130)])
def test_the_plot_shows_the_counts(sites: int, classes: int) -> None:
    seen = of_partition(IID(), classes, sites, 200)
    figure = seen.plot()
    bars, cells, *_ = figure.axes
    assert [bar.get_height() for bar in bars.patches] == seen.counts.sum(axis=1).tolist()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(cells.collections[0].get_array()), seen.counts.T)
    numbers = {text.get_text() for text in cells.texts}
    assert numbers <= {f"{count:,}" for count in seen.counts.flatten()}
    assert bool(numbers) == (sites <= 8)
    assert max(figure.get_size_inches()) < 16
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    assert file.getvalue().startswith(b"\x89PNG")


def test_names_in_a_plot_are_as_given_or_cut() -> None:
    cells = overview({"$x$ & <b>": [0], "z" * 99: [1]}, ["a_b", "y" * 99]).plot().axes[1]
    assert [tick.get_text() for tick in cells.get_xticklabels()] == [r"\$x\$ & <b>", "z" * 21 + "…"]
    assert [tick.get_text() for tick in cells.get_yticklabels()] == ["a_b", "y" * 21 + "…"]


@pytest.mark.parametrize(
    ("sites", "classes", "message"),
    [
        ({}, ["a"], "got 0 and 1"),
        ({"s": [0]}, [], "got 1 and 0"),
        ({"s": [0, 2, 1]}, ["a", "b"], r"site 's' has the label 2, outside 0\.\.1"),
        ({"s": [-1]}, ["a", "b"], "has the label -1"),
        ({"s": [0.0]}, ["a", "b"], "one row of integers, got float64"),
        ({"s": ["a"]}, ["a", "b"], "one row of integers"),
        ({"s": [[0], [1]]}, ["a", "b"], r"one row of integers, got int64 \(2, 1\)"),
    ],
)
def test_wrong_labels(sites: dict[str, list[int]], classes: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        overview(sites, classes)


def test_counts_must_fit_the_names() -> None:
    with pytest.raises(BadInput, match="have shape"):
        Overview(names=("a",), classes=("x", "y"), counts=np.zeros((2, 1), dtype=np.int64))
