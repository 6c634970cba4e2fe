"""The longest token run that a text shares with the training data (Carlsson et al., Figure 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hyperfitting.metrics.ngrams import Ints, join, shared_ngrams


@dataclass(frozen=True)
class Overlap:
    """The longest token run that each of N texts shares with any training sequence.

    Of several runs of that length: the first in the text, at its first occurrence in the corpus.
    """

    length: Ints
    """(N,): tokens; 0: nothing is shared."""
    start: Ints
    """(N,): position of the run in the text; -1: nothing is shared."""
    sequence: Ints
    """(N,): index of the training sequence that contains it; -1: none."""
    offset: Ints
    """(N,): position of the run in that sequence; -1: none."""


def dataset_overlap(texts: Sequence[ArrayLike], corpus: Sequence[ArrayLike]) -> Overlap:
    """Return the longest token run that each text shares with any training sequence.

    Args:
        texts: N sequences of token ids, of any lengths.
        corpus: M training sequences of token ids.
    """
    joined = join(texts)
    length = np.zeros(len(texts), dtype=np.int64)
    start, sequence, offset = (np.full(len(texts), -1) for _ in range(3))
    for shared in shared_ngrams(joined, corpus):
        ngrams = shared.texts
        text, first = np.unique(joined.sequence[ngrams.start], return_index=True)
        length[text] = ngrams.n
        start[text] = joined.offset[ngrams.start[first]]
        occurrence = np.full((len(ngrams.keys), 2), -1)  # sequence and offset by n-gram number
        for block in reversed(
            shared.blocks
        ):  # earlier assignments are overwritten: the first stays
            occurrence[block.number[::-1], 0] = block.sequence[::-1]
            occurrence[block.number[::-1], 1] = block.offset[::-1]
        sequence[text], offset[text] = occurrence[ngrams.number[first]].T
    return Overlap(length, start, sequence, offset)


def histogram(lengths: ArrayLike) -> list[int]:
    """Return how many texts have an overlap of 0, 1, 2, … tokens, up to the longest."""
    counts: list[int] = np.bincount(np.asarray(lengths, dtype=np.int64)).tolist()
    return counts
