"""Near-duplicate texts, by the word 13-grams that they share.

Two documents are near-duplicates if at least half of the distinct 13-grams of one of them, or of
its first 100 words, occur in the other: copies, revisions, excerpts, and texts that only begin
alike. (13-grams as in the contamination analysis of Brown et al. 2020, appendix C.) Words are
compared without case and punctuation; a Chinese or Japanese character counts as a word.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from hyperfitting.data.splits import CJK
from hyperfitting.progress import ProgressReporter, no_op

N = 13
"""Words of an n-gram; a shorter text is one n-gram."""
MIN_CONTAINMENT = 0.5
"""Fraction of the n-grams of one text that the other contains."""
PREFIX_WORDS = 100
"""Training sequences and evaluation texts are the beginnings of documents."""

_MAX_DOCUMENTS = 5000
"""N-grams of more documents than this are ignored: licenses, signatures, navigation."""
_ROWS = 1024
"""Documents that are compared with all others at once, to bound the memory."""
_WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")

# odd, so that multiplying by them loses no bits
_MULTIPLIERS = np.random.default_rng(0).integers(2**63, size=N, dtype=np.uint64) * 2 + 1

_Hashes = NDArray[np.uint64]


def near_duplicate_groups(
    documents: Sequence[str], progress: ProgressReporter = no_op
) -> NDArray[np.int32]:
    """Return the group of each document: (N,) numbers from 0.

    Near-duplicates are in one group, and so are their near-duplicates in turn.
    """
    if not documents:
        return np.zeros(0, np.int32)
    ngrams = _ngrams(documents)
    vocabulary = np.unique(np.concatenate(ngrams))
    whole = _incidence(ngrams, vocabulary)
    prefixes = _incidence([hashes[: PREFIX_WORDS - N + 1] for hashes in ngrams], vocabulary)
    n_documents = whole.getnnz(axis=0)
    kept = n_documents <= _MAX_DOCUMENTS
    sizes = (whole[:, kept].getnnz(axis=1), prefixes[:, kept].getnnz(axis=1))
    shared = kept & (n_documents > 1)
    whole, prefixes = whole[:, shared], prefixes[:, shared]
    by_ngram = whole.T.tocsr()
    edges = []
    with progress("looking for near-duplicates", len(documents), "documents") as advance:
        for start in range(0, len(documents), _ROWS):
            rows = slice(start, start + _ROWS)
            edges.append(
                _edges(whole[rows] @ by_ngram, sizes[0][rows])
                + _edges(prefixes[rows] @ by_ngram, sizes[1][rows])
            )
            advance(len(sizes[0][rows]))
    _, groups = sparse.csgraph.connected_components(sparse.vstack(edges), directed=False)
    return np.asarray(groups, dtype=np.int32)


def containment(texts: Sequence[str], corpus: Sequence[str]) -> NDArray[np.float64]:
    """Return which fraction of each text's distinct n-grams occurs anywhere in a corpus: (N,)."""
    ngrams = _ngrams([*texts, *corpus])
    in_corpus = np.unique(np.concatenate([np.zeros(0, np.uint64), *ngrams[len(texts) :]]))
    return np.array(
        [
            np.isin(np.unique(hashes), in_corpus).mean() if len(hashes) else 0.0
            for hashes in ngrams[: len(texts)]
        ]
    )


def _ngrams(texts: Sequence[str]) -> list[_Hashes]:
    """Return a hash of each n-gram of each text, in their order; equal n-grams have equal ones."""
    ids: dict[str, int] = {}
    words = [
        np.array(
            [ids.setdefault(word, len(ids)) for word in _WORD.findall(text.casefold())], np.int64
        )
        for text in texts
    ]
    random = np.random.default_rng(1).integers(2**64, size=len(ids), dtype=np.uint64)
    return [_hash(random[text]) for text in words]


def _hash(words: _Hashes) -> _Hashes:
    n = min(N, len(words))
    if n == 0:
        return words
    windows = np.lib.stride_tricks.sliding_window_view(words, n)
    hashes: _Hashes = (windows * _MULTIPLIERS[:n]).sum(axis=1, dtype=np.uint64)
    return hashes


def _incidence(ngrams: Sequence[_Hashes], vocabulary: _Hashes) -> sparse.csr_matrix:
    """Return which document contains which n-gram: (N, V) of 0 and 1."""
    rows = [np.searchsorted(vocabulary, np.unique(hashes)) for hashes in ngrams]
    starts = np.cumsum([0, *map(len, rows)])
    columns = np.concatenate(rows)
    ones = np.ones(len(columns), np.int32)
    return sparse.csr_matrix((ones, columns, starts), shape=(len(rows), len(vocabulary)))


def _edges(n_shared: sparse.csr_matrix, sizes: NDArray[np.int64]) -> sparse.csr_matrix:
    """Return which rows have at least `MIN_CONTAINMENT` of their n-grams in which documents.

    Args:
        n_shared: (R, N) numbers of n-grams that rows and documents share.
        sizes: (R,) numbers of n-grams of the rows.
    """
    pairs = n_shared.tocoo()
    contained = pairs.data >= MIN_CONTAINMENT * sizes[pairs.row]
    return sparse.csr_matrix(
        (contained[contained], (pairs.row[contained], pairs.col[contained])), shape=pairs.shape
    )
