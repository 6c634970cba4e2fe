"""Metrics of completed images, as functions of scoring inputs: `METRICS` for the registry.

The functions of pixels stand in `raster`. What any token sequence has (`gen/rep_n`,
`gen/longest_loop`, `gen/dataset_overlap`, `gen/entropy`, …) is measured along the raster by the
same metrics as for text.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from hyperfitting.metrics import per_text, raster
from hyperfitting.metrics.frechet import Features, frechet_distance, kernel_distance
from hyperfitting.metrics.inputs import Floats, ImageInputs, ScoringInputs
from hyperfitting.metrics.per_text import PerText

PerSet = Callable[[ScoringInputs], float]
OF_CLASSIFIER = ("gen/class_kept", "gen/class_confidence")
"""Metrics that need a classifier of the images."""
_WIDTH_PER_SHIFT = 16
"""Images of 8 to 16 pixels are shifted by up to 1, of 32 by up to 2."""


def _of_images(function: Callable[[ImageInputs], Floats]) -> PerText:
    """Return a function of images as one of the scoring inputs, which hold them."""

    def per_text(inputs: ScoringInputs) -> Floats:
        if inputs.images is None:
            raise ValueError("the inputs are of text")
        return function(inputs.images)

    return per_text


@_of_images
def _row_repeat(inputs: ImageInputs) -> Floats:
    return raster.row_repeat(inputs.images, inputs.start)


def _column_rep(n: int) -> PerText:
    return _of_images(lambda inputs: raster.column_rep_n(inputs.images, inputs.start, n))


@_of_images
def _distinct_colors(inputs: ImageInputs) -> Floats:
    return raster.distinct_colors(inputs.images, inputs.start)


@_of_images
def _total_variation(inputs: ImageInputs) -> Floats:
    return raster.total_variation(inputs.colors[inputs.images], inputs.start)


@_of_images
def _edge_density(inputs: ImageInputs) -> Floats:
    return raster.edge_density(inputs.colors[inputs.images], inputs.start)


@_of_images
def _mse(inputs: ImageInputs) -> Floats:
    colors = inputs.colors
    return raster.mse(colors[inputs.images], colors[inputs.references], inputs.start)


@_of_images
def _nearest_train(inputs: ImageInputs) -> Floats:
    colors = inputs.colors
    return raster.nearest_distance(colors[inputs.images], colors[inputs.training], inputs.start)


@_of_images
def _nearest_train_shifted(inputs: ImageInputs) -> Floats:
    colors, width = inputs.colors, inputs.images.shape[2]
    shift = min(width - 1, max(1, width // _WIDTH_PER_SHIFT))
    return raster.nearest_distance(
        colors[inputs.images], colors[inputs.training], inputs.start, shift
    )


def _bits_per_pixel(inputs: ScoringInputs) -> Floats:
    return np.divide(per_text.on_references("loss")(inputs), np.log(2))


def _of_features(function: Callable[[Features, Features], float]) -> PerSet:
    """Return a distance between sets of images as a function of the scoring inputs."""

    def per_set(inputs: ScoringInputs) -> float:
        return function(*inputs.image_features) if inputs.image_features else float("nan")

    return per_set


def _recognition(name: str) -> PerText:
    return _of_images(lambda inputs: np.asarray(inputs.recognition[name], dtype=np.float64))


def _entry(label: str, description: str, function: PerText, **entry: Any) -> dict[str, Any]:
    return {"label": label, "description": description, "per_text": function, **entry}


def _entry_of_sets(label: str, description: str, function: PerSet) -> dict[str, Any]:
    entry = {"label": label, "description": description, "per_set": function}
    return entry | {"direction": "lower", "in_summary": True}


METRICS: dict[str, dict[str, Any]] = {
    "gen/row_repeat": _entry(
        "repeated rows",
        "share of generated rows that equal the row above",
        _row_repeat,
        direction="lower",
        in_summary=True,
        is_share=True,
    ),
    **{
        f"gen/column_rep_{n}": _entry(
            f"repeated {n}-grams down columns",
            f"share of the {n}-grams down the generated columns that occurred earlier: "
            f"1 - distinct {n}-grams over {n}-grams",
            _column_rep(n),
            direction="lower",
            in_summary=n == 3,
            is_share=True,
        )
        for n in (2, 3, 4)
    },
    "gen/distinct_colors": _entry(
        "distinct colors",
        "colors that the generated pixels have",
        _distinct_colors,
        unit="colors",
        format="{:.1f}",
        in_summary=True,
    ),
    "gen/total_variation": _entry(
        "total variation",
        "mean absolute difference of a generated pixel to the left and to the upper one, 0 to 1; "
        "compare with the reference",
        _total_variation,
        in_summary=True,
    ),
    "gen/edge_density": _entry(
        "edge density",
        f"share of generated pixels that differ by over {raster.EDGE} from the left or the upper "
        "one; compare with the reference",
        _edge_density,
        in_summary=True,
        is_share=True,
    ),
    "gen/nearest_train": _entry(
        "distance to the nearest training image",
        "root mean square difference of the generated pixels to the same pixels of the nearest "
        "training image, 0 to 1; 0: a copy",
        _nearest_train,
        in_summary=True,
    ),
    "gen/nearest_train_shifted": _entry(
        "distance to the nearest training image, shifted",
        "the same, at the best shift of the training image by up to one pixel in each direction "
        f"(a {_WIDTH_PER_SHIFT}th of the width, if that is more)",
        _nearest_train_shifted,
    ),
    "gen/class_kept": _entry(
        "class kept",
        "share of completed images whose class, as a classifier predicts it, is that of the true "
        "image; of the references it is the classifier's accuracy",
        _recognition("class_kept"),
        direction="higher",
        format="{:.2f}",
        in_summary=True,
        is_share=True,
    ),
    "gen/class_confidence": _entry(
        "confidence of the classifier",
        "probability of the class that the classifier predicts for the completed image",
        _recognition("confidence"),
        in_summary=True,
        is_share=True,
    ),
    "gen/mse": _entry(
        "squared error to the true image",
        "mean squared error of the generated pixels, of colors from 0 to 1; low for flat and "
        "blurred completions, high for good ones that differ",
        _mse,
    ),
    "gen/fid": _entry_of_sets(
        "FID",
        "Fréchet distance between Inception's features of the completed and of the true images "
        "(with evaluation.fid_weights); biased upward: compare only equal numbers of images",
        _of_features(frechet_distance),
    ),
    "gen/kid": _entry_of_sets(
        "KID",
        "kernel distance between the same features, unbiased for independent images",
        _of_features(kernel_distance),
    ),
    "val/bits_per_pixel": _entry(
        "bits per pixel",
        "next-token loss on the true images, in bits",
        _bits_per_pixel,
        unit="bits",
        direction="lower",
        format="{:.2f}",
        in_summary=True,
    ),
}
"""Arguments of `registry.Metric`, by key."""
