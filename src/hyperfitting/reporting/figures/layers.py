"""Base and tuned model compared: by layer, and which tokens take whose place."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyperfitting.formatting import printable_line
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.mechanism import layer_label
from hyperfitting.record.mechanism import LayerCurve, RankShift, TokenChange
from hyperfitting.record.schema import Record
from hyperfitting.reporting.cells import Cell, contexts, over_runs
from hyperfitting.reporting.figures.style import (
    BAR_COLOR,
    NoDataError,
    grouped,
    legend_label,
    make_panels,
)
from hyperfitting.reporting.spec import PerLayerSpec, RankShiftSpec
from hyperfitting.reporting.sweep_records import SweepRecords

_MAX_TICKS = 9
_Y_LABEL_WIDTH = 28
"""Characters of a line: axes are lower here, above the names of the layers."""


def per_layer(sweep: SweepRecords, spec: PerLayerSpec) -> Figure:
    """Draw numbers by layer with their intervals; of several runs, their mean as in tables."""
    figure, panels = make_panels(len(spec.panels))
    drawn = False
    for panel, (y_label, keys) in zip(panels, spec.panels.items(), strict=True):
        groups = list(grouped(sweep, spec.lines))
        for label, group in groups:
            for key in keys:
                curves = [
                    (record, record.mechanism.per_layer[key])
                    for _, record in group
                    if record.mechanism is not None and key in record.mechanism.per_layer
                ]
                if curves:
                    names = [label] * (len(groups) > 1) + key_labels(key, keys)
                    _draw_curve(panel, curves, legend_label(", ".join(names)))
                    drawn = True
        panel.set(ylabel=textwrap.fill(y_label, _Y_LABEL_WIDTH), xlabel="after block")
        if panel.get_legend_handles_labels()[1]:
            panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    if not drawn:
        raise NoDataError("no run has mechanism.measures of this")
    return figure


def key_labels(key: str, keys: list[str]) -> list[str]:
    """Return what tells a key from the others of its panel: its texts, what it measures.

    What all of them measure, such as the cosine similarity with and without outlier dimensions, is
    what the panel's axis says.
    """
    texts, name = key.rsplit("/", 1)
    all_texts, names = (set(part) for part in zip(*(k.rsplit("/", 1) for k in keys), strict=True))
    labels = [f"{texts} texts"] if len(all_texts) > 1 else []
    parts = {each: layer_label(each).split(", ") for each in names}
    if len(parts) > 1:
        common = set.intersection(*map(set, parts.values()))
        own = [part for part in parts[name] if part not in common]
        labels.append(", ".join(own) or "all dimensions")
    return labels


def _draw_curve(panel: Axes, curves: Sequence[tuple[Record, LayerCurve]], label: str) -> None:
    """Draw some runs' curve by layer, with intervals."""
    layers = curves[0][1].layers
    same = [(record, curve) for record, curve in curves if curve.layers == layers]
    estimates = [_over_runs(same, layer) for layer in range(len(layers))]
    means = np.array([e.mean if e else np.nan for e in estimates])
    intervals = [e.ci95 if e and e.ci95 else (np.nan, np.nan) for e in estimates]
    x = np.arange(len(layers))
    line = panel.plot(x, means, label=label, marker="")[0]
    # the state after the final norm is not one block further on
    outside = [i for i, layer in enumerate(layers) if not layer.startswith("block")]
    panel.plot(x[outside], means[outside], linestyle="", marker="o", color=line.get_color())
    low, high = np.array(intervals).T
    panel.fill_between(x, low, high, alpha=0.15, linewidth=0, color=line.get_color())
    step, last = max(1, len(layers) // _MAX_TICKS), len(layers) - 1
    ticks = [i for i in range(last) if i in outside or (i % step == 0 and i <= last - step)] + [
        last
    ]
    names = [layer.removeprefix("block ") for layer in layers]
    panel.set_xticks(ticks)
    panel.xaxis.set_major_formatter(lambda tick, _: names[round(tick)])
    panel.tick_params(axis="x", rotation=90)


def _over_runs(curves: Sequence[tuple[Record, LayerCurve]], layer: int) -> Estimate | None:
    """Return the mean of some runs at a layer; none: it is not defined in one of them."""
    cells = []
    for record, curve in curves:
        mean, ci95 = curve.mean[layer], curve.ci95[layer] if curve.ci95 else None
        if mean is None:
            return None
        texts = tuple(contexts(record))
        cells.append(Cell(Estimate(mean, ci95, len(texts)), evaluated_on=texts))
    return over_runs(cells)


def rank_shift(sweep: SweepRecords, spec: RankShiftSpec) -> Figure:
    """Draw the ranks of the changed choices under the base model, and the tokens that gain and
    lose most positions."""
    measured = (record.mechanism.ranks for _, record in sweep.finished() if record.mechanism)
    ranks = next((ranks for ranks in measured if ranks is not None), None)
    if ranks is None:
        raise NoDataError("no run has mechanism.measures=[ranks]")
    figure, panels = make_panels(3, height=0.9 + 0.17 * max(spec.count, len(ranks.edges)))
    _draw_ranks(panels[0], ranks)
    for panel, tokens, title in zip(
        panels[1:], (ranks.gained, ranks.lost), ("gain", "lose"), strict=True
    ):
        _draw_tokens(panel, tokens[: spec.count])
        panel.set_title(f"tokens that {title} most", loc="left", fontsize=8)
    panels[1].legend()
    return figure


def _draw_ranks(panel: Axes, ranks: RankShift) -> None:
    total = max(sum(ranks.counts), 1)
    last = [edge - 1 for edge in ranks.edges[1:]]
    labels = [
        str(low) if low == high else f"{low}-{high}"
        for low, high in zip(ranks.edges, last, strict=False)
    ]
    labels.append(f"over {ranks.edges[-1] - 1}")
    percent = [100 * count / total for count in ranks.counts]
    panel.bar(labels, percent, color=BAR_COLOR, edgecolor="black", linewidth=0.5)
    panel.tick_params(axis="x", rotation=45)
    panel.set(xlabel="rank under the base model", ylabel="changed choices, %")


def _draw_tokens(panel: Axes, tokens: list[TokenChange]) -> None:
    """Draw how often each model chooses some tokens."""
    y = np.arange(len(tokens))
    for offset, name, color in ((-0.2, "base", "white"), (0.2, "tuned", BAR_COLOR)):
        counts = [getattr(token, name) for token in tokens]
        panel.barh(y + offset, counts, 0.4, label=name, color=color, edgecolor="black",
                   linewidth=0.5)  # fmt: skip
    panel.set_yticks(y, [repr(printable_line(token.text)) for token in tokens])
    panel.set(xlabel="positions")
    panel.invert_yaxis()
