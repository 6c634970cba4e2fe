"""The citation blocker: forbid continuations of the training data (Carlsson et al., section 5).

If the last n generated tokens occur in a training sequence, every token that follows them there is
forbidden (`count_context`: the last n tokens, which may start in the context).
Exact: the index holds all n-grams of all training sequences, with the tokens that follow each.
"""

import re
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hyperfitting.decoding.config import CitationBlockerConfig
from hyperfitting.decoding.forbidden import forbid
from hyperfitting.metrics.ngrams import NGramNumbering, join


class NgramIndex:
    """All n-grams of some sequences, with the tokens that follow each.

    Stored as the sorted keys of the distinct 1-, 2-, …, (n + 1)-grams (`metrics.ngrams`): a look-up
    is a binary search per length, on the device of the texts.

    Args:
        sequences: (N, T) token ids; no n-gram spans two of them.
        n: length of the n-grams, 1 or more.
    """

    def __init__(self, sequences: ArrayLike, n: int) -> None:
        numbering = NGramNumbering(join(list(np.asarray(sequences))))
        self.vocabulary = torch.from_numpy(numbering.vocabulary)
        """Sorted distinct token ids of the sequences."""
        self._keys: list[Tensor] = []  # of n-grams with 2 to n + 1 tokens
        ngrams = numbering.unigrams()
        for _ in range(n):
            ngrams = numbering.extend(ngrams)
            self._keys.append(torch.from_numpy(ngrams.keys))
        prefixes = ngrams.keys // max(1, len(numbering.vocabulary))
        self._max_followers = int(np.unique(prefixes, return_counts=True)[1].max(initial=0))

    def followers(self, ngrams: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens that follow n-grams in the sequences.

        Args:
            ngrams: (B, n) token ids.

        Returns:
            (B, F) token ids, and (B, F) which of them follow the n-gram of their row.
        """
        device, n_rows = ngrams.device, len(ngrams)
        if self._max_followers == 0:
            return ngrams.new_zeros(n_rows, 0), ngrams.new_zeros(n_rows, 0, dtype=torch.bool)
        self._move_to(device)
        vocabulary_size = len(self.vocabulary)
        tokens, is_known = _search(self.vocabulary, ngrams)
        number, is_known = tokens[:, 0], is_known.all(dim=1)  # (B,)
        for position, keys in enumerate(self._keys[:-1], start=1):
            number, is_key = _search(keys, number * vocabulary_size + tokens[:, position])
            is_known = is_known & is_key
        keys = self._keys[-1]  # sorted, so those with one prefix are adjacent
        first, end = torch.searchsorted(keys, torch.stack([number, number + 1]) * vocabulary_size)
        count = (end - first).where(is_known, 0)  # (B,)
        offset = torch.arange(self._width(count), device=device)  # (F,)
        index = (first.unsqueeze(1) + offset).clamp_(max=len(keys) - 1)  # (B, F)
        return self.vocabulary[keys[index] % vocabulary_size], offset < count.unsqueeze(1)

    def _width(self, count: Tensor) -> int:
        """Return F for numbers of followers (B,): on a GPU that of any, so that none are read."""
        return int(count.max()) if count.device.type == "cpu" else self._max_followers

    def _move_to(self, device: torch.device) -> None:
        if self.vocabulary.device != device:
            self.vocabulary = self.vocabulary.to(device)
            self._keys = [keys.to(device) for keys in self._keys]


def _search(distinct: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return an index into a sorted array for each value, and whether the value is there."""
    index = torch.searchsorted(distinct, values.contiguous()).clamp_(max=len(distinct) - 1)
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
        if cfg.whole_words:
            self._is_inside_word = _is_inside_word(self._index.vocabulary.tolist(), token_text)

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
        suffixes = input_ids[:, -n:]
        tokens, is_blocked = self._index.followers(suffixes)  # (B, F)
        if self._cfg.whole_words:
            is_blocked &= ~self._may_complete_word(suffixes[:, -1:], tokens)
        forbid(scores, tokens, is_blocked)
        return scores

    def _may_complete_word(self, last: Tensor, tokens: Tensor) -> Tensor:
        """Return which tokens (B, F) continue a word that the last token (B, 1) began."""
        if self._is_inside_word.device != tokens.device:
            self._is_inside_word = self._is_inside_word.to(tokens.device)
        ends, starts = self._is_inside_word
        may_complete: Tensor = ends[last.clamp(max=len(ends) - 1)] & starts[tokens]
        return may_complete


def _is_inside_word(tokens: list[int], token_text: Callable[[int], str]) -> Tensor:
    """Return (2, highest token + 1): whether each token ends, and whether it starts, in a word."""
    table = torch.zeros(2, max(tokens, default=0) + 1, dtype=torch.bool)
    texts = list(map(token_text, tokens))
    table[0, tokens] = torch.tensor([ends_inside_word(text) for text in texts], dtype=torch.bool)
    table[1, tokens] = torch.tensor([starts_inside_word(text) for text in texts], dtype=torch.bool)
    return table


# Scripts written without spaces: each character counts as a word, or a text would be one word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_ENDS_INSIDE_WORD = re.compile(rf"[^\W{_UNSPACED}]$|\ufffd$")
_STARTS_INSIDE_WORD = re.compile(rf"^['’]?[^\W{_UNSPACED}]|^\ufffd")


def ends_inside_word(text: str) -> bool:
    """Return whether a text ends in a word that may go on.

    A part of a character, which decodes to U+FFFD, counts as the middle of a word.
    """
    return bool(_ENDS_INSIDE_WORD.search(text))


def starts_inside_word(text: str) -> bool:
    """Return whether a token's text continues a word that is unfinished; likewise."""
    return bool(_STARTS_INSIDE_WORD.match(text))
