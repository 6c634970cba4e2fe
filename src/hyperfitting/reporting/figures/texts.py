"""One continuation of each label of an axis, highlighted by how repetitive it is (Figure 1)."""

import itertools
import textwrap
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hyperfitting.formatting import printable_line
from hyperfitting.record.texts import Continuation
from hyperfitting.reporting.figures.style import NoDataError, grouped
from hyperfitting.reporting.repetition_highlight import spans
from hyperfitting.reporting.spec import TextSpec
from hyperfitting.reporting.sweep_records import SweepRecords

_SHADES = ("#ffffff", "#dddddd", "#bbbbbb", "#8f8f8f", "#555555")
_FONT_POINTS, _CHARACTER_WIDTH = 8, 0.602
"""Size of the characters, and their width relative to it (DejaVu Sans Mono, matplotlib's own)."""
_LINE_INCHES = 0.17


@dataclass(frozen=True)
class Segment:
    """Text of a single shade within a line."""

    column: int
    text: str
    shade: int


def text(sweep: SweepRecords, spec: TextSpec) -> Figure:
    """Draw one continuation of each label of an axis, darker where it repeats itself (Figure 1)."""
    samples = {}
    for label, [(_, record), *_] in grouped(sweep, spec.rows):
        texts = [text for text in record.samples if spec.dataset in (None, text.dataset)]
        if spec.number < len(texts):
            samples[label] = texts[spec.number]
    if not samples:
        where = f" of {spec.dataset}" if spec.dataset else ""
        raise NoDataError(f"no run has a text number {spec.number}{where}")
    blocks = {label: wrap(sample.tuned, spec.width) for label, sample in samples.items()}
    context = textwrap.wrap(printable_line(next(iter(samples.values())).context.text), spec.width)
    n_lines = len(context) + 1 + sum(len(block) + 2 for block in blocks.values())
    size = (spec.width * _FONT_POINTS * _CHARACTER_WIDTH / 72, _LINE_INCHES * n_lines)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, spec.width), ylim=(n_lines, 0))  # a unit is a character wide, a line high
    panel.axis("off")
    font: dict[str, Any] = {"family": "monospace", "fontsize": _FONT_POINTS, "va": "center"}
    y = 0.5
    for words in context:
        panel.text(0, y, words, style="italic", **font)
        y += 1
    y += 0.5
    for label, lines in blocks.items():
        panel.text(0, y, label, weight="bold", va="center")
        y += 1
        for line in lines:
            for segment in line:
                panel.text(segment.column, y, segment.text,
                           **_shading(segment.shade), **font)  # fmt: skip
            y += 1
        y += 0.6
    return figure


def _shading(shade: int) -> dict[str, Any]:
    color = "white" if shade == len(_SHADES) - 1 else "black"
    return {"color": color, "bbox": {"facecolor": _SHADES[shade], "edgecolor": "none", "pad": 0.6}}


def wrap(continuation: Continuation, width: int) -> list[list[Segment]]:
    """Return the lines of a continuation, each as segments of a single shade.

    Lines end at a space where there is one in their last third.
    """
    shaded = [
        (character, shade)
        for span, shade in spans(continuation.token_texts, continuation.tokens)
        for character in printable_line(span)
    ]
    lines = []
    while shaded:
        end = min(width, len(shaded))
        if end < len(shaded):
            spaces = [i for i in range(width * 2 // 3, end) if shaded[i][0] == " "]
            end = spaces[-1] + 1 if spaces else end
        line: list[Segment] = []
        column = 0
        for shade, group in itertools.groupby(shaded[:end], key=lambda item: item[1]):
            segment = "".join(character for character, _ in group)
            line.append(Segment(column, segment, shade))
            column += len(segment)
        lines.append(line)
        shaded = shaded[end:]
    return lines
