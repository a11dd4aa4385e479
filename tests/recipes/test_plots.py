import sys

import pytest
from plotting import check, numbers

from harness.plots import plot_lines


@pytest.mark.parametrize(
    ("series", "log_x", "shown"),
    [
        ({"Mo-SARA": ([1, 3, 5, 7, 9], [31.2, 33.5, 35.1, 35.0, 34.2])}, False, ["1", "5", "9"]),
        ({"SARA": (["0-7", "8-15"], [0.31, 0.33]), "LoRA": (["0-7", "8-15"], [0.3, 0.34])}, False, ["0-7", "8-15"]),
        (
            {"SARA": ([54_000, 240_000], [1.4, 1.3]), "LoRA": ([57_600, 230_400], [1.3, 1.2])},
            True,
            ["60k", "100k", "200k"],
        ),
        ({"SARA": ([109_170, 115_200], [1.4, 1.3])}, True, ["110k"]),
        ({"SARA": ([109_170], [1.4]), "full": ([134_515_008], [1.2])}, True, ["200k", "1M", "100M"]),
    ],
)
def test_figure_of_lines(image, series, log_x, shown):
    figure = plot_lines(series, "the x axis", "score (%)", image, title="A title", log_x=log_x)
    check(figure)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("the x axis", "score (%)")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(series)
    assert [(list(x), list(y)) for x, y in series.values()] == [
        (list(line.get_xdata(orig=True)), list(line.get_ydata())) for line in axes.get_lines()
    ]
    assert set(shown) <= set(numbers(axes.xaxis))
    assert axes.get_xscale() == ("log" if log_x else "linear")
    assert len({line.get_marker() for line in axes.get_lines()}) == len(series)


def test_lines_have_their_categories_in_order_and_names_at_their_points(image):
    series = {"SARA": (["8-15"], [0.31]), "LoRA": (["0-7", "8-15"], [0.3, 0.34])}
    figure = plot_lines(series, "layers", "score", image, categories=["0-7", "8-15"], names={"LoRA": ["r 5", "r 10"]})
    check(figure)
    (axes,) = figure.axes
    assert numbers(axes.xaxis) == ["0-7", "8-15"]
    assert {text.get_text(): text.xy for text in axes.texts} == {"r 5": ("0-7", 0.3), "r 10": ("8-15", 0.34)}


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_sara\[plot\]'"):
        plot_lines({"a": ([1], [1])}, "x", "y", tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
