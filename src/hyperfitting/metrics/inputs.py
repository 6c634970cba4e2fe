"""What a metric computes from: everything known of N texts, cut to one length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.metrics.overlap import Overlap

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
Tokens = Sequence[int]
FeaturePair = tuple[NDArray[Any], NDArray[Any]]
"""Features of N continuations and of their references."""


def select_pair(features: FeaturePair | None, rows: NDArray[np.bool_]) -> FeaturePair | None:
    """Return the features of some texts, of both sets. ``rows``: (N,)."""
    return features and (features[0][rows], features[1][rows])


@dataclass(frozen=True)
class ImageInputs:
    """Completed images, cut to their complete rows, and what they are compared with.

    Pixels are token ids in raster order, without SOS.
    """

    images: NDArray[np.integer]
    """(N, H, W): contexts with their continuations."""
    references: NDArray[np.integer]
    """(N, H, W): the true images."""
    training: NDArray[np.integer]
    """(M, H, W): the images of the training sequences."""
    colors: NDArray[np.uint8]
    """(K, 3): red, green and blue of each token."""
    start: int
    """First generated pixel."""
    recognition: Arrays = field(default_factory=dict)
    """(N,) `confidence` and `class_kept` of a classifier; empty: there is none, or rows lack."""

    def select(self, rows: NDArray[np.bool_]) -> "ImageInputs":
        """Return some of the images. ``rows``: (N,)."""
        return replace(
            self,
            images=self.images[rows],
            references=self.references[rows],
            recognition={name: values[rows] for name, values in self.recognition.items()},
        )


@dataclass(frozen=True)
class ScoringInputs:
    """One model's continuations of N contexts, cut to L tokens, and its predictions.

    Statistics are arrays by name, as in `metrics.distribution.TokenStats`; NaN past the end of a
    continuation.
    """

    continuations: Sequence[Tokens]
    """N sequences of token ids, at most L each."""
    units: Sequence[Tokens]
    """The continuations in the unit of the n-gram metrics: token ids, or numbers of words."""
    corpus: Sequence[Tokens]
    """The training sequences in that unit."""
    overlap: Overlap
    """The longest run that each continuation shares with the corpus, in that unit."""
    step_stats: Arrays
    """(N, L) of the model's own distributions while it generates."""
    base_loglikelihoods: Arrays
    """(N, L) `loss` and `rank` of the chosen tokens under the base model."""
    token_stats: Arrays
    """(N, text_len - 1) of the model on the reference texts."""
    base_token_stats: Arrays
    """(N, text_len - 1) of the base model on the reference texts."""
    context_len: int
    """Tokens at the start of each reference text that are its context."""
    bleu_n: int
    """Longest n-grams of BLEU."""
    mauve_features: FeaturePair | None = None
    """(N, H) of contexts with continuations, and (N, H) of the reference texts."""
    image_features: FeaturePair | None = None
    """(N, D) of completed images, and (N, D) of the real ones."""
    patching: Arrays = field(default_factory=dict)
    """(N,) `changed` and `broken`, NaN for a text without a loop; empty: not measured."""
    images: ImageInputs | None = None
    """None: the model is of text."""

    def select(self, rows: NDArray[np.bool_]) -> "ScoringInputs":
        """Return the inputs of some texts. ``rows``: (N,)."""

        def pick(texts: Sequence[Tokens]) -> list[Tokens]:
            return [text for text, selected in zip(texts, rows, strict=True) if selected]

        def cut(arrays: Arrays) -> Arrays:
            return {name: values[rows] for name, values in arrays.items()}

        overlap = Overlap(*(getattr(self.overlap, part.name)[rows] for part in fields(Overlap)))

        return replace(
            self,
            continuations=pick(self.continuations),
            units=pick(self.units),
            overlap=overlap,
            step_stats=cut(self.step_stats),
            base_loglikelihoods=cut(self.base_loglikelihoods),
            token_stats=cut(self.token_stats),
            base_token_stats=cut(self.base_token_stats),
            mauve_features=select_pair(self.mauve_features, rows),
            image_features=select_pair(self.image_features, rows),
            patching=cut(self.patching),
            images=self.images and self.images.select(rows),
        )
