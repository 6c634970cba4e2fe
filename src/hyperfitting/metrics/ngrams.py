"""N-grams of many sequences at once, and which of them two collections share.

Sequences are (T,) integer arrays of any lengths; no n-gram spans two of them. An n-gram is one
integer, made of the number of its first n - 1 tokens and its last token, so that all n-grams of one
length are one sort.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Joined:
    """Sequences end to end: P tokens in all."""

    tokens: Ints
    """(P,)"""
    sequence: Ints
    """(P,): the number of the sequence that a token is in."""
    offset: Ints
    """(P,): the place of a token in its sequence."""
    left: Ints
    """(P,): tokens from this one to the end of its sequence, this one included."""
    lengths: Ints
    """(N,): tokens of each sequence."""

    @classmethod
    def of(cls, sequences: Sequence[ArrayLike]) -> "Joined":
        """Join sequences; empty ones keep their number."""
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        offset = np.concatenate([[0], *(np.arange(n) for n in lengths)])[1:].astype(np.int64)
        sequence = np.repeat(np.arange(len(arrays)), lengths)
        tokens = np.concatenate([np.zeros(0, np.int64), *arrays])
        return cls(tokens, sequence, offset, lengths[sequence] - offset, lengths)


def ngrams(texts: Joined) -> Iterator[tuple[Ints, Ints]]:
    """Yield all n-grams for n = 1, 2, …: where they begin, and their numbers.

    Equal n-grams have equal numbers, from 0 to the number of distinct ones. Ends when no sequence
    is long enough.
    """
    vocabulary, token = np.unique(texts.tokens, return_inverse=True)
    at, number, n = np.arange(len(token)), token, 1
    while len(at):
        yield at, number
        longer = texts.left[at] > n
        at, keys = at[longer], number[longer] * len(vocabulary) + token[at[longer] + n]
        _, number = np.unique(keys, return_inverse=True)
        n += 1


@dataclass(frozen=True)
class Shared:
    """The n-grams of one length that both texts and corpus have."""

    n: int
    texts: Ints
    """Where they begin in the joined texts."""
    texts_number: Ints
    """The number of each of these."""
    corpus: Ints
    """Where they begin in the joined corpus, rising."""
    corpus_number: Ints
    """The number of each of these; equal numbers are equal n-grams."""


def shared_ngrams(texts: Joined, corpus: Joined) -> Iterator[Shared]:
    """Yield the n-grams that occur in both, for n = 1, 2, … until there are none.

    Only what is shared at one length is looked at for the next, so the cost grows with the corpus
    for the first lengths and with what is shared after them.
    """
    vocabulary, token = np.unique(texts.tokens, return_inverse=True)
    corpus_token = _find(vocabulary, corpus.tokens)
    at, number = np.arange(len(token)), token
    corpus_at = np.flatnonzero(corpus_token >= 0)
    corpus_number = corpus_token[corpus_at]
    n = 1
    while len(corpus_at):
        there = np.zeros(int(number.max()) + 1, dtype=bool)
        there[corpus_number] = True
        at, number = at[there[number]], number[there[number]]
        yield Shared(n, at, number, corpus_at, corpus_number)

        longer = texts.left[at] > n
        at, keys = at[longer], number[longer] * len(vocabulary) + token[at[longer] + n]
        distinct, number = np.unique(keys, return_inverse=True)
        longer = corpus.left[corpus_at] > n
        corpus_at, corpus_number = corpus_at[longer], corpus_number[longer]
        follows = corpus_token[corpus_at + n]
        keys = np.where(follows >= 0, corpus_number * len(vocabulary) + follows, -1)
        corpus_number = _find(distinct, keys)
        corpus_at, corpus_number = corpus_at[corpus_number >= 0], corpus_number[corpus_number >= 0]
        n += 1


def _find(distinct: Ints, values: Ints) -> Ints:
    """Return where each value stands in a sorted array of distinct ones; -1 if it does not."""
    if len(distinct) == 0:
        return np.full(len(values), -1)
    place = np.searchsorted(distinct, values)
    place[place == len(distinct)] = 0
    return np.where(distinct[place] == values, place, -1)
