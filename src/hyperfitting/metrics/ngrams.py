"""N-grams of many sequences at once, and the n-grams that two collections share.

Sequences are (T,) integer arrays of any lengths; no n-gram spans two of them. Equal n-grams have
equal numbers: an n-gram's key is the number of its first n - 1 tokens combined with its last token,
and its number is the index of that key among the sorted distinct ones, so numbering all n-grams of
one length is one sort, and finding given ones is one binary search per token (`lookup`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class JoinedSequences:
    """N sequences concatenated: P tokens in all."""

    tokens: Ints
    """(P,)"""
    sequence: Ints
    """(P,): index of the sequence that a token is in."""
    offset: Ints
    """(P,): position of a token in its sequence."""
    remaining: Ints
    """(P,): tokens from this one to the end of its sequence, this one included."""
    lengths: Ints
    """(N,): tokens of each sequence."""


def join(sequences: Sequence[ArrayLike]) -> JoinedSequences:
    """Concatenate sequences; empty ones keep their index."""
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    offset = np.concatenate([[0], *(np.arange(n) for n in lengths)])[1:].astype(np.int64)
    sequence = np.repeat(np.arange(len(arrays)), lengths)
    tokens = np.concatenate([np.zeros(0, np.int64), *arrays])
    return JoinedSequences(tokens, sequence, offset, lengths[sequence] - offset, lengths)


@dataclass(frozen=True)
class NGrams:
    """The n-grams of one length in joined sequences: K of them."""

    n: int
    start: Ints
    """(K,): positions of their first tokens."""
    number: Ints
    """(K,): their numbers, from 0 to the number of distinct ones."""
    keys: Ints
    """Sorted keys of the distinct ones; a number is an index into this."""

    def select(self, rows: NDArray[np.bool_]) -> "NGrams":
        """Return some of them. ``rows``: (K,)."""
        return NGrams(self.n, self.start[rows], self.number[rows], self.keys)


class NGramNumbering:
    """Numbers the n-grams of joined sequences, one length after the other."""

    def __init__(self, joined: JoinedSequences) -> None:
        self._joined = joined
        self.vocabulary, self._token = np.unique(joined.tokens, return_inverse=True)

    def unigrams(self) -> NGrams:
        """Return the 1-grams: all tokens."""
        return NGrams(1, np.arange(len(self._token)), self._token, self.vocabulary)

    def extend(self, ngrams: NGrams) -> NGrams:
        """Return the (n + 1)-grams that begin with given n-grams."""
        longer = self._joined.remaining[ngrams.start] > ngrams.n
        start = ngrams.start[longer]
        following = self._token[start + ngrams.n]
        keys = ngram_keys(ngrams.number[longer], following, len(self.vocabulary))
        distinct, number = np.unique(keys, return_inverse=True)
        return NGrams(ngrams.n + 1, start, number, distinct)


def ngram_keys(prefix: Ints, last: Ints, vocabulary_size: int) -> Ints:
    """Return the keys of n-grams, from the numbers of their prefixes and their last tokens."""
    keys: Ints = prefix * vocabulary_size + last
    return keys


def all_ngrams(joined: JoinedSequences) -> Iterator[NGrams]:
    """Yield all n-grams for n = 1, 2, … until no sequence is long enough."""
    numbering = NGramNumbering(joined)
    ngrams = numbering.unigrams()
    while len(ngrams.start):
        yield ngrams
        ngrams = numbering.extend(ngrams)


class CorpusBlock:
    """Some sequences of a corpus, and the n-grams of the texts that occur in them.

    Args:
        sequences: arrays of token ids.
        first: index of the first of them in the corpus.
        vocabulary: the sorted distinct tokens of the texts.
    """

    def __init__(self, sequences: Sequence[ArrayLike], first: int, vocabulary: Ints) -> None:
        self._joined = join(sequences)
        self._token = lookup(vocabulary, self._joined.tokens)
        self._first = first
        self.start = np.flatnonzero(self._token >= 0)
        """Positions of the first tokens of these n-grams."""
        self.number = self._token[self.start]
        """Their numbers, the same as in the texts."""

    @property
    def sequence(self) -> Ints:
        """The corpus sequence that each n-gram is in."""
        return self._joined.sequence[self.start] + self._first

    @property
    def offset(self) -> Ints:
        """Position of each n-gram in its sequence."""
        return self._joined.offset[self.start]

    def extend(self, n: int, vocabulary_size: int, keys: Ints) -> None:
        """Move on from n-grams to (n + 1)-grams: to those whose keys are given."""
        longer = self._joined.remaining[self.start] > n
        start, prefix = self.start[longer], self.number[longer]
        following = self._token[start + n]
        candidates = ngram_keys(prefix, following, vocabulary_size)
        number = lookup(keys, np.where(following >= 0, candidates, -1))
        self.start, self.number = start[number >= 0], number[number >= 0]


@dataclass(frozen=True)
class SharedNGrams:
    """The n-grams of one length that occur in both the texts and the corpus."""

    texts: NGrams
    """Where they occur in the joined texts."""
    blocks: list[CorpusBlock]
    """Where they occur in the corpus, in its order."""


_BLOCK = 512  # sequences whose arrays fit a processor's cache, so that the cost stays linear


def shared_ngrams(texts: JoinedSequences, corpus: Sequence[ArrayLike]) -> Iterator[SharedNGrams]:
    """Yield the n-grams that occur in both, for n = 1, 2, … until there are none.

    Only n-grams that are shared are extended, so the cost grows with the corpus for the first
    lengths and with what is shared after that. The blocks change from one yield to the next.
    """
    numbering = NGramNumbering(texts)
    ngrams = numbering.unigrams()
    blocks = [
        CorpusBlock(corpus[start : start + _BLOCK], start, numbering.vocabulary)
        for start in range(0, len(corpus), _BLOCK)
    ]
    while True:
        in_corpus = np.zeros(len(ngrams.keys), dtype=bool)
        for block in blocks:
            in_corpus[block.number] = True
        ngrams = ngrams.select(in_corpus[ngrams.number])
        if len(ngrams.start) == 0:
            return
        yield SharedNGrams(ngrams, blocks)
        n, ngrams = ngrams.n, numbering.extend(ngrams)
        for block in blocks:
            block.extend(n, len(numbering.vocabulary), ngrams.keys)


def lookup(distinct: Ints, values: Ints) -> Ints:
    """Return the index of each value in a sorted array of distinct ones; -1 if it is absent."""
    if len(distinct) == 0:
        return np.full(len(values), -1)
    index = np.searchsorted(distinct, values)
    index[index == len(distinct)] = 0
    return np.where(distinct[index] == values, index, -1)
