"""Curves and bars: training histories, and numbers over an axis of the sweep."""

import itertools
import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.registry import metric
from hyperfitting.reporting.cells import table_cell
from hyperfitting.reporting.figures.style import (
    BAR_COLOR,
    NoDataError,
    axis_labels,
    grouped,
    legend_label,
    make_panels,
)
from hyperfitting.reporting.spec import (
    BarsSpec,
    ColumnSpec,
    CurvesSpec,
    LinePlotSpec,
    PerPositionSpec,
    ScatterSpec,
)
from hyperfitting.reporting.sweep_records import SweepRecords

_Y_LABEL_WIDTH = 40
"""Characters of a line, as many as the axis is high."""


def curves(sweep: SweepRecords, spec: CurvesSpec) -> Figure:
    """Draw the training history: mean over a group's runs, with their range."""
    figure, panels = make_panels(len(spec.series))
    empty = True
    for label, group in grouped(sweep, spec.lines):
        histories = [record.history for _, record in group if record.history]
        if not histories:
            continue
        empty = False
        for panel, key in zip(panels, spec.series, strict=True):
            rows = [{row["epoch"]: row[key] for row in h if key in row} for h in histories]
            epochs = sorted(set.intersection(*map(set, rows)))
            values = np.array([[by_epoch[epoch] for epoch in epochs] for by_epoch in rows])
            line = panel.plot(epochs, values.mean(0), label=legend_label(label))[0]
            if len(values) > 1:
                panel.fill_between(epochs, values.min(0), values.max(0), alpha=0.15, linewidth=0,
                                   color=line.get_color())  # fmt: skip
    if empty:
        raise NoDataError("no run was trained")
    for panel, key in zip(panels, spec.series, strict=True):
        panel.set(xlabel="epoch", ylabel=metric(key).axis_label)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    handles, names = panels[0].get_legend_handles_labels()
    # above the panels: losses fill a corner that labels would cover
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), len(panels)))
    return figure


def line_plot(sweep: SweepRecords, spec: LinePlotSpec) -> Figure:
    """Draw numbers over an axis of the sweep, with intervals."""
    labels = axis_labels(sweep, spec.x)
    groups: list[dict[str, str]] = [{}]
    if spec.lines is not None:
        groups = [{spec.lines: label} for label in axis_labels(sweep, spec.lines)]
    numeric = all(_is_number(label) for label in labels)
    ticks = [float(label) if numeric else float(i) for i, label in enumerate(labels)]
    figure, panels = make_panels(len(spec.y))
    for panel, (y_label, column) in zip(panels, spec.y.items(), strict=True):
        for group in groups:
            points = {x: group | {spec.x: label} for x, label in zip(ticks, labels, strict=True)}
            _draw_line(panel, sweep, points, column, next(iter(group.values()), None))
        panel.set(xlabel=spec.x_label or spec.x, ylabel=y_label)
        if spec.log_x and numeric:
            panel.set_xscale("log", base=2)
        if not numeric or spec.log_x:
            panel.set_xticks(ticks, labels, rotation=0 if numeric else 30)
            panel.minorticks_off()
        if spec.lines is not None:
            panel.legend()
    return figure


def _draw_line(
    panel: Axes,
    sweep: SweepRecords,
    points: Mapping[float, Mapping[str, str]],
    column: ColumnSpec,
    label: str | None,
) -> None:
    """Draw one line through the runs with the labels given by position on the axis."""
    cells = {x: table_cell(sweep, labels, column) for x, labels in points.items()}
    estimates = {x: cell.estimate for x, cell in cells.items() if cell.estimate is not None}
    if estimates:
        means = [estimate.mean for estimate in estimates.values()]
        errors = np.array([_error_bar(estimate) for estimate in estimates.values()]).T  # (2, n)
        panel.errorbar(
            list(estimates), means, yerr=errors, label=label and legend_label(label), capsize=2
        )


def _error_bar(estimate: Estimate) -> tuple[float, float]:
    """Return how far the interval extends below and above the mean."""
    low, high = estimate.ci95 or (estimate.mean, estimate.mean)
    return estimate.mean - low, high - estimate.mean


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def bars(sweep: SweepRecords, spec: BarsSpec) -> Figure:
    """Draw numbers of every label of an axis as horizontal bars, with intervals."""
    labels = [label for label, _ in grouped(sweep, spec.rows)]
    figure, panels = make_panels(len(spec.y), height=0.6 + 0.28 * len(labels))
    for panel, (x_label, column) in zip(panels, spec.y.items(), strict=True):
        for y, label in enumerate(labels):
            estimate = table_cell(sweep, {spec.rows: label}, column).estimate
            if estimate is None:
                continue
            errors = np.array([_error_bar(estimate)]).T  # (2, 1)
            panel.barh(y, estimate.mean, xerr=errors, color=BAR_COLOR, edgecolor="black",
                       linewidth=0.5, error_kw={"linewidth": 0.8}, capsize=2)  # fmt: skip
        panel.set(xlabel=x_label)
        panel.set_yticks(range(len(labels)), labels if _is_first(panel) else [""] * len(labels))
        panel.invert_yaxis()
    return figure


def scatter(sweep: SweepRecords, spec: ScatterSpec) -> Figure:
    """Draw numbers against another number, a point for each label, with both intervals."""
    figure, panels = make_panels(len(spec.y))
    for label, _ in grouped(sweep, spec.points):
        x = table_cell(sweep, {spec.points: label}, spec.x).estimate
        for panel, column in zip(panels, spec.y.values(), strict=True):
            y = table_cell(sweep, {spec.points: label}, column).estimate
            if x is not None and y is not None:
                errors = [np.array([_error_bar(value)]).T for value in (x, y)]  # (2, 1)
                panel.errorbar(
                    x.mean, y.mean, xerr=errors[0], yerr=errors[1], marker="o", capsize=2,
                    label=legend_label(label),
                )  # fmt: skip
    if not any(panel.has_data() for panel in panels):
        raise NoDataError("no run has both numbers")
    for panel, y_label in zip(panels, spec.y, strict=True):
        panel.set(xlabel=spec.x_label, ylabel=textwrap.fill(y_label, _Y_LABEL_WIDTH))
    panels[0].legend()
    return figure


def _is_first(panel: Axes) -> bool:
    """Return whether it is the first panel of its row."""
    place = panel.get_subplotspec()
    return place is not None and place.is_first_col()


def per_position(sweep: SweepRecords, spec: PerPositionSpec) -> Figure:
    """Draw means over texts at each step of the continuations, as a moving average."""
    figure, panels = make_panels(len(spec.series))
    groups = list(grouped(sweep, spec.lines))
    for (label, group), side in itertools.product(groups, spec.sides):
        names = [label] * (len(groups) > 1 or len(spec.sides) == 1) + [side] * (len(spec.sides) > 1)
        for panel, key in zip(panels, spec.series, strict=True):
            steps = [record.steps(key, side) for _, record in group]
            shortest = min(map(len, steps))
            if shortest < spec.window:
                raise NoDataError(f"{label} has fewer than {spec.window} steps of {key} ({side})")
            mean = np.array([s[:shortest] for s in steps], dtype=float).mean(0)
            smooth = np.convolve(mean, np.ones(spec.window) / spec.window, mode="valid")
            x = (spec.window - 1) / 2 + 1 + np.arange(len(smooth))
            panel.plot(x, smooth, label=legend_label(", ".join(names)), marker="")
    for panel, key in zip(panels, spec.series, strict=True):
        y_label = metric(key).axis_label
        if spec.window > 1:
            y_label += f" (mean of {spec.window} steps)"
        panel.set(xlabel="new token", ylabel=textwrap.fill(y_label, _Y_LABEL_WIDTH))
    panels[0].legend()
    return figure
