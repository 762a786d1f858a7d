import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from fedelta.core.program import Report
from fedelta.observe.intervals import interval
from fedelta.observe.plots import COLOURS, comparison_plot, gain_bars
from fedelta.observe.series import Gain, Method


def gains(values: dict[str, list[float]]) -> list[Gain]:
    return [Gain(site=site, values=own) for site, own in values.items()]


def test_gains_are_sorted_and_losses_have_their_colour() -> None:
    figure = gain_bars(gains({"a": [0.01, 0.03], "b": [-0.1, -0.2], "c": [0.3, 0.5]}), "test_accuracy")
    (axes,) = figure.axes
    bars = sorted(axes.patches, key=lambda bar: bar.get_x())
    assert [round(bar.get_height(), 6) for bar in bars] == [40, 2, -15]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [COLOURS[0], COLOURS[0], COLOURS[1]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "a", "b"]
    assert "points" in axes.get_ylabel()
    assert len(axes.collections) == 3  # whiskers


def test_of_one_seed_there_are_no_whiskers_and_a_loss_is_in_its_own_unit() -> None:
    figure = gain_bars(gains({"a": [0.5], "b": [-0.25]}), "validation_loss")
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, -0.25]
    assert axes.get_ylabel() == "validation loss less by"
    assert not axes.collections


def test_of_many_sites_there_are_no_names() -> None:
    (axes,) = gain_bars(gains({f"s{n}": [n / 100, n / 50] for n in range(80)}), "test_accuracy").axes
    assert len(axes.patches) == 80
    assert not axes.get_xticklabels()
    assert "sites" in axes.get_xlabel()


def test_a_method_keeps_its_colour_where_another_has_nothing_to_show() -> None:
    def run(**metrics: float) -> list[Report]:
        return [Report(round=round, metrics={"test_accuracy": 0.5, **metrics}) for round in (1, 2)]

    methods = [
        Method(name="one", scores=[0.5], runs=[run()]),
        Method(name="two", scores=[0.5], runs=[run(drift=1.5)]),
        Method(name="a line", scores=[0.5], reference=True),
        Method(name="no line", scores=[0.5], reference=False),
    ]
    for metric, shown in (("test_accuracy", {"one": 0, "two": 1}), ("drift", {"two": 1})):
        (axes,) = comparison_plot(methods, metric).axes
        colours = {line.get_label(): line.get_color() for line in axes.get_lines()}
        assert colours.pop("a line") not in COLOURS
        assert colours == {name: COLOURS[position] for name, position in shown.items()}


def test_one_round_alone_shows_its_interval() -> None:
    runs = [[Report(round=0, metrics={"test_accuracy": value})] for value in (0.5, 0.6)]
    (axes,) = comparison_plot([Method(name="m", scores=[0.5, 0.6], runs=runs)], "test_accuracy").axes
    (whisker,) = [lines for lines in axes.collections if isinstance(lines, LineCollection)]
    (segment,) = whisker.get_segments()
    expected = interval([0.5, 0.6])
    assert segment[:, 1].tolist() == pytest.approx([expected.low, expected.high])
