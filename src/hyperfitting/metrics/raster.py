"""Repetition, structure and quotation in completed images.

Images are token ids (N, H, W) or colors (N, H, W, 3) of 0 to 255, in raster order: the pixels from
``start`` on are generated, those before it are the context. Every function returns (N,) values, NaN
where an image has none.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hyperfitting.metrics.inputs import Floats
from hyperfitting.metrics.per_text import row_means

EDGE = 0.1
"""Difference of neighboring pixels, of at most 1, above which there is an edge."""
_WHITE = 255.0

Tokens = NDArray[np.integer]
Colors = NDArray[np.uint8]


def row_repeat(tokens: Tokens, start: int) -> Floats:
    """Return the share of generated rows that equal the row above.

    Only rows that are generated as a whole count. The row above may be of the context.
    """
    width = tokens.shape[2]
    first = max(1, -(-start // width))
    repeats = (tokens[:, first:] == tokens[:, first - 1 : -1]).all(axis=2)  # (N, rows)
    return row_means(repeats)


def column_rep_n(tokens: Tokens, start: int, n: int) -> Floats:
    """Return the share of n-grams down the generated columns that occurred earlier.

    As `diversity.rep_n`, 1 - distinct n-grams over n-grams, of the columns of an image instead of
    its raster: no n-gram spans two columns, all columns count together.

    Raises:
        ValueError: n is below 1, or the tokens are too large for n-grams of this length.
    """
    height, width = tokens.shape[1:]
    base = int(tokens.max(initial=0)) + 1
    if n < 1 or base**n > np.iinfo(np.int64).max:
        raise ValueError(f"no n-grams of {n} tokens below {base}")
    keys = np.zeros((len(tokens), max(0, height - n + 1), width), dtype=np.int64)
    for i in range(n):
        keys = keys * base + tokens[:, i : i + keys.shape[1]]
    generated = np.arange(keys.shape[1] * width) >= start  # by the n-gram's first pixel
    ngrams = keys.reshape(len(tokens), -1)[:, generated]  # (N, n-grams)
    repeated: Floats = 1 - _distinct(ngrams) / max(1, ngrams.shape[1])
    return repeated


def distinct_colors(tokens: Tokens, start: int) -> Floats:
    """Return the number of colors that the generated pixels have."""
    return _distinct(tokens.reshape(len(tokens), -1)[:, start:])


def total_variation(colors: Colors, start: int) -> Floats:
    """Return the mean difference of neighboring pixels (Rudin et al., 1992, anisotropic), 0 to 1.

    Over the generated pixels, each with its left and its upper neighbor: the absolute difference,
    averaged over the three channels.
    """
    differences = _neighbor_differences(colors)[:, _generated(colors, start)]  # (N, P, 2)
    return row_means(differences.reshape(len(colors), -1))


def edge_density(colors: Colors, start: int) -> Floats:
    """Return the share of generated pixels that differ by over `EDGE` from the left or upper one.

    A pixel at the left or upper border has one of these neighbors, the very first none.
    """
    differences = _neighbor_differences(colors)[:, _generated(colors, start)]  # (N, P, 2)
    return row_means(np.nanmax(np.nan_to_num(differences), axis=2, initial=0) > EDGE)


def mse(colors: Colors, true: Colors, start: int) -> Floats:
    """Return the mean squared error of the generated pixels, of colors from 0 to 1."""
    generated = _generated(colors, start)
    errors = (colors[:, generated].astype(float) - true[:, generated]) / _WHITE
    return row_means(errors.reshape(len(colors), -1) ** 2)


def nearest_distance(colors: Colors, training: Colors, start: int, max_shift: int = 0) -> Floats:
    """Return the distance of the generated pixels to the nearest training image, 0 to 1.

    The root mean square over pixels and channels of the difference to the same pixels of a training
    image, or to those of the image shifted by up to ``max_shift`` pixels in each direction, over
    the pixels where both are. Exact: 0 for a copy.

    Args:
        colors: (N, H, W, 3).
        training: (M, H, W, 3).
        start: first generated pixel.
        max_shift: pixels; fewer than the width and the height.
    """
    nearest = np.full(len(colors), np.nan)
    if len(training) == 0:
        return nearest
    generated = _generated(colors, start)
    for moved, still in _shifts(colors.shape[1], colors.shape[2], max_shift):
        rows = generated[still]  # (h, w)
        images = colors[:, *still][:, rows].reshape(len(colors), -1).astype(float)  # (N, P)
        others = training[:, *moved][:, rows].reshape(len(training), -1).astype(float)
        if images.shape[1] == 0:
            continue
        squares = (others**2).sum(axis=1) - 2 * images @ others.T  # (N, M), exact integers
        squared = squares.min(axis=1) + (images**2).sum(axis=1)
        nearest = np.fmin(nearest, np.sqrt(squared / images.shape[1]) / _WHITE)
    return nearest


def _shifts(height: int, width: int, max_shift: int) -> Iterator[tuple[tuple[slice, slice], ...]]:
    """Yield the parts of two images of which the first is shifted onto the second."""

    def parts(by: int, size: int) -> tuple[slice, slice]:
        return slice(max(0, -by), size - max(0, by)), slice(max(0, by), size - max(0, -by))

    for down in range(-max_shift, max_shift + 1):
        for right in range(-max_shift, max_shift + 1):
            rows, columns = parts(down, height), parts(right, width)
            yield (rows[0], columns[0]), (rows[1], columns[1])


def _neighbor_differences(colors: Colors) -> Floats:
    """Return the differences to the left and the upper pixel, (N, H, W, 2); NaN: there is none."""
    values = colors.astype(float) / _WHITE
    differences = np.full((*colors.shape[:3], 2), np.nan)
    differences[:, :, 1:, 0] = np.abs(np.diff(values, axis=2)).mean(axis=3)
    differences[:, 1:, :, 1] = np.abs(np.diff(values, axis=1)).mean(axis=3)
    return differences


def _generated(colors: Colors, start: int) -> NDArray[np.bool_]:
    """Return which pixels are generated, (H, W)."""
    height, width = colors.shape[1:3]
    return (np.arange(height * width) >= start).reshape(height, width)


def _distinct(values: NDArray[np.integer]) -> Floats:
    """Return the number of distinct values of each row (N, T); NaN where T is 0."""
    if values.shape[1] == 0:
        return np.full(len(values), np.nan)
    changes = np.diff(np.sort(values, axis=1), axis=1) != 0
    distinct: Floats = 1 + changes.sum(axis=1).astype(np.float64)
    return distinct
