"""Empty figures, with panels or without, and their files.

Figures are matplotlib's `Figure` objects. They are made without pyplot, so that no window system and no global state
is touched.
"""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, dpi: int) -> "Figure":
    """
    An empty figure, of a width and a height in inches.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib. Install it with: pip install 'hf_sara[plot]'") from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def new_panels(names: Sequence[str], width: float, height: float) -> "tuple[Figure, dict[str, Axes]]":
    """A figure with a panel per name, two of them side by side. Width and height of a panel are in inches."""
    columns, rows = min(2, len(names)), math.ceil(len(names) / 2)
    figure = new_figure(1.0 + width * columns, height * rows, dpi=120)
    return figure, {name: figure.add_subplot(rows, columns, index) for index, name in enumerate(names, start=1)}


def finish(figure: "Figure", path: str | os.PathLike | None, title: str | None = None) -> "Figure":
    """
    Give a figure its title, and write it to a file if there is a path, whose ending gives the format.
    """
    if title is not None:
        figure.suptitle(title)
    if path is not None:
        if os.fspath(path).lower().endswith(".png"):
            Path(path).write_bytes(png_of(figure))
        else:
            figure.savefig(path)
    return figure


def png_of(figure: "Figure") -> bytes:
    """The bytes of the PNG file of a figure, which does not name the version of matplotlib."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
