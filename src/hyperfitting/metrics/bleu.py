"""BLEU of texts against each other (Self-BLEU) and against the training data (Dataset BLEU).

The BLEU of Papineni et al. (2002), with uniform weights over 1- to n-grams, per text. Counts are
exact: the same as nltk's `sentence_bleu` with smoothing method 1, from 0 to 1.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hyperfitting.metrics.ngrams import Ints, Joined, ngrams, shared_ngrams

Floats = NDArray[np.float64]
EPSILON = 0.1
"""What an order without any match counts as, in matches (nltk's method 1, as in Texygen)."""


def self_bleu(texts: Sequence[ArrayLike], n: int = 4, epsilon: float = EPSILON) -> Floats:
    """Return the BLEU of each text with all others as its references (Zhu et al., 2018).

    Low is varied: the texts share little. Carlsson et al., Table 2.

    Args:
        texts: N sequences of token ids, of any lengths.
        n: longest n-grams.
        epsilon: matches that an order without any counts as; 0: one such order makes BLEU 0.

    Returns:
        (N,) from 0 to 1. 0 for an empty text. NaN if there is only one text: nothing to compare.

    Raises:
        ValueError: n is below 1.
    """
    _check(n)
    if len(texts) < 2:
        return np.full(len(texts), np.nan)
    joined = Joined.of(texts)
    matches = np.zeros((n, len(texts)))
    for order, (at, number) in enumerate(islice(ngrams(joined), n)):
        matches[order] = _matches_with_others(number, joined.sequence[at], len(texts))
    closest = np.array(
        [_closest(np.delete(joined.lengths, i), k) for i, k in enumerate(joined.lengths)]
    )
    return _bleu(matches, joined.lengths, closest, epsilon)


def _matches_with_others(number: Ints, text: Ints, texts: int) -> Floats:
    """Return (N,) n-grams of each text that others have, each as often as one of them at most."""
    keys, count = np.unique(number * texts + text, return_counts=True)
    gram, who = keys // texts, keys % texts
    order = np.lexsort((-count, gram))
    gram, who, count = gram[order], who[order], count[order]
    first = np.searchsorted(gram, gram)  # where each n-gram's highest count stands
    second = first + 1
    has_second = second < len(gram)
    has_second[has_second] = gram[second[has_second]] == gram[has_second]
    runner_up = np.where(has_second, count[np.minimum(second, len(count) - 1)], 0)
    others = np.where(who == who[first], runner_up, count[first])
    shared: Floats = np.bincount(who, np.minimum(count, others), texts).astype(np.float64)
    return shared


def dataset_bleu(
    texts: Sequence[ArrayLike],
    corpus: Sequence[ArrayLike],
    n: int = 4,
    epsilon: float = EPSILON,
    brevity_penalty: bool = False,
) -> Floats:
    """Return the BLEU of each text with all training sequences as its references.

    High is quoted: the text is put together from what the training data has. Carlsson et al.,
    Table 2. Without brevity penalty by default: training sequences are longer than continuations
    by design, and the penalty (0.19 for 96 against 256 tokens) would say nothing about quoting;
    the paper's highest value, 32.1 of 100, could not have been reached with it.

    Args:
        texts: N sequences of token ids, of any lengths.
        corpus: M training sequences of token ids, at least one.
        n: longest n-grams.
        epsilon: matches that an order without any counts as; 0: one such order makes BLEU 0.
        brevity_penalty: punish texts shorter than the training sequence closest in length.

    Returns:
        (N,) from 0 to 1. 0 for an empty text.

    Raises:
        ValueError: n is below 1, or the corpus is empty.
    """
    _check(n)
    if len(corpus) == 0:
        raise ValueError("no training sequence to compare with")
    joined = Joined.of(texts)
    matches = np.zeros((n, len(texts)))
    for order, shared in enumerate(islice(shared_ngrams(joined, corpus), n)):
        most = np.zeros(shared.distinct, dtype=np.int64)  # in any one training sequence
        for block in shared.blocks:
            keys, count = np.unique(block.number * len(corpus) + block.sequence, return_counts=True)
            np.maximum.at(most, keys // len(corpus), count)
        keys, count = np.unique(
            shared.number * len(texts) + joined.sequence[shared.at], return_counts=True
        )
        clipped = np.minimum(count, most[keys // len(texts)])
        matches[order] = np.bincount(keys % len(texts), clipped, len(texts))
    closest = joined.lengths
    if brevity_penalty:
        lengths = np.array([len(np.asarray(sequence)) for sequence in corpus])
        closest = np.array([_closest(lengths, k) for k in joined.lengths])
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
