"""What the tests look at in figures."""


def check(figure):
    """Nothing is clipped at the figure's edge, no legend covers a panel, and pyplot does not know of the figure."""
    from matplotlib._pylab_helpers import Gcf

    figure.draw_without_rendering()
    drawn, whole = figure.get_tightbbox(), figure.bbox_inches
    assert min(drawn.x0, drawn.y0) >= -0.01
    assert drawn.x1 <= whole.x1 + 0.01
    assert drawn.y1 <= whole.y1 + 0.01
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert not Gcf.figs


def numbers(axis):
    """The numbers that can be read on an axis."""
    low, high = sorted(axis.get_view_interval())
    return [
        text.get_text() for text in axis.get_ticklabels() if low <= text.get_position()[axis.axis_name == "y"] <= high
    ]
