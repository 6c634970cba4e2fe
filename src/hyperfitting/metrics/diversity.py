"""How varied a token sequence is, and how it repeats itself. Tokens are ids, shape (T,)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

LOOP_TOKENS = 10
"""A text ends in a loop if its last unit comes twice or more in a row, over this many tokens."""

_AT_ONCE = 2**20
"""Comparisons of tokens that are held at once."""


def ttr(tokens: ArrayLike) -> float:
    """Return the type-token ratio: distinct tokens over tokens (Carlsson et al., section 4).

    Args:
        tokens: (T,) token ids.

    Returns:
        A share in (0, 1]; NaN for an empty sequence, which has no ratio.
    """
    return distinct_n(tokens, 1)


def distinct_n(tokens: ArrayLike, n: int) -> float:
    """Return distinct n-grams over n-grams (Li et al., 2016).

    Args:
        tokens: (T,) token ids.
        n: length of the n-grams, 1 or more.

    Returns:
        A share in (0, 1]; NaN if the sequence is shorter than n.

    Raises:
        ValueError: n is below 1.
    """
    grams = _ngrams(np.asarray(tokens), n)
    return len(np.unique(grams, axis=0)) / len(grams) if len(grams) else float("nan")


def rep_n(tokens: ArrayLike, n: int) -> float:
    """Return the share of n-grams that occurred earlier: 1 - distinct-n (Li et al., ICML 2026).

    Args, result and errors are those of `distinct_n`.
    """
    return 1 - distinct_n(tokens, n)


def longest_loop(tokens: ArrayLike) -> float:
    """Return how many tokens the longest immediate loop takes.

    A loop is a stretch in which one unit, of any length, comes twice or more in a row; a last,
    incomplete repeat counts. "a b c a b c a" takes 7 tokens.

    Args:
        tokens: (T,) token ids.

    Returns:
        Tokens, 0 if nothing is repeated immediately; NaN for an empty sequence.
    """
    return _loop(np.asarray(tokens), lambda runs: int(runs.max()))


def final_loop(tokens: ArrayLike) -> float:
    """Return how many tokens the loop takes in which the sequence ends.

    Args and result are those of `longest_loop`, of loops that reach the last token.
    """
    return _loop(np.asarray(tokens), lambda runs: int(runs[-1]))


def _loop(tokens: NDArray[np.generic], chosen: Callable[[NDArray[np.int64]], int]) -> float:
    """Return the tokens of the longest loop among those that ``chosen`` takes from each period.

    Args:
        tokens: (T,) token ids.
        chosen: from the lengths of the runs in which each token equals the one a period before.
    """
    if len(tokens) == 0:
        return float("nan")
    longest = 0
    for period in range(1, len(tokens) // 2 + 1):
        run = chosen(_runs(tokens[period:] == tokens[:-period]))
        if run >= period:
            longest = max(longest, run + period)
    return float(longest)


def ends_in_loop(tokens: ArrayLike) -> float:
    """Return 1 if the sequence ends in a loop of `LOOP_TOKENS` tokens or more, else 0.

    NaN for an empty sequence. "that that" at the end of a text is not yet a loop; a sentence said
    twice is.
    """
    length = final_loop(tokens)
    return length if np.isnan(length) else float(length >= LOOP_TOKENS)


def repetition(tokens: ArrayLike) -> NDArray[np.int64]:
    """Return how much of the sequence each token repeats (the colouring of Figure 1).

    Args:
        tokens: (T,) token ids.

    Returns:
        (T,): for each token, the length of the longest stretch around it that also stands earlier
        in the sequence; 0 for a token that is new.
    """
    tokens = np.asarray(tokens)
    found = np.zeros(len(tokens), dtype=np.int64)
    step = max(1, _AT_ONCE // (len(tokens) + 1))
    for first in range(1, len(tokens), step):
        lags = np.arange(first, min(first + step, len(tokens)))
        earlier = np.arange(len(tokens)) - lags[:, None]  # (L, T)
        same = np.zeros((len(lags), len(tokens) + 1), dtype=np.bool_)  # false between two lags
        same[:, :-1] = (earlier >= 0) & (tokens == tokens[np.maximum(earlier, 0)])
        runs = _runs(same.ravel()).reshape(same.shape)[:, :-1]
        np.maximum(found, runs.max(axis=0), out=found)
    return found


def _runs(marks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for each position the length of the run of true values that it is in; 0 if false."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]])))
    lengths = edges[1::2] - edges[::2]
    runs = np.zeros(len(marks), dtype=np.int64)
    runs[marks] = np.repeat(lengths, lengths)
    return runs


def _ngrams(tokens: NDArray[np.generic], n: int) -> NDArray[np.generic]:
    """Return all n-grams of a sequence: (T - n + 1, n), or (0, n) if it is too short."""
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has 1 token or more")
    if len(tokens) < n:
        return np.empty((0, n), dtype=tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, n)
