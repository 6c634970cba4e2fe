"""What scores of completed images need beyond those of texts: pixels, and predicted classes.

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
    """Predicts the class of an image: logistic regression on random RBF features.

    Args:
        labeled: images with known classes.
        excluded: (N, H * W) images that it must not be trained or tested on.
        colors: (K, 3) of the tokens.
        n_pixels: the first pixels, which are its input; the others are ignored.
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
        """Of each real image that it is tested on, 1 if the prediction is right, else 0."""

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
    """Return the predicted classes, and by side the inputs of the metrics of recognition.

    None: the classes of the evaluation images are not known, or the images are not complete.

    Args:
        scoring: the images with known classes.
        sides: complete images of the tuned model, the base model and the references.
        resamples: bootstrap resamples of the classifier's accuracy.
    """
    inputs = sides["reference"]
    if scoring.labeled is None or inputs.references.shape[1] != scoring.format.height:
        return None
    true_images = _flat(inputs.references)
    classes = _classes_of(true_images, scoring.labeled)
    if classes is None:
        return None
    excluded = np.concatenate([true_images, _flat(inputs.training)])
    n_pixels = true_images.shape[1]
    classifier = Classifier(scoring.labeled, excluded, inputs.colors, n_pixels)
    of_context = Classifier(scoring.labeled, excluded, inputs.colors, inputs.start)
    accuracy = bootstrap_mean(classifier.is_correct, resamples)
    from_context = (of_context(true_images)[0] == classes).astype(float)
    context_accuracy = bootstrap_mean(from_context, resamples)
    if accuracy is None or context_accuracy is None:
        return None
    predictions = {side: classifier(_flat(images.images)) for side, images in sides.items()}
    recognition = Recognition(
        n_train=classifier.n_train,
        accuracy=accuracy,
        context_accuracy=context_accuracy,
        true=classes.tolist(),
        **{side: predicted.tolist() for side, (predicted, _) in predictions.items()},
    )
    arrays = {
        side: {"class_kept": (predicted == classes).astype(float), "confidence": confidence}
        for side, (predicted, confidence) in predictions.items()
    }
    return recognition, arrays


def _classes_of(images: Tokens, labeled: LabeledImages) -> NDArray[np.integer] | None:
    """Return the class of each image (N, H * W); none: one of them is not labeled."""
    keys = [row.tobytes() for row in labeled.tokens.astype(np.int32)]
    known = dict(zip(keys, labeled.classes, strict=True))
    classes = [known.get(row.tobytes()) for row in images.astype(np.int32)]
    return None if None in classes else np.array(classes)


def _flat(images: Tokens) -> Tokens:
    return images.reshape(len(images), -1)
