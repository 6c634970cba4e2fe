"""The values of curves, bars and matrices that figures draw, as CSV.

They are read from the artists of a drawn figure: lines with their bands, bars and labeled matrices.
Numbers with error bars are left out: they are cells, which tables can show.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PolyCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from hyperfitting.reporting.tables import csv_text

FILE = "curves.csv"
_HEADINGS = ["figure", "panel", "line", "x", "value", "low", "high"]
_MAX_POINTS = 256
"""Of a line: a longer one is thinned evenly, to points that include its first and last."""


@dataclass(frozen=True)
class DrawnValue:
    """One value of a figure."""

    panel: str
    """Title of the panel, or else the label of its vertical axis."""
    line: str
    """Label of the line; of a matrix, of the row."""
    x: str
    """Position on the horizontal axis; of a bar or a column of a matrix, its label."""
    value: float
    low: float = np.nan
    """Lower end of the band; NaN: there is none."""
    high: float = np.nan


def drawn_values(figure: Figure) -> list[DrawnValue]:
    """Return the values of all panels of a figure."""
    return [value for panel in figure.axes for value in _panel_values(panel)]


def to_csv(values: Iterable[tuple[str, DrawnValue]]) -> str:
    """Return values, each with the name of its figure, as CSV with 6 significant digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_HEADINGS)
    for name, drawn in values:
        numbers = (drawn.value, drawn.low, drawn.high)
        texts = map(csv_text, (name, drawn.panel, drawn.line, drawn.x))
        writer.writerow([*texts, *("" if np.isnan(n) else f"{n:.6g}" for n in numbers)])
    return out.getvalue()


def _panel_values(panel: Axes) -> Iterator[DrawnValue]:
    title = panel.get_title(loc="left") or panel.get_title() or panel.get_ylabel()
    title = " ".join(title.split())
    cells = {c.lines[0] for c in panel.containers if isinstance(c, ErrorbarContainer)}
    artists = [artist for artist in panel.get_children() if artist not in cells]
    for i, artist in enumerate(artists):
        if _is_curve(artist):
            yield from _line_values(title, artist, _band(artists[i + 1 :]), panel.xaxis)
        elif isinstance(artist, AxesImage) and _label(artist):
            yield from _matrix_values(title, artist, panel)
    for container in panel.containers:
        if isinstance(container, BarContainer) and container.errorbar is None:
            yield from _bar_values(title, container, panel)


def _is_curve(artist: Artist) -> TypeGuard[Line2D]:
    """Return whether it is a line, not only markers, such as the caps of error bars."""
    return isinstance(artist, Line2D) and artist.get_linestyle() != "None"


def _label(artist: Artist | BarContainer) -> str:
    label = str(artist.get_label()).strip()
    return "" if label.startswith("_") else label  # one that matplotlib gives


def _band(following: Iterable[Artist]) -> dict[float, tuple[float, float]]:
    """Return the band around a line by x, which is drawn before the next line."""
    for artist in following:
        if _is_curve(artist):
            break
        if isinstance(artist, PolyCollection):
            by_x: dict[float, list[float]] = {}
            for path in artist.get_paths():  # several where points have no interval
                for x, y in np.asarray(path.vertices):
                    by_x.setdefault(float(x), []).append(float(y))
            return {x: (min(ys), max(ys)) for x, ys in by_x.items()}
    return {}


def _line_values(
    title: str, line: Line2D, band: dict[float, tuple[float, float]], axis: Axis
) -> Iterator[DrawnValue]:
    xs, ys = (np.asarray(data, dtype=float) for data in line.get_data())
    kept = np.linspace(0, len(xs) - 1, min(len(xs), _MAX_POINTS)).round().astype(int)
    formatter = axis.get_major_formatter()
    for x, y in zip(xs[kept], ys[kept], strict=True):
        name = formatter(x) if isinstance(formatter, FuncFormatter) else f"{x:.6g}"
        low, high = band.get(float(x), (np.nan, np.nan))
        yield DrawnValue(title, _label(line), name, float(y), low, high)


def _matrix_values(title: str, image: AxesImage, panel: Axes) -> Iterator[DrawnValue]:
    rows, columns = _tick_labels(panel.yaxis), _tick_labels(panel.xaxis)
    for (row, column), value in np.ndenumerate(np.asarray(image.get_array())):
        yield DrawnValue(title, rows[row], columns[column], float(value))


def _bar_values(title: str, container: BarContainer, panel: Axes) -> Iterator[DrawnValue]:
    horizontal = container.orientation == "horizontal"
    names = _tick_labels(panel.yaxis if horizontal else panel.xaxis)
    for patch in container.patches:
        x, y = patch.get_center()
        name = names[round(y if horizontal else x)]
        value = patch.get_width() if horizontal else patch.get_height()
        yield DrawnValue(title, _label(container), name, float(value))


def _tick_labels(axis: Axis) -> dict[int, str]:
    """Return the labels of an axis of categories by position."""
    labels = [label.get_text() for label in axis.get_ticklabels()]
    return dict(zip(map(round, axis.get_ticklocs()), labels, strict=True))
