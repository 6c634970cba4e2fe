"""What all figures share: style, panels, and the grouping of runs by an axis of the sweep."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hyperfitting.errors import no_such
from hyperfitting.record.schema import Record
from hyperfitting.reporting.sweep_records import RunEntry, SweepRecords

PANEL_WIDTH, PANEL_HEIGHT = 3.3, 2.5
"""Inches of a panel: one fits a paper's column."""
PAGE_WIDTH = 6.9
"""Inches of several panels side by side, so that text is printed at its size; three to a row."""
_PER_ROW = 3
BAR_COLOR = "#9ecae1"
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "legend.frameon": False,
    "svg.hashsalt": "hyperfitting",
    "pdf.fonttype": 42,  # TrueType, embedded: journals refuse Type 3
    "text.parse_math": False,  # a $ is a dollar, in labels and in texts of models
    "text.hinting": "none",  # glyphs as wide as the font states, at any size
    # distinguished in gray by dash and marker, in color as Okabe and Ito (2008)
    "axes.prop_cycle": cycler(
        color=["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    )
    + cycler(linestyle=["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))])
    + cycler(marker=["o", "s", "^", "D", "v", "P", "X"]),
}


class NoDataError(Exception):
    """No record has what a figure needs; the message says what is missing."""


def make_panels(
    count: int, width: float = PANEL_WIDTH, height: float = PANEL_HEIGHT
) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side, of this size in inches, or as fits the page."""
    n_rows, n_columns = -(-count // _PER_ROW), min(count, _PER_ROW)
    size = (min(width * n_columns, max(width, PAGE_WIDTH)), height * n_rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(np.asarray(figure.subplots(n_rows, n_columns, squeeze=False)).flat)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def grouped(
    sweep: SweepRecords, axis: str | None
) -> Iterator[tuple[str, list[tuple[RunEntry, Record]]]]:
    """Yield the finished runs by their label of an axis; none: each run by itself."""
    finished = list(sweep.finished())
    if axis is None:
        yield from ((run.name, [(run, record)]) for run, record in finished)
        return
    for label in axis_labels(sweep, axis):
        group = [(run, record) for run, record in finished if run.labels.get(axis) == label]
        if group:
            yield label, group


def axis_labels(sweep: SweepRecords, axis: str) -> list[str]:
    """Return the labels of an axis.

    Raises:
        UserError: the sweep has no such axis.
    """
    labels = sweep.labels(axis)
    if not labels:
        raise no_such("axis", "hydra.sweeper.report.figures", axis, sweep.axes)
    return labels


def draw_matrix(
    panel: Axes, percent: NDArray[Any], form: str, font_size: float | None = None, **options: Any
) -> None:
    """Draw a matrix of percentages, darker for more, with its numbers."""
    panel.imshow(percent, cmap="Greys", vmin=0, vmax=100, label="%", **options)
    for (row, column), value in np.ndenumerate(percent):
        color = "white" if value > 60 else "black"
        panel.text(column, row, form.format(value), ha="center", va="center", fontsize=font_size,
                   color=color)  # fmt: skip
    panel.grid(visible=False)


def legend_label(text: str) -> str:
    """Return a text as a label in a legend; matplotlib leaves out those that begin with _."""
    return f" {text}" if text.startswith("_") else text
