"""Evaluation texts that the training data contains.

Within one dataset the split prevents it. But a training set may hold documents of another dataset
that is evaluated, and only the training sequences themselves show whether any was trained on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.duplicates import MIN_CONTAINMENT, N, containment
from hyperfitting.data.sequences import EvaluationTexts, load_sequences
from hyperfitting.errors import UserError
from hyperfitting.store.artifact import Artifact


def training_texts(
    sequences: Iterable[Artifact], decode: Callable[[list[int]], str]
) -> Iterator[str]:
    """Yield the training sequences of `sequences` artifacts, as text.

    Args:
        sequences: the artifacts.
        decode: returns the text of token ids.

    Raises:
        DamagedArtifactError: one of the artifacts is damaged or not built.
    """
    for artifact in sequences:
        yield from map(decode, load_sequences(artifact).train.tolist())


def contaminated(
    texts: Mapping[str, EvaluationTexts], train: Iterable[str]
) -> dict[str, NDArray[np.bool_]]:
    """Return which texts have at least half of their distinct word 13-grams in training sequences.

    Args:
        texts: evaluation texts by dataset.
        train: the training sequences, as text.

    Returns:
        By dataset (N,) of its texts.

    Raises:
        UserError: no text would be left.
    """
    train = list(train)
    found = {
        name: containment(["".join(text) for text in dataset.token_texts], train) >= MIN_CONTAINMENT
        for name, dataset in texts.items()
    }
    if all(mask.all() for mask in found.values()):
        raise UserError(
            f"the training data has half or more of the {N}-grams of every evaluation text",
            field="evaluation.datasets",
            value=", ".join(texts),
            hint="evaluate on texts that are not trained on",
        )
    return found


def contamination_notes(found: Mapping[str, NDArray[np.bool_]]) -> list[str]:
    """Return what a reader of the record must know about texts that were left out."""
    return [
        f"{mask.sum()} of {len(mask)} texts of {name} are left out of all scores: the training "
        f"sequences contain half or more of their {N}-grams"
        for name, mask in found.items()
        if mask.any()
    ]
