"""Figures of a sweep's records, with matplotlib: legible in grey, labelled with units.

A figure is described by its `kind` and the fields that its function takes:

    curves     series of the training history over epochs, a panel each
    against    numbers over an axis of the sweep
    bars       numbers of every member
    histogram  longest shared run with the training data
    along      a mean over texts at each step of the continuations
    agreement  how often two members' first choices are the same, for every two
    ranks      the rank of the reference token before and after hyperfitting
    distributions  the likeliest next tokens of one text, before and after
    text       one continuation of each member, coloured by how repetitive it is
"""

import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hyperfitting.errors import UserError, near_matches
from hyperfitting.reporting import glossary, next_tokens
from hyperfitting.reporting.colouring import stretches
from hyperfitting.reporting.sweeps import Entry, SweepRecords, value
from hyperfitting.results import Record

_WIDE, _HIGH = 3.4, 2.6
"""Inches of a panel: one fits a paper's column."""
_STYLE: Any = {
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
    "text.hinting": "none",  # letters as wide as the font says, at any size
    # told apart in grey by dash and mark, in colour as Okabe and Ito (2008) do
    "axes.prop_cycle": cycler(
        color=["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    )
    + cycler(linestyle=["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))])
    + cycler(marker=["o", "s", "^", "D", "v", "P", "X"]),
}
_SHADES = ("#ffffff", "#dddddd", "#bbbbbb", "#8f8f8f", "#555555")
_MONO_POINTS, _MONO_WIDTH = 7.5, 0.602
"""Points of the letters of a text, and their width in them (DejaVu Sans Mono: matplotlib's own)."""


class Nothing(Exception):
    """There are no records to draw a figure of; the message says what is missing."""


@dataclass(frozen=True)
class Drawn:
    """A figure as a report has it."""

    name: str
    caption: str
    svg: bytes = b""
    """Empty: there is nothing to draw, as `missing` says."""
    missing: str = ""


def draw(sweep: SweepRecords, name: str, described: Mapping[str, Any]) -> Figure:
    """Return a figure.

    Raises:
        Nothing: no member that it needs has finished.
        UserError: its description makes no sense.
    """
    at = f"hydra.sweeper.report.figures.{name}"
    fields = {str(k): v for k, v in described.items() if k not in ("kind", "caption")}
    kind = str(described.get("kind"))
    if kind not in _KINDS:
        raise UserError(
            "there is no such kind of figure",
            field=f"{at}.kind",
            value=kind,
            valid=", ".join(_KINDS),
            hint=near_matches(kind, _KINDS),
        )
    known = list(inspect.signature(_KINDS[kind]).parameters)[1:]
    for field, given in fields.items():
        if field not in known:
            raise UserError(
                f"figures of the kind {kind} have no such field",
                field=f"{at}.{field}",
                value=given,
                valid=", ".join(["kind", "caption", *known]),
                hint=near_matches(field, known),
            )
    if not any(True for _ in sweep.finished()):
        raise Nothing("no member has finished")
    with mpl.rc_context(_STYLE):
        return _KINDS[kind](sweep, **fields)


def save(figure: Figure, path: Path, kind: str) -> None:
    """Write a figure; the same figure gives the same file."""
    with mpl.rc_context(_STYLE):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(path, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)


def _panels(count: int, wide: float = _WIDE, high: float = _HIGH) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(wide * count, high), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.atleast_1d(np.asarray(figure.subplots(1, count))))


def _groups(
    sweep: SweepRecords, axis: str | None
) -> Iterator[tuple[str, list[tuple[Entry, Record]]]]:
    """Yield the finished members by their label of an axis; none: each by itself."""
    done = list(sweep.finished())
    if axis is None:
        yield from ((entry.name, [(entry, record)]) for entry, record in done)
        return
    for label in _labels(sweep, axis):
        found = [(e, r) for e, r in done if e.labels.get(axis) == label]
        if found:
            yield label, found


def _labels(sweep: SweepRecords, axis: str) -> list[str]:
    labels = sweep.labels(axis)
    if not labels:
        valid = ", ".join(sweep.axes)
        raise UserError("the sweep has no such axis", field="figures", value=axis, valid=valid)
    return labels


def curves(sweep: SweepRecords, series: Sequence[str], lines: str | None = None) -> Figure:
    """Draw the training history: mean over a group's members, with their range."""
    figure, panels = _panels(len(series))
    drawn = False
    for label, members in _groups(sweep, lines):
        histories = [record["history"] for _, record in members if record["history"]]
        if not histories:
            continue
        drawn = True
        for panel, key in zip(panels, series, strict=True):
            found = [{row["epoch"]: row[key] for row in h if key in row} for h in histories]
            epochs = sorted(set.intersection(*map(set, found)))
            values = np.array([[one[epoch] for epoch in epochs] for one in found])
            panel.plot(epochs, values.mean(0), label=label)
            if len(values) > 1:
                panel.fill_between(epochs, values.min(0), values.max(0), alpha=0.15, linewidth=0)
    if not drawn:
        raise Nothing("no member was trained")
    for panel, key in zip(panels, series, strict=True):
        panel.set(xlabel="epoch", ylabel=glossary.name(key))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend()
    return figure


def against(
    sweep: SweepRecords,
    x: str,
    y: Mapping[str, Mapping[str, Any]],
    lines: str | None = None,
    log_x: bool = False,
    x_label: str | None = None,
) -> Figure:
    """Draw numbers over an axis of the sweep, with intervals."""
    labels = _labels(sweep, x)
    groups = [None] if lines is None else _labels(sweep, lines)
    figure, panels = _panels(len(y))
    numeric = all(_is_number(label) for label in labels)
    places = (
        [float(label) for label in labels] if numeric else [float(i) for i in range(len(labels))]
    )
    for panel, (heading, column) in zip(panels, y.items(), strict=True):
        for group in groups:
            chosen = [{x: label} | ({lines: group} if lines and group else {}) for label in labels]
            found = [value(sweep, one, column) for one in chosen]
            there = [(place, v) for place, v in zip(places, found, strict=True) if not v.missing]
            if not there:
                continue
            at = [place for place, _ in there]
            means = [v.mean for _, v in there]
            ends = [v.ci95 or (v.mean, v.mean) for _, v in there]
            spread = [[m - e[0] for m, e in zip(means, ends, strict=True)],
                      [e[1] - m for m, e in zip(means, ends, strict=True)]]  # fmt: skip
            panel.errorbar(at, means, yerr=spread, label=group, capsize=2)
        panel.set(xlabel=x_label or x, ylabel=heading)
        if log_x and numeric:
            panel.set_xscale("log", base=2)
        if not numeric or log_x:
            panel.set_xticks(places, labels, rotation=0 if numeric else 30)
            panel.minorticks_off()
        if groups != [None]:
            panel.legend()
    return figure


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def bars(sweep: SweepRecords, y: Mapping[str, Mapping[str, Any]], rows: str) -> Figure:
    """Draw numbers of every label of an axis as horizontal bars, with intervals."""
    labels = [label for label, _ in _groups(sweep, rows)]
    figure, panels = _panels(len(y), high=0.6 + 0.28 * len(labels))
    for panel, (heading, column) in zip(panels, y.items(), strict=True):
        for place, label in enumerate(labels):
            found = value(sweep, {rows: label}, column)
            if found.missing:
                continue
            low, high = found.ci95 or (found.mean, found.mean)
            spread = [[found.mean - low], [high - found.mean]]
            panel.barh(place, found.mean, xerr=spread, color="#9ecae1", edgecolor="black",
                       linewidth=0.5, error_kw={"linewidth": 0.8}, capsize=2)  # fmt: skip
        panel.set(xlabel=heading)
        panel.set_yticks(range(len(labels)), labels if panel is panels[0] else [""] * len(labels))
        panel.invert_yaxis()
    return figure


def histogram(sweep: SweepRecords, lines: str | None = None) -> Figure:
    """Draw how many texts share a run of so many tokens with the training data (Figure 3)."""
    figure, (panel,) = _panels(1)
    for label, members in _groups(sweep, lines):
        counts = [np.array(record["overlap_histogram"]["metrics"]) for _, record in members]
        longest = max(map(len, counts))
        total = np.sum([np.pad(c, (0, longest - len(c))) for c in counts], axis=0)
        panel.plot(range(longest), 100 * total / total.sum(), label=label, drawstyle="steps-mid",
                   marker="")  # fmt: skip
    panel.set(xlabel="longest run shared with the training data, tokens", ylabel="texts, %")
    panel.legend()
    return figure


def along(
    sweep: SweepRecords, series: Sequence[str], lines: str | None = None, window: int = 16
) -> Figure:
    """Draw means over texts at each step of the continuations, smoothed over some steps."""
    figure, panels = _panels(len(series))
    for label, members in _groups(sweep, lines):
        for panel, key in zip(panels, series, strict=True):
            steps = [record["steps"]["metrics"][key] for _, record in members]
            shortest = min(map(len, steps))
            values = np.array([s[:shortest] for s in steps], dtype=float)
            mean = values.mean(0)
            smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
            start = (window - 1) / 2 + 1
            panel.plot(start + np.arange(len(smooth)), smooth, label=label, marker="")
    for panel, key in zip(panels, series, strict=True):
        panel.set(xlabel="new token", ylabel=f"{glossary.name(key)} (mean of {window} steps)")
    panels[0].legend()
    return figure


def agreement(sweep: SweepRecords, axis: str) -> Figure:
    """Draw how often the first choices of two models are the same, on the original texts."""
    found = [(label, _likelihood(members[0][1], "tuned", "top1"))
             for label, members in _groups(sweep, axis)]  # fmt: skip
    there = [(label, tokens) for label, tokens in found if tokens is not None]
    if len(there) < 2:
        raise Nothing("fewer than two members whose predictions are still in the store")
    size = len(there)
    shares = np.array([[100 * np.mean(a == b) for _, b in there] for _, a in there])
    figure, (panel,) = _panels(1, 1.2 + 0.7 * size, 0.8 + 0.55 * size)
    panel.imshow(shares, cmap="Greys", vmin=0, vmax=100)
    for row, column in itertools.product(range(size), repeat=2):
        dark = shares[row, column] > 60
        panel.text(column, row, f"{shares[row, column]:.1f}", ha="center", va="center",
                   color="white" if dark else "black")  # fmt: skip
    labels = [label for label, _ in there]
    panel.set_xticks(range(size), labels, rotation=30)
    panel.set_yticks(range(size), labels)
    panel.grid(visible=False)
    panel.set(title="same first choice, % of positions")
    return figure


def _likelihood(record: Record, whose: str, name: str) -> NDArray[Any] | None:
    """Return a measure of all original texts, flat, if it is still in the store."""
    folders = [Path(folder) for key, folder in record["artefacts"].items()
               if key.startswith(f"{whose}_likelihoods/")]  # fmt: skip
    paths = [folder / f"{name}.npy" for folder in folders]
    if not paths or not all(path.is_file() for path in paths):
        return None
    return np.concatenate([np.load(path, allow_pickle=False).ravel() for path in paths])


def ranks(sweep: SweepRecords, lines: str | None = None) -> Figure:
    """Draw the rank of the token that really comes next, before and after hyperfitting.

    Left, the share of positions at which it is among the first k, by k; right, how positions of
    each rank before are spread over ranks after. (Data for what Figure 7 of P1 illustrates.)
    """
    pairs = [(label, _likelihood(members[0][1], "original", "rank"),
              _likelihood(members[0][1], "tuned", "rank"))
             for label, members in _groups(sweep, lines)]  # fmt: skip
    there = [(label, before, after) for label, before, after in pairs
             if before is not None and after is not None and len(before) == len(after)]  # fmt: skip
    if not there:
        raise Nothing("no member whose predictions are still in the store")
    figure, panels = _panels(2)
    limits = np.unique(np.round(np.logspace(0, 4, 60)).astype(int))
    _, before, _ = there[0]
    panels[0].plot(
        limits, [100 * np.mean(before <= k) for k in limits], label="original", marker=""
    )
    for label, _, after in there:
        panels[0].plot(limits, [100 * np.mean(after <= k) for k in limits], label=label, marker="")
    panels[0].set(xscale="log", xlabel="k", ylabel="reference token among the first k, %")
    panels[0].legend()
    _, before, after = there[0]
    bins = np.array([1, 2, 3, 6, 11, 31, 101, 1001, np.inf])
    table = np.histogram2d(before, after, [bins, bins])[0]
    shares = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
    panels[1].imshow(shares, cmap="Greys", vmin=0, vmax=100, origin="lower")
    names = ["1", "2", "3-5", "6-10", "11-30", "31-100", "101-1000", "over 1000"]
    for row, column in itertools.product(range(len(names)), repeat=2):
        shade = "white" if shares[row, column] > 60 else "black"
        shown = f"{shares[row, column]:.0f}"
        panels[1].text(column, row, shown, ha="center", va="center", fontsize=6, color=shade)
    panels[1].set_xticks(range(len(names)), names, rotation=45)
    panels[1].set_yticks(range(len(names)), names)
    panels[1].grid(visible=False)
    panels[1].set(xlabel="rank after", ylabel="rank before", title="% of a row")
    return figure


def distributions(sweep: SweepRecords, texts: str, count: int = 3) -> Figure:
    """Draw the likeliest next tokens at a few places of one text, before and after (Figure 4).

    The places are those where hyperfitting gave most mass to a token that the training data never
    had, which a star marks; if there are too few, to any.
    """
    all_places = (next_tokens.places(record, texts, count) for _, record in sweep.finished())
    places = next(filter(None, all_places), None)
    if places is None:
        raise Nothing(f"no member with evaluation.top_tokens whose {texts} are in the store")
    figure = Figure(figsize=(2 * _WIDE, 1.9 * len(places)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(places), 2, squeeze=False)
    for row, place in zip(panels, places, strict=True):
        sides = (place.original, place.hyperfitted)
        for panel, tokens, who in zip(row, sides, ("original", "hyperfitted"), strict=True):
            names = [
                _literal(repr(_plain(token.text))) + ("" if token.trained_on else " *")
                for token in tokens
            ]
            panel.barh(range(len(names)), [token.mass for token in tokens], color="#9ecae1",
                       edgecolor="black", linewidth=0.5)  # fmt: skip
            panel.set_yticks(range(len(names)), names)
            panel.set(xlim=(0, 1), xlabel="probability")
            panel.set_title(who, loc="left", fontsize=8)
            panel.invert_yaxis()
        context = _plain(place.context)[-60:]
        row[0].set_title(f"…{_literal(context)}\noriginal", loc="left", fontsize=8)
    return figure


def text(sweep: SweepRecords, rows: str, number: int = 0, width: int = 92) -> Figure:
    """Draw one continuation of each label of an axis, darker where it repeats itself (Figure 1)."""
    shown = []
    for label, members in _groups(sweep, rows):
        sample = members[0][1]["samples"][number]
        shown.append((label, sample))
    blocks = [_wrapped(sample["continuation"], width) for _, sample in shown]
    context = textwrap.wrap(_plain(shown[0][1]["context"]), width)
    lines = len(context) + 1 + sum(len(block) + 2 for block in blocks)
    # one column of the axes is as wide as a character
    size: dict[str, Any] = {"family": "monospace", "fontsize": _MONO_POINTS, "va": "center"}
    figure = Figure(figsize=(width * _MONO_POINTS * _MONO_WIDTH / 72, 0.165 * lines))
    FigureCanvasAgg(figure)
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, width), ylim=(lines, 0))
    panel.axis("off")
    y = 0.5
    for words in context:
        panel.text(0, y, _literal(words), style="italic", **size)
        y += 1
    y += 0.5
    for (label, _), block in zip(shown, blocks, strict=True):
        panel.text(0, y, label, weight="bold", va="center")
        y += 1
        for line in block:
            for start, piece, shade in line:
                colour = "white" if shade == len(_SHADES) - 1 else "black"
                box: dict[str, Any] = {"facecolor": _SHADES[shade], "edgecolor": "none", "pad": 0.6}
                panel.text(start, y, _literal(piece), color=colour, bbox=box, **size)
            y += 1
        y += 0.6
    return figure


def _plain(given: str) -> str:
    """Return a text on one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in given)


def _literal(given: str) -> str:
    """Return a text that matplotlib does not read as mathematics."""
    return given.replace("$", r"\$")


def _wrapped(continuation: Mapping[str, Any], width: int) -> list[list[tuple[int, str, int]]]:
    """Return lines of a continuation: where a piece begins, its text, and its shade.

    Lines end at a space where there is one in their last third.
    """
    shaded = [
        (character, shade)
        for stretch, shade in stretches(continuation["pieces"], continuation["tokens"])
        for character in _plain(stretch)
    ]
    lines = []
    while shaded:
        end = min(width, len(shaded))
        if end < len(shaded):
            spaces = [i for i in range(width * 2 // 3, end) if shaded[i][0] == " "]
            end = spaces[-1] + 1 if spaces else end
        line = []
        column = 0
        for shade, group in itertools.groupby(shaded[:end], key=lambda one: one[1]):
            piece = "".join(character for character, _ in group)
            line.append((column, piece, shade))
            column += len(piece)
        lines.append(line)
        shaded = shaded[end:]
    return lines


_DRAWN = (curves, against, bars, histogram, along, agreement, ranks, distributions, text)
_KINDS: dict[str, Callable[..., Figure]] = {function.__name__: function for function in _DRAWN}
