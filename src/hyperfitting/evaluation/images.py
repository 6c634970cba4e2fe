"""What scores of completed images need beyond those of texts: pixels, and a classifier's view.

The classifier is trained on real images with known classes that are neither trained on nor
evaluated; it is the same for all runs with the same sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data import packaged_images
from hyperfitting.data.config import TextsConfig
from hyperfitting.metrics.inputs import ImageInputs
from hyperfitting.metrics.uncertainty import bootstrap_mean
from hyperfitting.models.image_format import ImageFormat
from hyperfitting.record.recognition import Recognition

_HELD_OUT_FRACTION = 0.25
"""Of the images with known classes, what the classifier is tested on."""
_SEED = 0
Tokens = NDArray[np.integer]


@dataclass(frozen=True)
class LabeledImages:
    """Real images whose classes are known."""

    tokens: Tokens
    """(L, H * W) without SOS."""
    classes: NDArray[np.integer]
    """(L,)"""


@dataclass(frozen=True)
class ImageScoring:
    """How the tokens of a run are images."""

    format: ImageFormat
    labeled: LabeledImages | None = None
    """Holds all evaluation images; none: there is no classifier."""

    def pixels(self, sequences: Sequence[Sequence[int]] | Tokens) -> Tokens:
        """Return the pixels of token sequences of one length (N, T), SOS left out: (N, P)."""
        tokens = np.asarray(sequences)
        is_sos = tokens.shape[1] > 0 and bool((tokens[:, 0] == self.format.sos).all())
        return tokens[:, int(is_sos) :]

    def inputs(
        self,
        contexts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
        training: Sequence[Sequence[int]] | Tokens,
    ) -> ImageInputs:
        """Return completed images and what they are compared with, cut to complete rows.

        Args:
            contexts: N sequences of token ids.
            continuations: N sequences that continue them, all of one length.
            references: N sequences that really continue them, not shorter.
            training: M training sequences.
        """
        start = self.pixels(contexts).shape[1]
        rows = (start + len(continuations[0])) // self.format.width

        def cut(sequences: Any) -> Tokens:
            pixels = self.pixels(sequences)[:, : rows * self.format.width]
            return pixels.reshape(len(pixels), -1, self.format.width)

        return ImageInputs(
            images=cut(_joined(contexts, continuations)),
            references=cut(_joined(contexts, references)),
            training=cut(training),
            colors=self.format.colors,
            start=start,
        )


def image_scoring(image_format: ImageFormat | None, dataset: TextsConfig) -> ImageScoring | None:
    """Return how the tokens of a run are images; none: its model is of text.

    Args:
        image_format: the model's.
        dataset: what is trained on, whose images may have known classes.
    """
    if image_format is None:
        return None
    if dataset.source != "package" or dataset.image is None:
        return ImageScoring(image_format)
    classes = packaged_images.classes(str(dataset.path))
    if classes is None:
        return ImageScoring(image_format)
    pictures = np.stack(
        [picture for picture, _ in packaged_images.read(str(dataset.path), dataset.image)]
    )
    return ImageScoring(image_format, LabeledImages(image_format.quantize(pictures), classes))


def _joined(
    contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[list[int]]:
    return [[*a, *b] for a, b in zip(contexts, continuations, strict=True)]


class Classifier:
    """Tells the classes of complete images: logistic regression on random RBF features.

    Args:
        labeled: images with known classes.
        excluded: (N, H * W) images that it must not be trained or tested on.
        colors: (K, 3) of the tokens.
        n_pixels: the first pixels, which it sees; the others it ignores.
    """

    def __init__(
        self, labeled: LabeledImages, excluded: Tokens, colors: NDArray[np.uint8], n_pixels: int
    ) -> None:
        from sklearn.kernel_approximation import Nystroem
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self._gray, self._n_pixels = colors.mean(axis=1) / 255, n_pixels
        seen = {row.tobytes() for row in excluded.astype(np.int32)}
        allowed = [row.tobytes() not in seen for row in labeled.tokens.astype(np.int32)]
        rows = np.random.default_rng(_SEED).permutation(np.flatnonzero(allowed))
        n_held_out = round(_HELD_OUT_FRACTION * len(rows))
        test, train = rows[:n_held_out], rows[n_held_out:]
        self.n_train = len(train)
        features = Nystroem(n_components=min(300, len(train)), gamma=0.1, random_state=_SEED)
        self._model = make_pipeline(features, LogisticRegression(C=10, max_iter=1000))
        self._model.fit(self._features(labeled.tokens[train]), labeled.classes[train])
        predicted, _ = self(labeled.tokens[test])
        self.is_correct = (predicted == labeled.classes[test]).astype(float)
        """Of each real image that it is tested on, whether it tells its class."""

    def __call__(self, tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the class of each image (N, H * W), and the probability of that class."""
        probabilities = self._model.predict_proba(self._features(tokens))  # (N, C)
        best = probabilities.argmax(axis=1)
        return self._model.classes_[best], probabilities[np.arange(len(best)), best]

    def _features(self, tokens: Tokens) -> NDArray[np.float64]:
        features: NDArray[np.float64] = self._gray[tokens[:, : self._n_pixels]]
        return features


def recognize(
    scoring: ImageScoring, sides: dict[str, ImageInputs], resamples: int
) -> tuple[Recognition, dict[str, dict[str, NDArray[Any]]]] | None:
    """Return the classes that a classifier sees, and by side the inputs of its metrics.

    None: the classes of the evaluation images are not known, or the images are not complete.

    Args:
        scoring: the images with known classes.
        sides: complete images of the tuned model, the base model and the references.
        resamples: bootstrap resamples of its accuracy.
    """
    true = next(iter(sides.values())).references
    if scoring.labeled is None or true.shape[1] != scoring.format.height:
        return None
    inputs = next(iter(sides.values()))
    flat = _flat(true)
    known = {row.tobytes(): c for row, c in zip(scoring.labeled.tokens.astype(np.int32),
                                                scoring.labeled.classes, strict=True)}  # fmt: skip
    keys = [row.tobytes() for row in flat.astype(np.int32)]
    if not all(key in known for key in keys):
        return None
    classes = np.array([known[key] for key in keys])
    excluded = np.concatenate([flat, _flat(inputs.training)])
    classifier = Classifier(scoring.labeled, excluded, inputs.colors, flat.shape[1])
    of_context = Classifier(scoring.labeled, excluded, inputs.colors, inputs.start)
    predictions = {side: classifier(_flat(images.images)) for side, images in sides.items()}
    accuracy = bootstrap_mean(classifier.is_correct, resamples)
    visible = bootstrap_mean((of_context(flat)[0] == classes).astype(float), resamples)
    if accuracy is None or visible is None:
        return None
    recognition = Recognition(
        n_train=classifier.n_train,
        accuracy=accuracy,
        context_accuracy=visible,
        true=classes.tolist(),
        **{side: predicted.tolist() for side, (predicted, _) in predictions.items()},
    )
    arrays = {
        side: {"class_kept": (predicted == classes).astype(float), "confidence": confidence}
        for side, (predicted, confidence) in predictions.items()
    }
    return recognition, arrays


def _flat(images: Tokens) -> Tokens:
    return images.reshape(len(images), -1)
