"""How varied a token sequence is. Tokens are ids, shape (T,); results are shares from 0 to 1."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def ttr(tokens: ArrayLike) -> float:
    """Return the type-token ratio: distinct tokens over tokens (Carlsson et al., section 4).

    Args:
        tokens: (T,) token ids.

    Returns:
        A share in (0, 1]; NaN for an empty sequence, which has no ratio.
    """
    tokens = np.asarray(tokens)
    return len(np.unique(tokens)) / len(tokens) if len(tokens) else float("nan")


def rep_n(tokens: ArrayLike, n: int) -> float:
    """Return the share of n-grams that occurred earlier: 1 - distinct-n (Li et al.).

    Args:
        tokens: (T,) token ids.
        n: length of the n-grams, 1 or more.

    Returns:
        1 - distinct n-grams / n-grams; NaN if the sequence is shorter than n.

    Raises:
        ValueError: n is below 1.
    """
    grams = _ngrams(np.asarray(tokens), n)
    return 1 - len(np.unique(grams, axis=0)) / len(grams) if len(grams) else float("nan")


def repeated(tokens: ArrayLike, n: int) -> NDArray[np.bool_]:
    """Return which tokens lie in an n-gram that occurred earlier in the sequence.

    Args:
        tokens: (T,) token ids.
        n: length of the n-grams, 1 or more.

    Returns:
        (T,) booleans.

    Raises:
        ValueError: n is below 1.
    """
    tokens = np.asarray(tokens)
    marks = np.zeros(len(tokens), dtype=bool)
    grams = _ngrams(tokens, n)
    if len(grams) == 0:
        return marks
    _, first, inverse = np.unique(grams, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse.ravel()] != np.arange(len(grams)))
    for offset in range(n):
        marks[again + offset] = True
    return marks


def _ngrams(tokens: NDArray[np.generic], n: int) -> NDArray[np.generic]:
    """Return all n-grams of a sequence: (T - n + 1, n), or (0, n) if it is too short."""
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has 1 token or more")
    if len(tokens) < n:
        return np.empty((0, n), dtype=tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, n)
