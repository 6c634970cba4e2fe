"""Evaluation texts that the training data contains.

Within one dataset the split prevents it. But a training set may hold documents of another dataset
that is evaluated, and only the training sequences themselves show whether any was trained on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.duplicates import MIN_CONTAINMENT, N, containment
from hyperfitting.data.sequences import EvaluationTexts, load_evaluation_texts, load_sequences
from hyperfitting.errors import UserError
from hyperfitting.store.artifact import Artifact


def contaminated_by_dataset(
    texts: Mapping[str, Artifact],
    sequences: Sequence[Artifact],
    decode: Callable[[list[int]], str],
) -> dict[str, NDArray[np.bool_]]:
    """Return which evaluation texts training sequences contain, as `contaminated` does.

    Args:
        texts: artifacts of evaluation texts, by dataset.
        sequences: artifacts of training sequences.
        decode: returns the text of token ids.

    Raises:
        UserError: no text would be left.
        DamagedArtifactError: one of the artifacts is damaged or not built.
    """
    train = (
        decode(tokens)
        for artifact in sequences
        for tokens in load_sequences(artifact).train.tolist()
    )
    return contaminated({name: load_evaluation_texts(a) for name, a in texts.items()}, train)


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
