"""The colouring of Figure 1: how much of a continuation stands in it already, token by token.

The shade of a token goes by the length of the longest stretch around it that the text had before:
one word again is no repetition, ten tokens in a row are.
"""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

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
