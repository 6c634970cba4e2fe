"""How long a run a text shares with the training data, and where (Carlsson et al., Figure 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hyperfitting.metrics.ngrams import Ints, Joined, shared_ngrams


@dataclass(frozen=True)
class Overlap:
    """The longest token run that each of N texts shares with any training sequence.

    Of several as long, the first in the text, and the first place in the corpus that has it.
    """

    length: Ints
    """(N,): tokens, 0 if nothing is shared."""
    start: Ints
    """(N,): where the run begins in the text; -1 if nothing is shared."""
    sequence: Ints
    """(N,): the training sequence it was found in; -1 if none."""
    offset: Ints
    """(N,): where it begins in that sequence; -1 if none."""


def dataset_overlap(texts: Sequence[ArrayLike], corpus: Sequence[ArrayLike]) -> Overlap:
    """Return the longest token run that each text shares with any training sequence.

    Args:
        texts: N sequences of token ids, of any lengths.
        corpus: M training sequences of token ids.
    """
    joined = Joined.of(texts)
    length = np.zeros(len(texts), dtype=np.int64)
    start, sequence, offset = (np.full(len(texts), -1) for _ in range(3))
    for shared in shared_ngrams(joined, corpus):
        text, first = np.unique(joined.sequence[shared.at], return_index=True)
        length[text] = shared.n
        start[text] = joined.offset[shared.at[first]]
        place = np.full((shared.distinct, 2), -1)  # sequence and offset of each n-gram
        for block in reversed(shared.blocks):  # the first of several stays
            place[block.number[::-1], 0] = block.sequence[::-1]
            place[block.number[::-1], 1] = block.offset[::-1]
        sequence[text], offset[text] = place[shared.number[first]].T
    return Overlap(length, start, sequence, offset)


def histogram(lengths: ArrayLike) -> list[int]:
    """Return how many texts have an overlap of 0, 1, 2, … tokens, up to the longest."""
    counts: list[int] = np.bincount(np.asarray(lengths, dtype=np.int64)).tolist()
    return counts
