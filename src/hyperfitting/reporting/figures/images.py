"""Completed images beside each other (Figure 6 of Carlsson et al.)."""

from collections.abc import Iterator

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hyperfitting.record.schema import Record, Side
from hyperfitting.reporting.figures.style import NoDataError, grouped
from hyperfitting.reporting.images import enlarged, picture
from hyperfitting.reporting.spec import ImageGridSpec
from hyperfitting.reporting.sweep_records import SweepRecords
from hyperfitting.reporting.texts import base_model_names, rows_by_context

_INCHES = 0.8
"""Of an image."""
Column = tuple[str, Record, Side | None]
"""Heading, and whose images; none: the contexts."""


def image_grid(sweep: SweepRecords, spec: ImageGridSpec) -> Figure:
    """Draw contexts, completions and the real images, a row for each context (Figure 6)."""
    columns = list(_columns(sweep, spec))
    if not columns:
        raise NoDataError("no run is of images")
    rows = [rows_by_context(record) for _, record, _ in columns]
    shared = [context for context in rows[0] if all(context in others for others in rows)]
    contexts = shared[spec.first : spec.first + spec.count]
    if not contexts:
        raise NoDataError(f"the runs have {len(shared)} images in common")
    size = (_INCHES * len(columns), _INCHES * len(contexts) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(contexts), len(columns), squeeze=False)
    for context, line in zip(contexts, panels, strict=True):
        for (_, record, side), by_context, panel in zip(columns, rows, line, strict=True):
            pixels = picture(record, by_context[context], side)
            panel.imshow(enlarged(pixels), interpolation="nearest")
            panel.set_axis_off()
    for (heading, *_), panel in zip(columns, panels[0], strict=True):
        panel.set_title(heading, fontsize=6, wrap=True)
    return figure


def _columns(sweep: SweepRecords, spec: ImageGridSpec) -> Iterator[Column]:
    """Yield the columns: contexts, a column for each label or model, and the real images."""
    groups = [
        (label, run.name, record)
        for label, [(run, record), *_] in grouped(sweep, spec.columns)
        if record.image is not None
    ]
    if not groups:
        return
    yield "context", groups[0][2], None
    names = base_model_names(sweep)
    seen: set[str] = set()
    for label, run, record in groups:
        if spec.columns is None and names[run] not in seen:
            seen.add(names[run])
            yield names[run], record, "base"
        if spec.columns is not None or record.is_tuned:
            yield label, record, "tuned"
    yield "real image", groups[0][2], "reference"
