"""The plot of named lines, which the figures of tables need and [`hf_sara.analysis`] does not have."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LAYER_LABELS = 16
MARKERS = "os^Dv*PX"


def plot_lines(
    series: Mapping[str, tuple[Sequence[Any], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    path: str | PathLike | None = None,
    title: str | None = None,
    log_x: bool = False,
    categories: Sequence[str] = (),
    names: Mapping[str, Sequence[str]] | None = None,
) -> "Figure":
    """
    Draw named series of points as lines, as in the paper's Figures 3 to 6 and 9.

    Args:
        series (`Mapping[str, tuple[Sequence, Sequence[float]]]`): By name, the values on the x axis (numbers, or texts
            for categories) and those on the y axis.
        xlabel (`str`): What is on the x axis, with its unit.
        ylabel (`str`): What is on the y axis, with its unit.
        path (`str` or `os.PathLike`, *optional*): The image file to write. Its ending gives the format.
        title (`str`, *optional*): Title.
        log_x (`bool`, *optional*, defaults to `False`): Logarithmic x axis, for counts of parameters.
        categories (`Sequence[str]`, *optional*): The order of text on the x axis; by default that of its appearance.
        names (`Mapping[str, Sequence[str]]`, *optional*): What to write at the points of a series, by its name.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib. Install it with: pip install 'hf_sara[plot]'") from error
    figure = Figure(figsize=(7.4, 4.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if categories:
        axes.xaxis.update_units(list(categories))
    for index, (name, (x, y)) in enumerate(series.items()):
        axes.plot(x, y, marker=MARKERS[index % len(MARKERS)], label=name)
        for place, value, text in zip(x, y, (names or {}).get(name, ()), strict=False):
            axes.annotate(text, (place, value), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    if names:
        axes.margins(0.1, 0.12)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)
    values = [value for x, _ in series.values() for value in x]
    if log_x:
        _log_axis(axes, max(values) / min(values))
    elif all(isinstance(value, int) for value in values):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside center right")
    if title is not None:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path)
    return figure


def _log_axis(axes: "Axes", span: float) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    axes.set_xscale("log")
    # The axis needs several numbers, so that values can be read. A range of less than a factor of 10 may contain no
    # power of ten, so more multiples of it are shown there. A range of less than a factor of 2 may contain none of
    # these either, so its numbers are evenly spaced.
    within = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if span < 10 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=within) if span > 2 else MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
