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


class Block:
    """Some sequences of a corpus, and where in them n-grams of the texts begin.

    Args:
        sequences: arrays of token ids.
        first: the number of the first of them in the corpus.
        vocabulary: the sorted distinct tokens of the texts.
    """

    def __init__(self, sequences: Sequence[ArrayLike], first: int, vocabulary: Ints) -> None:
        self._joined = Joined.of(sequences)
        self._token = _find(vocabulary, self._joined.tokens)
        self._first = first
        self.at = np.flatnonzero(self._token >= 0)
        self.number = self._token[self.at]
        """The number of the n-gram at each of these places; equal numbers are equal n-grams."""

    @property
    def sequence(self) -> Ints:
        """The sequence of the corpus that each n-gram is in."""
        return self._joined.sequence[self.at] + self._first

    @property
    def offset(self) -> Ints:
        """Where in its sequence each n-gram begins."""
        return self._joined.offset[self.at]

    def extend(self, n: int, base: int, longer: Ints) -> None:
        """Keep the n-grams that go on to one of the texts' (n + 1)-grams, whose keys are given."""
        inside = self._joined.left[self.at] > n
        at, number = self.at[inside], self.number[inside]
        follows = self._token[at + n]
        number = _find(longer, np.where(follows >= 0, number * base + follows, -1))
        self.at, self.number = at[number >= 0], number[number >= 0]


@dataclass(frozen=True)
class Shared:
    """The n-grams of one length that both texts and corpus have."""

    n: int
    at: Ints
    """Where they begin in the joined texts."""
    number: Ints
    """The number of each of these, as in the blocks."""
    distinct: int
    """Numbers are below this."""
    blocks: list[Block]
    """The corpus, in order."""


_BLOCK = 512  # sequences whose arrays still fit a processor's cache: the cost stays linear


def shared_ngrams(texts: Joined, corpus: Sequence[ArrayLike]) -> Iterator[Shared]:
    """Yield the n-grams that occur in both, for n = 1, 2, … until there are none.

    Only what is shared at one length is looked at for the next, so the cost grows with the corpus
    for the first lengths and with what is shared after them. The blocks change from one yield to
    the next.
    """
    vocabulary, number = np.unique(texts.tokens, return_inverse=True)
    token, at, distinct = number, np.arange(len(number)), len(vocabulary)
    blocks = [
        Block(corpus[start : start + _BLOCK], start, vocabulary)
        for start in range(0, len(corpus), _BLOCK)
    ]
    n = 1
    while True:
        there = np.zeros(distinct, dtype=bool)
        for block in blocks:
            there[block.number] = True
        at, number = at[there[number]], number[there[number]]
        if len(at) == 0:
            return
        yield Shared(n, at, number, distinct, blocks)
        longer = texts.left[at] > n
        at, keys = at[longer], number[longer] * len(vocabulary) + token[at[longer] + n]
        keys, number = np.unique(keys, return_inverse=True)
        distinct = len(keys)
        for block in blocks:
            block.extend(n, len(vocabulary), keys)
        n += 1


def _find(distinct: Ints, values: Ints) -> Ints:
    """Return where each value stands in a sorted array of distinct ones; -1 if it does not."""
    if len(distinct) == 0:
        return np.full(len(values), -1)
    place = np.searchsorted(distinct, values)
    place[place == len(distinct)] = 0
    return np.where(distinct[place] == values, place, -1)
