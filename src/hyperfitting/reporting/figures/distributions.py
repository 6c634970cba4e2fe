"""Distributions: overlap with the training data, agreement, ranks and next tokens."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hyperfitting.formatting import printable_line
from hyperfitting.record.schema import NextToken
from hyperfitting.reporting.figures.style import (
    BAR_COLOR,
    PANEL_WIDTH,
    NoDataError,
    draw_matrix,
    grouped,
    legend_label,
    make_panels,
)
from hyperfitting.reporting.next_tokens import changed_positions
from hyperfitting.reporting.spec import AgreementSpec, HistogramSpec, NextTokensSpec, RanksSpec
from hyperfitting.reporting.sweep_records import SweepRecords

_CONTEXT_CHARACTERS = 60
_RANK_BINS = np.array([1, 2, 3, 6, 11, 31, 101, 1001, np.inf])
_RANK_LABELS = ["1", "2", "3-5", "6-10", "11-30", "31-100", "101-1000", "over 1000"]
_NO_PREDICTIONS = "predictions.npz beside their records"


def histogram(sweep: SweepRecords, spec: HistogramSpec) -> Figure:
    """Draw the share of texts by the length of their longest overlap (Figure 3)."""
    figure, (panel,) = make_panels(1)
    for label, group in grouped(sweep, spec.lines):
        counts = [np.array(record.overlap_histogram.tuned) for _, record in group]
        longest = max(map(len, counts))
        total = np.sum([np.pad(c, (0, longest - len(c))) for c in counts], axis=0)
        percent = 100 * total / total.sum()
        panel.plot(range(longest), percent, label=legend_label(label), drawstyle="steps-mid",
                   marker="")  # fmt: skip
    panel.set(xlabel="longest overlap with the training data, tokens", ylabel="texts, %")
    panel.legend()
    return figure


def agreement(sweep: SweepRecords, spec: AgreementSpec) -> Figure:
    """Draw how often the tuned models of two runs have the same top-1 token (Figure 5, left)."""
    top1 = {}
    for label, [(run, _), *_] in grouped(sweep, spec.axis):
        if run.predictions is not None:
            top1[label] = run.predictions["tuned/top1"]
    if len(top1) < 2:
        raise NoDataError(f"fewer than two runs have {_NO_PREDICTIONS}")
    if len({tokens.shape for tokens in top1.values()}) > 1:
        raise NoDataError("the runs predict texts of different lengths")
    size = len(top1)
    percent = np.array([[100 * np.mean(a == b) for b in top1.values()] for a in top1.values()])
    figure, (panel,) = make_panels(1, 1.2 + 0.7 * size, 0.8 + 0.55 * size)
    draw_matrix(panel, percent, "{:.1f}")
    panel.set_xticks(range(size), list(top1), rotation=30)
    panel.set_yticks(range(size), list(top1))
    panel.set(title="same top-1 token, % of positions")
    return figure


def ranks(sweep: SweepRecords, spec: RanksSpec) -> Figure:
    """Draw the rank of the reference token under the base and the tuned model (Figure 7).

    Left, the share of positions at which it is among the first k, by k; right, of the positions of
    each rank under the base model, the share of each rank under the tuned model.
    """
    base, tuned = None, {}
    for label, [(run, _), *_] in grouped(sweep, spec.lines):
        if run.predictions is not None:
            base = run.predictions["base/rank"].ravel() if base is None else base
            tuned[label] = run.predictions["tuned/rank"].ravel()
    if base is None:
        raise NoDataError(f"no run has {_NO_PREDICTIONS}")
    figure, panels = make_panels(2)
    limits = np.unique(np.round(np.logspace(0, 4, 60)).astype(int))
    for label, rank in {"base": base, **tuned}.items():
        panels[0].plot(limits, _percent_within(rank, limits), label=legend_label(label), marker="")
    panels[0].set(xscale="log", xlabel="k", ylabel="reference token among the first k, %")
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].legend()
    counts = np.histogram2d(base, next(iter(tuned.values())), [_RANK_BINS, _RANK_BINS])[0]
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    draw_matrix(panels[1], percent, "{:.0f}", font_size=6, origin="lower")
    panels[1].set_xticks(range(len(_RANK_LABELS)), _RANK_LABELS, rotation=45)
    panels[1].set_yticks(range(len(_RANK_LABELS)), _RANK_LABELS)
    panels[1].set(xlabel="rank, tuned", ylabel="rank, base", title="% of a row")
    return figure


def _percent_within(rank: NDArray[Any], limits: NDArray[Any]) -> list[float]:
    return [float(100 * np.mean(rank <= limit)) for limit in limits]


def next_tokens(sweep: SweepRecords, spec: NextTokensSpec) -> Figure:
    """Draw the most likely next tokens of both models at some positions of a text (Figure 4).

    The positions are those of `changed_positions`; a star marks tokens that never occur in the
    training data.
    """
    for _, record in sweep.finished():
        if spec.dataset in record.next_tokens:
            positions = changed_positions(record.next_tokens[spec.dataset], spec.count)
            break
    else:
        raise NoDataError(f"no run has evaluation.top_tokens of the dataset {spec.dataset}")
    figure = Figure(figsize=(2 * PANEL_WIDTH, 1.9 * len(positions)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(positions), 2, squeeze=False)
    for row, position in zip(panels, positions, strict=True):
        context = printable_line(position.context)[-_CONTEXT_CHARACTERS:]
        titles = (f"…{context}\nbase", "tuned")
        for panel, tokens, title in zip(row, (position.base, position.tuned), titles, strict=True):
            panel.barh(range(len(tokens)), [token.probability for token in tokens],
                       color=BAR_COLOR, edgecolor="black", linewidth=0.5)  # fmt: skip
            panel.set_yticks(range(len(tokens)), [_token_label(token) for token in tokens])
            panel.set(xlim=(0, 1), xlabel="probability")
            panel.set_title(title, loc="left", fontsize=8)
            panel.invert_yaxis()
    return figure


def _token_label(token: NextToken) -> str:
    label = repr(printable_line(token.text))
    return label if token.in_training_data else f"{label} *"
