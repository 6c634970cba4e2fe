"""The citation blocker: never go on as the training data does (Carlsson et al., section 5).

If the last n tokens occur in a training sequence, every token that follows them there is forbidden.
Exact: the index holds all n-grams of all training sequences and what follows each.
"""

import re
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hyperfitting.config import CitationBlockerConfig

Ints = NDArray[np.int64]


class NgramIndex:
    """All n-grams of some sequences, with the tokens that follow each.

    Kept as one sorted array a length: an n-gram is the number of its first n - 1 tokens among the
    (n-1)-grams, and its last token, in one integer. Looking one up takes n binary searches.

    Args:
        sequences: (N, T) token ids; none of the n-grams spans two sequences.
        n: length of the n-grams, 1 or more.
    """

    def __init__(self, sequences: ArrayLike, n: int) -> None:
        tokens: Ints = np.asarray(sequences, dtype=np.int64)
        self.n = n
        self._base = int(tokens.max(initial=0)) + 1
        self._levels: list[Ints] = []
        numbers: Ints = np.zeros_like(tokens)
        for length in range(1, n + 2):
            ends = tokens[:, length - 1 :]
            keys = numbers[:, : ends.shape[1]] * self._base + ends
            level, inverse = np.unique(keys, return_inverse=True)
            self._levels.append(level)
            numbers = inverse.reshape(keys.shape).astype(np.int64, copy=False)

    def followers(self, grams: Ints) -> tuple[Ints, Ints]:
        """Return what follows n-grams in the sequences.

        Args:
            grams: (B, n) token ids.

        Returns:
            Pairs of a row of ``grams`` and a token that follows it: (F,) rows, (F,) tokens.
        """
        rows = np.flatnonzero((grams < self._base).all(axis=1))
        numbers = np.zeros(len(rows), dtype=np.int64)
        for length, level in enumerate(self._levels[:-1]):
            keys = numbers * self._base + grams[rows, length]
            numbers = np.searchsorted(level, keys)
            found = level[np.minimum(numbers, len(level) - 1)] == keys if len(level) else keys < 0
            rows, numbers = rows[found], numbers[found]
        last = self._levels[-1]
        low = np.searchsorted(last, numbers * self._base)
        count = np.searchsorted(last, (numbers + 1) * self._base) - low
        within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        return np.repeat(rows, count), last[np.repeat(low, count) + within] % self._base


class CitationBlocker:
    """Forbids, at each step, what would go on with a training sequence.

    Args:
        sequences: (N, T) the training sequences.
        cfg: how many tokens make a citation, and whether a word may finish.
        piece: the text of a token where it stands in a text; needed for ``cfg.whole_words``.
    """

    def __init__(
        self,
        sequences: ArrayLike,
        cfg: CitationBlockerConfig,
        piece: Callable[[int], str],
    ) -> None:
        self._index = NgramIndex(sequences, cfg.n)
        self._cfg = cfg
        self._piece = piece
        self._in_word: dict[tuple[int, int], bool] = {}

    def __call__(self, scores: Tensor, history: Tensor, start: int) -> Tensor:
        """Set to -inf every token that would go on with a training sequence.

        Args:
            scores: (B, V), changed in place.
            history: (B, T) ids of context and continuation so far.
            start: where in it the continuation begins.
        """
        n = self._cfg.n
        if history.shape[1] - (0 if self._cfg.count_context else start) < n:
            return scores
        recent = history[:, -n:].cpu().numpy()
        rows, tokens = self._index.followers(recent)
        if self._cfg.whole_words and len(rows):
            pairs = zip(recent[rows, -1].tolist(), tokens.tolist(), strict=True)
            blocked = np.array([not self._finishes_word(*pair) for pair in pairs])
            rows, tokens = rows[blocked], tokens[blocked]
        scores[torch.as_tensor(rows), torch.as_tensor(tokens)] = -torch.inf
        return scores

    def _finishes_word(self, last: int, token: int) -> bool:
        """Return whether a token goes on within the word that the last one left open."""
        pair = (last, token)
        if pair not in self._in_word:
            self._in_word[pair] = continues_word(self._piece(last), self._piece(token))
        return self._in_word[pair]


# Scripts written without spaces: each character counts as a word, or a text would be one word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_OPEN = re.compile(rf"[^\W{_UNSPACED}]$|\ufffd$")
_GOES_ON = re.compile(rf"^['’]?[^\W{_UNSPACED}]|^\ufffd")


def continues_word(before: str, piece: str) -> bool:
    """Return whether ``piece`` goes on within a word that ``before`` leaves open.

    Part of a character, which decodes to U+FFFD, counts as the middle of a word.
    """
    return bool(_OPEN.search(before) and _GOES_ON.match(piece))
