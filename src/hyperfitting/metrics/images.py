"""Metrics of completed images, as functions of scoring inputs: `METRICS` for the registry.

The functions of pixels stand in `raster`. What any token sequence has (`gen/rep_n`,
`gen/longest_loop`, `gen/dataset_overlap`, `gen/entropy`, …) is measured along the raster by the
same metrics as for text.
"""

from typing import Any

import numpy as np

from hyperfitting.metrics import per_text, raster
from hyperfitting.metrics.inputs import Floats, ImageInputs, ScoringInputs
from hyperfitting.metrics.per_text import PerText

OF_CLASSIFIER = ("gen/class_kept", "gen/class_confidence")
"""Metrics that need a classifier of the images."""
_WIDTH_PER_SHIFT = 16
"""Images of 8 to 16 pixels are shifted by up to 1, of 32 by up to 2."""


def _of(inputs: ScoringInputs) -> ImageInputs:
    assert inputs.images is not None  # noqa: S101  (`Metric.is_measured`)
    return inputs.images


def _row_repeat(inputs: ScoringInputs) -> Floats:
    return raster.row_repeat(_of(inputs).images, _of(inputs).start)


def _column_rep(n: int) -> PerText:
    return lambda inputs: raster.column_rep_n(_of(inputs).images, _of(inputs).start, n)


def _distinct_colors(inputs: ScoringInputs) -> Floats:
    return raster.distinct_colors(_of(inputs).images, _of(inputs).start)


def _total_variation(inputs: ScoringInputs) -> Floats:
    images = _of(inputs)
    return raster.total_variation(images.colors[images.images], images.start)


def _edge_density(inputs: ScoringInputs) -> Floats:
    images = _of(inputs)
    return raster.edge_density(images.colors[images.images], images.start)


def _mse(inputs: ScoringInputs) -> Floats:
    images = _of(inputs)
    colors = images.colors
    return raster.mse(colors[images.images], colors[images.references], images.start)


def _nearest(shifted: bool) -> PerText:
    def distance(inputs: ScoringInputs) -> Floats:
        images = _of(inputs)
        colors, width = images.colors, images.images.shape[2]
        shift = max(1, width // _WIDTH_PER_SHIFT) if shifted and width > 1 else 0
        return raster.nearest_distance(
            colors[images.images], colors[images.training], images.start, shift
        )

    return distance


def _bits_per_pixel(inputs: ScoringInputs) -> Floats:
    return np.divide(per_text.on_references("loss")(inputs), np.log(2))


def _recognition(name: str) -> PerText:
    return lambda inputs: np.asarray(_of(inputs).recognition[name], dtype=np.float64)


def _entry(label: str, description: str, function: PerText, **entry: Any) -> dict[str, Any]:
    return {"label": label, "description": description, "per_text": function, **entry}


METRICS: dict[str, dict[str, Any]] = {
    "gen/row_repeat": _entry(
        "repeated rows",
        "share of generated rows that equal the row above",
        _row_repeat,
        direction="lower",
        in_summary=True,
    ),
    **{
        f"gen/column_rep_{n}": _entry(
            f"repeated {n}-grams down columns",
            f"share of the {n}-grams down the generated columns that occur more than once: "
            f"1 - distinct {n}-grams over {n}-grams",
            _column_rep(n),
            direction="lower",
            in_summary=n == 3,
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
    ),
    "gen/nearest_train": _entry(
        "distance to the nearest training image",
        "root mean square difference of the generated pixels to the same pixels of the nearest "
        "training image, 0 to 1; 0: a copy",
        _nearest(shifted=False),
        in_summary=True,
    ),
    "gen/nearest_train_shifted": _entry(
        "distance to the nearest training image, shifted",
        "the same, at the best shift of the training image by up to one pixel in each direction "
        f"(a {_WIDTH_PER_SHIFT}th of the width, if that is more)",
        _nearest(shifted=True),
    ),
    "gen/class_kept": _entry(
        "class kept",
        "share of completed images in which a classifier sees the class of the true image; that of "
        "the references is its accuracy",
        _recognition("class_kept"),
        direction="higher",
        format="{:.2f}",
        in_summary=True,
    ),
    "gen/class_confidence": _entry(
        "confidence of the classifier",
        "probability of the class that the classifier sees in the completed image",
        _recognition("confidence"),
        in_summary=True,
    ),
    "gen/mse": _entry(
        "squared error to the true image",
        "mean squared error of the generated pixels, of colors from 0 to 1; low for flat and "
        "blurred completions, high for good ones that differ",
        _mse,
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
