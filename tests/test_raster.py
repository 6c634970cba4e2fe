"""Metrics of completed images against plain loops, on striped and random images, and invariant."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hyperfitting.metrics import raster
from hyperfitting.metrics.diversity import rep_n

PALETTE = np.random.default_rng(1).integers(0, 256, (4, 3)).astype(np.uint8)
IMAGES = arrays(np.int32, (3, 4, 5), elements=st.integers(0, 3))
STARTS = st.integers(0, 20)
QUICK = settings(max_examples=30, deadline=None)


def same(values: Any, expected: Any) -> None:
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)


def generated(image: Any, start: int) -> list[tuple[int, int]]:
    """Return row and column of the generated pixels."""
    height, width = image.shape[:2]
    return [divmod(i, width) for i in range(start, height * width)]


def test_a_striped_image_repeats_every_row_and_a_random_one_hardly_any() -> None:
    stripes = np.broadcast_to(np.arange(8) % 2, (1, 8, 8))
    same(raster.row_repeat(stripes, 16), [1.0])
    noise = np.random.default_rng(0).integers(0, 2, (4000, 8, 4))
    by_chance = raster.row_repeat(noise, 4).mean()
    assert by_chance == pytest.approx(2**-4, abs=0.006)


def test_repetition_in_a_row_is_none_down_the_columns() -> None:
    ladder = np.broadcast_to(np.arange(8)[:, None], (1, 8, 8))  # each row of another color
    assert raster.row_repeat(ladder, 16) == [0.0]
    same(raster.column_rep_n(ladder, 0, 2), [1 - 7 / 56])
    single = ladder[:, :, :1]
    same(raster.column_rep_n(single, 0, 2), [0.0])


@QUICK
@given(IMAGES, STARTS)
def test_row_repeat_equals_a_loop(images: Any, start: int) -> None:
    for image, value in zip(images, raster.row_repeat(images, start), strict=True):
        rows = [h for h in range(1, 4) if h * 5 >= start]
        same(value, np.mean([list(image[h]) == list(image[h - 1]) for h in rows] or [np.nan]))


@QUICK
@given(IMAGES, STARTS, st.integers(1, 4))
def test_column_n_grams_equal_a_loop(images: Any, start: int, n: int) -> None:
    for image, value in zip(images, raster.column_rep_n(images, start, n), strict=True):
        grams = [
            tuple(image[h : h + n, w])
            for h, w in generated(image, start)
            if h + n <= image.shape[0]
        ]
        same(value, 1 - len(set(grams)) / len(grams) if grams else np.nan)


@QUICK
@given(arrays(np.int32, (1, 6, 1), elements=st.integers(0, 2)), st.integers(1, 3))
def test_one_column_is_a_text(image: Any, n: int) -> None:
    same(raster.column_rep_n(image, 0, n), [rep_n(image.ravel(), n)])


@QUICK
@given(IMAGES, STARTS)
def test_colors_edges_and_variation_equal_loops(images: Any, start: int) -> None:
    colors = PALETTE[images]
    values = (
        raster.distinct_colors(images, start),
        raster.total_variation(colors, start),
        raster.edge_density(colors, start),
    )
    for image, pixels, distinct, variation, edges in zip(
        images, colors / 255, *values, strict=True
    ):
        pairs: list[list[float]] = []
        for h, w in generated(image, start):
            neighbors = [(h, w - 1)] * (w > 0) + [(h - 1, w)] * (h > 0)
            pairs.append([abs(pixels[h, w] - pixels[at]).mean() for at in neighbors])
        flat = [difference for pair in pairs for difference in pair]
        same(distinct, len({image[at] for at in generated(image, start)}) if pairs else np.nan)
        same(variation, np.mean(flat) if flat else np.nan)
        same(edges, np.mean([max(p, default=0) > raster.EDGE for p in pairs]) if pairs else np.nan)


@QUICK
@given(IMAGES, IMAGES, st.integers(0, 19), st.integers(0, 2))
def test_the_nearest_training_image_equals_a_loop(
    images: Any, training: Any, start: int, shift: int
) -> None:
    colors, others = PALETTE[images].astype(int), PALETTE[training].astype(int)
    shifts = [(y, x) for y in range(-shift, shift + 1) for x in range(-shift, shift + 1)]
    values = raster.nearest_distance(PALETTE[images], PALETTE[training], start, shift)
    for image, value in zip(colors, values, strict=True):
        distances = []
        for other in others:
            for down, right in shifts:
                squares = [
                    (image[h, w] - other[h - down, w - right]) ** 2
                    for h, w in generated(image, start)
                    if 0 <= h - down < 4 and 0 <= w - right < 5
                ]
                if squares:
                    distances.append(np.sqrt(np.mean(squares)) / 255)
        same(value, min(distances))
    same(raster.mse(PALETTE[images], PALETTE[training], start), [
        np.mean([(i[at] - o[at]) ** 2 for at in generated(i, start)]) / 255**2
        for i, o in zip(colors, others, strict=True)
    ])  # fmt: skip


def test_a_copy_has_no_distance_also_where_it_is_shifted() -> None:
    training = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)
    assert raster.nearest_distance(training[4:5], training, 16).tolist() == [0.0]
    moved = np.roll(training[2:3], (1, -1), axis=(1, 2))
    assert raster.nearest_distance(moved, training, 16)[0] > 0.1
    assert raster.nearest_distance(moved, training, 16, 1).tolist() == [0.0]
    assert np.isnan(raster.nearest_distance(moved, training[:0], 16)).all()


@QUICK
@given(IMAGES, STARTS, st.permutations(range(4)))
def test_repetition_does_not_depend_on_which_color_is_which(
    images: Any, start: int, order: list[int]
) -> None:
    recolored = np.array(order)[images]
    same(raster.row_repeat(images, start), raster.row_repeat(recolored, start))
    same(raster.column_rep_n(images, start, 2), raster.column_rep_n(recolored, start, 2))
    same(raster.distinct_colors(images, start), raster.distinct_colors(recolored, start))


@QUICK
@given(IMAGES, STARTS)
def test_structure_is_the_same_in_the_negative(images: Any, start: int) -> None:
    colors = PALETTE[images]
    same(raster.total_variation(255 - colors, start), raster.total_variation(colors, start))
    same(raster.edge_density(255 - colors, start), raster.edge_density(colors, start))


def test_n_grams_that_no_integer_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="no n-grams"):
        raster.column_rep_n(np.full((1, 9, 9), 2**20), 0, 4)
