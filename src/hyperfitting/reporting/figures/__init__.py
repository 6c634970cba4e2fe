"""Figures of a sweep's records, with matplotlib: legible in gray, labeled with units.

What a kind of figure shows, and its fields, stand in `reporting.spec`; each kind has one function
here, in `curves`, `distributions`, `layers`, `texts` or `images`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from hyperfitting.reporting.figures import curves, distributions, images, layers, texts
from hyperfitting.reporting.figures.style import STYLE, NoDataError
from hyperfitting.reporting.figures.values import DrawnValue, drawn_values
from hyperfitting.reporting.spec import FigureSpec
from hyperfitting.reporting.sweep_records import SweepRecords
from hyperfitting.runtime.files import replacing

__all__ = ["NoDataError", "RenderedFigure", "draw", "render"]

_KINDS: dict[str, Callable[[SweepRecords, Any], Figure]] = {
    "curves": curves.curves,
    "line_plot": curves.line_plot,
    "bars": curves.bars,
    "scatter": curves.scatter,
    "per_position": curves.per_position,
    "per_layer": layers.per_layer,
    "rank_shift": layers.rank_shift,
    "histogram": distributions.histogram,
    "agreement": distributions.agreement,
    "ranks": distributions.ranks,
    "next_tokens": distributions.next_tokens,
    "text": texts.text,
    "image_grid": images.image_grid,
}


_TIMESTAMPS = {"pdf": "CreationDate", "png": "Software", "svg": "Date"}
"""Metadata left out, which differ from one drawing or version of matplotlib to the next."""


@dataclass(frozen=True)
class RenderedFigure:
    """A figure of a report."""

    name: str
    caption: str
    svg: bytes = b""
    """Empty: there is nothing to draw, for the reason in `missing`."""
    missing: str = ""
    values: Sequence[DrawnValue] = ()
    """Those of curves, plain bars and matrices (see `values`)."""


def draw(sweep: SweepRecords, spec: FigureSpec) -> Figure:
    """Return a figure.

    Raises:
        NoDataError: no run that it needs has finished.
        UserError: it names an axis that does not exist.
    """
    if not any(True for _ in sweep.finished()):
        raise NoDataError("no run has finished")
    with mpl.rc_context(STYLE):
        return _KINDS[spec.kind](sweep, spec)


def render(sweep: SweepRecords, name: str, spec: FigureSpec, folder: Path) -> RenderedFigure:
    """Write a figure as `NAME.svg`, `.pdf` and `.png`, if there is something to draw."""
    caption = spec.caption or name
    try:
        figure = draw(sweep, spec)
    except NoDataError as error:
        return RenderedFigure(name, caption, missing=str(error))
    for suffix in ("pdf", "png", "svg"):
        with replacing(folder / f"{name}.{suffix}") as temporary:
            _save(figure, temporary, suffix)
    svg = (folder / f"{name}.svg").read_bytes()
    return RenderedFigure(name, caption, svg, values=drawn_values(figure))


def _save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure; the same figure gives the same file."""
    metadata = {_TIMESTAMPS[suffix]: None}
    with mpl.rc_context(STYLE):
        figure.savefig(path, format=suffix, dpi=200, bbox_inches="tight", metadata=metadata)
