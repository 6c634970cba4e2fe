"""The colouring of Figure 1: how much of a continuation stands in it already, token by token.

The shade of a token goes by the length of the longest stretch around it that the text had before:
one word again is no repetition, ten tokens in a row are.
"""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hyperfitting.metrics.diversity import repetition

SHADES = (2, 3, 5, 10)
"""A token has shade 1 from the first of these lengths on, shade 2 from the second, and so on."""

STYLE = """
.repetition { white-space: pre-wrap; }
.repetition span { border-radius: 2px; }
.repetition .r1 { background: rgb(214 69 65 / 15%); }
.repetition .r2 { background: rgb(214 69 65 / 30%); }
.repetition .r3 { background: rgb(214 69 65 / 50%); }
.repetition .r4 { background: rgb(214 69 65 / 75%); text-decoration: underline; }
"""
"""The CSS for `html`; the darkest shade is underlined too, so that it is there without colour."""


def shades(tokens: ArrayLike) -> list[int]:
    """Return the shade of each token (T,): 0 for new text, up to ``len(SHADES)``."""
    found: list[int] = np.searchsorted(SHADES, repetition(tokens), side="right").tolist()
    return found


def stretches(pieces: Sequence[str], tokens: ArrayLike) -> Iterator[tuple[str, int]]:
    """Yield the text in stretches of one shade each: text, shade.

    Args:
        pieces: T texts of tokens, that join to the whole.
        tokens: (T,) ids.

    Raises:
        ValueError: there are not as many pieces as tokens.
    """
    pairs = zip(pieces, shades(tokens), strict=True)
    for shade, group in groupby(pairs, key=lambda pair: pair[1]):
        yield "".join(piece for piece, _ in group), shade


def html(pieces: Sequence[str], tokens: ArrayLike) -> str:
    """Return a continuation as an HTML fragment, for a page that holds `STYLE`.

    Everything that came from a model is escaped.
    """
    parts = [
        f'<span class="r{shade}">{escape(text)}</span>' if shade else escape(text)
        for text, shade in stretches(pieces, tokens)
    ]
    return f'<div class="repetition">{"".join(parts)}</div>'


def page(record: dict[str, Any]) -> str:
    """Return a record's continuations, original and tuned side by side, as one HTML page.

    It needs nothing from anywhere, and lets no script run.
    """
    rows = "\n".join(
        f"<tr><th scope='row'>{escape(sample['set'])}<br>{number}</th>"
        f"<td class='context'>{escape(sample['context'])}</td>"
        + "".join(
            f"<td>{html(sample[side]['pieces'], sample[side]['tokens'])}</td>"
            for side in ("original_continuation", "continuation")
        )
        + f"<td class='context'>{escape(sample['reference'])}</td></tr>"
        for number, sample in enumerate(record["samples"], 1)
    )
    title = escape(
        " ".join(record["config"][key]["name"] for key in ("model", "dataset", "decode"))
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_PAGE}{STYLE}</style></head><body>
<h1>{title}</h1>
<p>The darker, the longer the stretch that the text had before: {", ".join(map(str, SHADES))} tokens
or more.</p>
<table><thead><tr><th scope="col">text</th><th scope="col">context</th><th scope="col">original</th>
<th scope="col">hyperfitted</th><th scope="col">as it really goes on</th></tr></thead>
<tbody>
{rows}
</tbody></table></body></html>
"""


_PAGE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 1.5rem; }
h1 { font-size: 1.2rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th:first-child { width: 7rem; }
th, td { text-align: left; vertical-align: top; padding: .6rem; border-top: 1px solid #8886; }
td { overflow-wrap: anywhere; white-space: pre-wrap; }
.context { opacity: .75; }
"""
