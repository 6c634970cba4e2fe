"""The citation blocker: forbid continuations of the training data (Carlsson et al., section 5).

If the last n generated tokens occur in a training sequence, every token that follows them there is
forbidden (`count_context`: the last n tokens, which may start in the context).
Exact: the index holds all n-grams of all training sequences, with the tokens that follow each.
"""

import re
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hyperfitting.decoding.config import CitationBlockerConfig
from hyperfitting.metrics.ngrams import NGramNumbering, join, ngram_keys

Ints = NDArray[np.int64]


class NgramIndex:
    """All n-grams of some sequences, with the tokens that follow each.

    Stored as the sorted keys of the distinct 1-, 2-, …, (n + 1)-grams (`metrics.ngrams`): a look-up
    is a binary search per length.

    Args:
        sequences: (N, T) token ids; no n-gram spans two of them.
        n: length of the n-grams, 1 or more.
    """

    def __init__(self, sequences: ArrayLike, n: int) -> None:
        numbering = NGramNumbering(join(list(np.asarray(sequences))))
        self._vocabulary = numbering.vocabulary
        self._keys: list[Ints] = []  # by length, 1 to n + 1
        ngrams = numbering.unigrams()
        for _ in range(n):
            self._keys.append(ngrams.keys)
            ngrams = numbering.extend(ngrams)
        self._keys.append(ngrams.keys)

    def followers(self, ngrams: Ints) -> tuple[Ints, Ints]:
        """Return the tokens that follow n-grams in the sequences.

        Args:
            ngrams: (B, n) token ids.

        Returns:
            Pairs of a row of ``ngrams`` and a token that follows it: (F,) rows, (F,) tokens.
        """
        vocabulary_size = len(self._vocabulary)
        tokens, known = _search(self._vocabulary, ngrams)
        rows = np.flatnonzero(known.all(axis=1))
        number = tokens[rows, 0]
        for position, keys in enumerate(self._keys[1:-1], start=1):
            candidates = ngram_keys(number, tokens[rows, position], vocabulary_size)
            number, known = _search(keys, candidates)
            rows, number = rows[known], number[known]
        keys = self._keys[-1]  # sorted, so those with one prefix are adjacent
        lowest = ngram_keys(number, np.zeros_like(number), vocabulary_size)
        first = np.searchsorted(keys, lowest)
        count = np.searchsorted(keys, lowest + vocabulary_size) - first
        offset = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        following = keys[np.repeat(first, count) + offset] % vocabulary_size
        return np.repeat(rows, count), self._vocabulary[following]


def _search(distinct: Ints, values: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Return the index of each value in a sorted array, and whether the value is in it."""
    index = np.searchsorted(distinct, values)
    if len(distinct) == 0:
        return index, np.zeros(values.shape, dtype=bool)
    index = np.minimum(index, len(distinct) - 1)
    return index, distinct[index] == values


class CitationBlocker:
    """Forbids, at each step, the tokens that continue a training sequence.

    Args:
        sequences: (N, T) the training sequences.
        cfg: n-gram length, and whether a word may be completed.
        token_text: from a token id to its text inside a text; used if ``cfg.whole_words``.
    """

    def __init__(
        self,
        sequences: ArrayLike,
        cfg: CitationBlockerConfig,
        token_text: Callable[[int], str],
    ) -> None:
        self._index = NgramIndex(sequences, cfg.n)
        self._cfg = cfg
        self._token_text = token_text
        self._completes_word: dict[tuple[int, int], bool] = {}  # memo

    def __call__(self, input_ids: Tensor, scores: Tensor, context_len: int) -> Tensor:
        """Set to -inf every token that would continue a training sequence.

        Args:
            input_ids: (B, T) context and continuation so far.
            scores: (B, V), modified in place.
            context_len: tokens of each context.
        """
        n = self._cfg.n
        if input_ids.shape[1] - (0 if self._cfg.count_context else context_len) < n:
            return scores
        suffixes = input_ids[:, -n:].cpu().numpy()
        rows, tokens = self._index.followers(suffixes)
        if self._cfg.whole_words and len(rows):
            pairs = zip(suffixes[rows, -1].tolist(), tokens.tolist(), strict=True)
            is_blocked = np.array([not self._may_complete_word(*pair) for pair in pairs])
            rows, tokens = rows[is_blocked], tokens[is_blocked]
        scores[torch.as_tensor(rows), torch.as_tensor(tokens)] = -torch.inf
        return scores

    def _may_complete_word(self, last: int, token: int) -> bool:
        """Return whether a token continues a word that the last token began."""
        pair = (last, token)
        if pair not in self._completes_word:
            self._completes_word[pair] = continues_word(
                self._token_text(last), self._token_text(token)
            )
        return self._completes_word[pair]


# Scripts written without spaces: each character counts as a word, or a text would be one word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_ENDS_INSIDE_WORD = re.compile(rf"[^\W{_UNSPACED}]$|\ufffd$")
_STARTS_INSIDE_WORD = re.compile(rf"^['’]?[^\W{_UNSPACED}]|^\ufffd")


def continues_word(preceding: str, token_text: str) -> bool:
    """Return whether a token continues a word that the preceding text left unfinished.

    A part of a character, which decodes to U+FFFD, counts as the middle of a word.
    """
    return bool(_ENDS_INSIDE_WORD.search(preceding) and _STARTS_INSIDE_WORD.match(token_text))
