"""Diversity and repetition within one token sequence. Tokens are ids, shape (T,)."""

from collections.abc import Callable
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hyperfitting.metrics.ngrams import all_ngrams, join

LOOP_TOKENS = 10
"""A text ends in a loop if its last unit occurs twice or more in a row, over this many tokens."""

ROLLING_WINDOW = 96
"""Tokens of `rolling_ttr` along a continuation, as in Figure 9 of Carlsson et al."""

_MAX_COMPARISONS = 2**20
"""Token comparisons that are held in memory at once."""


def ttr(tokens: ArrayLike) -> float:
    """Return the type-token ratio: distinct tokens over tokens (Carlsson et al., section 4).

    Args:
        tokens: (T,) token ids.

    Returns:
        A ratio in (0, 1]; NaN for an empty sequence.
    """
    return distinct_n(tokens, 1)


def distinct_n(tokens: ArrayLike, n: int) -> float:
    """Return distinct n-grams over n-grams (Li et al., 2016).

    Args:
        tokens: (T,) token ids.
        n: length of the n-grams, 1 or more.

    Returns:
        A ratio in (0, 1]; NaN if the sequence is shorter than n.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has 1 token or more")
    ngrams = next(islice(all_ngrams(join([tokens])), n - 1, None), None)
    return float("nan") if ngrams is None else len(ngrams.keys) / len(ngrams.start)


def rep_n(tokens: ArrayLike, n: int) -> float:
    """Return the share of n-grams that occurred earlier: 1 - distinct-n (Li et al., ICML 2026).

    Args, result and errors are those of `distinct_n`.
    """
    return 1 - distinct_n(tokens, n)


def rolling_ttr(tokens: ArrayLike, window: int) -> NDArray[np.float64]:
    """Return the type-token ratio of the last tokens at each position (Carlsson et al., Figure 9).

    Args:
        tokens: (T,) token ids.
        window: tokens that are counted, up to and including the position.

    Returns:
        (T,) ratios; NaN where fewer than ``window`` tokens precede.
    """
    ids = np.asarray(tokens)
    ratios = np.full(len(ids), np.nan)
    if len(ids) < window:
        return ratios
    order = np.argsort(ids, kind="stable")
    same = ids[order[1:]] == ids[order[:-1]]
    previous = np.full(len(ids), -1)  # position of the last occurrence of the same token
    previous[order[1:][same]] = order[:-1][same]
    windows = np.lib.stride_tricks.sliding_window_view(previous, window)  # (T - window + 1, window)
    starts = np.arange(len(windows))[:, None]
    ratios[window - 1 :] = (windows < starts).mean(axis=1)
    return ratios


def longest_loop(tokens: ArrayLike) -> float:
    """Return the length of the longest immediate loop.

    A loop is a span in which one unit, of any length, occurs twice or more in a row; a last,
    incomplete repeat counts. "a b c a b c a" is a loop of 7 tokens.

    Args:
        tokens: (T,) token ids.

    Returns:
        Tokens; 0 if nothing is repeated immediately; NaN for an empty sequence.
    """
    return _loop(np.asarray(tokens), lambda runs: int(runs.max()))


def final_loop(tokens: ArrayLike) -> float:
    """Return the length of the loop that the sequence ends in.

    Args and result are those of `longest_loop`, over loops that include the last token.
    """
    return _loop(np.asarray(tokens), lambda runs: int(runs[-1]))


def _loop(tokens: NDArray[np.generic], select: Callable[[NDArray[np.int64]], int]) -> float:
    """Return the length of the longest loop, over one run per period.

    Args:
        tokens: (T,) token ids.
        select: returns one of the lengths of the runs in which each token equals the one a period
            earlier.
    """
    if len(tokens) == 0:
        return float("nan")
    longest = 0
    for period in range(1, len(tokens) // 2 + 1):
        run = select(_run_lengths(tokens[period:] == tokens[:-period]))
        if run >= period:
            longest = max(longest, run + period)
    return float(longest)


def ends_in_loop(tokens: ArrayLike) -> float:
    """Return 1 if the sequence ends in a loop of `LOOP_TOKENS` tokens or more, else 0.

    NaN for an empty sequence. "that that" at the end of a text is no loop yet; a sentence that is
    repeated is one.
    """
    length = final_loop(tokens)
    return length if np.isnan(length) else float(length >= LOOP_TOKENS)


def repetition(tokens: ArrayLike) -> NDArray[np.int64]:
    """Return for each token the length of the repeated span that it is in (Figure 1's colors).

    Args:
        tokens: (T,) token ids.

    Returns:
        (T,): the length of the longest span around each token that also occurs earlier in the
        sequence; 0 for a token that is new.
    """
    tokens = np.asarray(tokens)
    longest = np.zeros(len(tokens), dtype=np.int64)
    step = max(1, _MAX_COMPARISONS // (len(tokens) + 1))
    for first in range(1, len(tokens), step):
        lags = np.arange(first, min(first + step, len(tokens)))
        earlier = np.arange(len(tokens)) - lags[:, None]  # (L, T)
        same = np.zeros((len(lags), len(tokens) + 1), dtype=np.bool_)  # false between two lags
        same[:, :-1] = (earlier >= 0) & (tokens == tokens[np.maximum(earlier, 0)])
        runs = _run_lengths(same.ravel()).reshape(same.shape)[:, :-1]
        np.maximum(longest, runs.max(axis=0), out=longest)
    return longest


def _run_lengths(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return at each position the length of the run of true values that it is in; 0 if false."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    lengths = edges[1::2] - edges[::2]
    runs = np.zeros(len(mask), dtype=np.int64)
    runs[mask] = np.repeat(lengths, lengths)
    return runs
