"""Highlighting of repetition, as in Figure 1 of Carlsson et al. (ICLR 2025), token by token.

The shade of a token depends on the length of the longest repeated token run around it: a single
word again is not repetition, ten tokens in a row are.
"""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

import numpy as np
from numpy.typing import ArrayLike

from hyperfitting.metrics.diversity import repetition
from hyperfitting.record.schema import Record, Sample, Side
from hyperfitting.reporting.images import data_uri, picture

SHADES = (2, 3, 5, 10)
"""Lengths in tokens: shade 1 from the first on, shade 2 from the second, and so on."""

STYLE = """
.repetition { white-space: pre-wrap; }
.repetition span { border-radius: 2px; }
.repetition .r1 { background: rgb(214 69 65 / 15%); }
.repetition .r2 { background: rgb(214 69 65 / 30%); }
.repetition .r3 { background: rgb(214 69 65 / 50%); }
.repetition .r4 { background: rgb(214 69 65 / 75%); text-decoration: underline; }
"""
"""The CSS for `to_html`. The darkest shade is underlined too, to be visible without color."""


def shades(tokens: ArrayLike) -> list[int]:
    """Return the shade of each token (T,): 0 for new text, up to ``len(SHADES)``."""
    shade: list[int] = np.searchsorted(SHADES, repetition(tokens), side="right").tolist()
    return shade


def spans(token_texts: Sequence[str], tokens: ArrayLike) -> Iterator[tuple[str, int]]:
    """Yield the text in spans of a single shade: text, shade.

    Args:
        token_texts: text of each token (T); they join to the whole text.
        tokens: (T,) token ids.

    Raises:
        ValueError: the lengths differ.
    """
    pairs = zip(token_texts, shades(tokens), strict=True)
    for shade, group in groupby(pairs, key=lambda pair: pair[1]):
        yield "".join(token_text for token_text, _ in group), shade


def to_html(token_texts: Sequence[str], tokens: ArrayLike) -> str:
    """Return a continuation as an escaped HTML fragment, for a page that contains `STYLE`."""
    parts = [
        f'<span class="r{shade}">{escape(text)}</span>' if shade else escape(text)
        for text, shade in spans(token_texts, tokens)
    ]
    return f'<div class="repetition">{"".join(parts)}</div>'


def texts_page(record: Record, limit: int | None = None) -> str:
    """Return a record's continuations and answers, base and tuned side by side, as an HTML page.

    The page is complete in itself, and its policy allows no script.

    Args:
        record: of a run.
        limit: texts to show; none: all.
    """
    title = escape(" ".join(record.name(group) for group in ("model", "dataset", "decode")))
    texts = enumerate(record.texts[:limit])
    rows = "\n".join(
        _table_row(sample, row) if record.image is None else _image_row(record, row)
        for row, sample in texts
    )
    explanation = (
        f"Repeated token runs are shaded, longer ones darker: from {', '.join(map(str, SHADES))} "
        "tokens on."
        if record.image is None
        else "Each model completes the context."
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_PAGE_STYLE}{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{explanation}</p>
<table><thead><tr><th scope="col">text</th><th scope="col">context</th>
<th scope="col">base model</th>
<th scope="col">{escape(record.tuned_label)} model</th><th scope="col">reference</th></tr>
</thead>
<tbody>
{rows}
</tbody></table></body></html>
"""


def _table_row(sample: Sample, row: int) -> str:
    continuations = "".join(
        f"<td>{to_html(continuation.token_texts, continuation.tokens)}</td>"
        for continuation in (sample.base, sample.tuned)
    )
    return (
        f"<tr><th scope='row'>{escape(sample.dataset)}<br>{row + 1}</th>"
        f"<td class='context'>{escape(sample.context.text)}</td>{continuations}"
        f"<td class='context'>{escape(sample.reference.text)}</td></tr>"
    )


def _image_row(record: Record, row: int) -> str:
    sides: dict[str, Side | None] = {
        "context": None,
        "completed by the base model": "base",
        f"completed by the {record.tuned_label} model": "tuned",
        "real image": "reference",
    }
    cells = "".join(
        f'<td><img src="{data_uri(picture(record, row, side))}" alt="{escape(name)}"></td>'
        for name, side in sides.items()
    )
    return (
        f"<tr><th scope='row'>{escape(record.samples[row].dataset)}<br>{row + 1}</th>{cells}</tr>"
    )


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PAGE_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 1.5rem; }
h1 { font-size: 1.2rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th:first-child { width: 7rem; }
th, td { text-align: left; vertical-align: top; padding: .6rem; border-top: 1px solid #8886; }
td { overflow-wrap: anywhere; white-space: pre-wrap; }
.context { opacity: .75; }
"""
