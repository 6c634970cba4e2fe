"""BLEU of texts against each other (Self-BLEU) and against the training data (Dataset BLEU).

The sentence BLEU of Papineni et al. (2002) with uniform weights over 1- to n-grams, from 0 to 1;
equal to nltk's `sentence_bleu` with smoothing method 1.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hyperfitting.metrics.ngrams import Ints, all_ngrams, join, shared_ngrams

Floats = NDArray[np.float64]
EPSILON = 0.1
"""Count of an order without any match (nltk's method 1, as in Texygen)."""


def self_bleu(texts: Sequence[ArrayLike], n: int = 4, epsilon: float = EPSILON) -> Floats:
    """Return the BLEU of each text with all others as references (Zhu et al., 2018).

    Low means diverse: the texts share few n-grams. Carlsson et al., Table 2.

    Args:
        texts: N sequences of token ids, of any lengths.
        n: longest n-grams.
        epsilon: count of an order without any match; 0: one such order makes BLEU 0.

    Returns:
        (N,) from 0 to 1; 0 for an empty text; NaN for a single text, which has no references.

    Raises:
        ValueError: n is below 1.
    """
    _check(n)
    if len(texts) < 2:
        return np.full(len(texts), np.nan)
    joined = join(texts)
    matches = np.zeros((n, len(texts)))
    for order, ngrams in enumerate(islice(all_ngrams(joined), n)):
        matches[order] = _matches_with_others(
            ngrams.number, joined.sequence[ngrams.start], len(texts)
        )
    closest = np.array(
        [_closest(np.delete(joined.lengths, i), length) for i, length in enumerate(joined.lengths)]
    )
    return _bleu(matches, joined.lengths, closest, epsilon)


def _matches_with_others(number: Ints, text: Ints, n_texts: int) -> Floats:
    """Return (N,) matches of each text, every n-gram clipped to its highest count in another text.

    Args:
        number: (K,) numbers of all n-grams.
        text: (K,) the text that each is in.
        n_texts: N.
    """
    keys, count = np.unique(number * n_texts + text, return_counts=True)
    ngram, owner = keys // n_texts, keys % n_texts
    order = np.lexsort((-count, ngram))
    ngram, owner, count = ngram[order], owner[order], count[order]
    first = np.searchsorted(ngram, ngram)  # index of each n-gram's highest count
    second = first + 1
    has_second = second < len(ngram)
    has_second[has_second] = ngram[second[has_second]] == ngram[has_second]
    runner_up = np.where(has_second, count[np.minimum(second, len(count) - 1)], 0)
    others = np.where(owner == owner[first], runner_up, count[first])
    matches: Floats = np.bincount(owner, np.minimum(count, others), n_texts).astype(np.float64)
    return matches


def dataset_bleu(
    texts: Sequence[ArrayLike],
    corpus: Sequence[ArrayLike],
    n: int = 4,
    epsilon: float = EPSILON,
    brevity_penalty: bool = False,
) -> Floats:
    """Return the BLEU of each text with all training sequences as references.

    High means copied: the text consists of n-grams of the training data. Carlsson et al., Table 2.
    Without brevity penalty by default: training sequences are longer than continuations by design,
    and the penalty (a factor of 0.19 for 96 against 256 tokens) would measure nothing about
    copying; the paper's highest value, 32.1 of 100, is out of reach with it.

    Args:
        texts: N sequences of token ids, of any lengths.
        corpus: M training sequences of token ids, at least one.
        n: longest n-grams.
        epsilon: count of an order without any match; 0: one such order makes BLEU 0.
        brevity_penalty: penalize texts shorter than the training sequence closest in length.

    Returns:
        (N,) from 0 to 1; 0 for an empty text.

    Raises:
        ValueError: n is below 1, or the corpus is empty.
    """
    _check(n)
    if len(corpus) == 0:
        raise ValueError("no training sequence to compare with")
    joined = join(texts)
    matches = np.zeros((n, len(texts)))
    for order, shared in enumerate(islice(shared_ngrams(joined, corpus), n)):
        ngrams = shared.texts
        highest = np.zeros(len(ngrams.keys), dtype=np.int64)  # count in any one training sequence
        for block in shared.blocks:
            keys, count = np.unique(block.number * len(corpus) + block.sequence, return_counts=True)
            np.maximum.at(highest, keys // len(corpus), count)
        keys, count = np.unique(
            ngrams.number * len(texts) + joined.sequence[ngrams.start], return_counts=True
        )
        clipped = np.minimum(count, highest[keys // len(texts)])
        matches[order] = np.bincount(keys % len(texts), clipped, len(texts))
    closest = joined.lengths
    if brevity_penalty:
        lengths = np.array([len(np.asarray(sequence)) for sequence in corpus])
        closest = np.array([_closest(lengths, length) for length in joined.lengths])
    return _bleu(matches, joined.lengths, closest, epsilon)


def _check(n: int) -> None:
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has 1 token or more")


def _closest(lengths: Ints, length: int) -> int:
    """Return the reference length closest to ``length``, of two the shorter."""
    distinct = np.unique(lengths)
    return int(distinct[np.abs(distinct - length).argmin()])


def _bleu(matches: Floats, lengths: Ints, closest: Ints, epsilon: float) -> Floats:
    """Return BLEU (N,) from matches (n, N), text lengths (N,) and reference lengths (N,)."""
    n = len(matches)
    totals = np.maximum(lengths - np.arange(n)[:, None], 1)  # (n, N)
    with np.errstate(divide="ignore"):
        log_precision = np.log(np.where(matches > 0, matches, epsilon) / totals).mean(axis=0)
        penalty = np.where(lengths > closest, 0, 1 - closest / np.maximum(lengths, 1))
    return np.where(matches[0] > 0, np.exp(penalty + log_precision), 0.0)
