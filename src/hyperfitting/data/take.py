"""Taking sequences of one length from tokenized documents: their beginnings, or random blocks."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.splits import count_words
from hyperfitting.data.tokenization import DocumentTokenizer

_MAX_CHARS_PER_TOKEN = 40
"""More than any tokenizer needs; the text after that is not tokenized."""
MaskedSequences = tuple[list[Any], list[Any]]
"""N sequences (T,) of token ids, and N masks (T,) of the tokens that count in the loss."""

log = logging.getLogger(__name__)


def take_prefixes(
    documents: list[str], n: int, length: int, tokenizer: DocumentTokenizer
) -> MaskedSequences:
    """Return the first ``length`` tokens of the first ``n`` long enough documents.

    A conversation is skipped if there is no answer among these tokens.
    """
    sequences: list[list[int]] = []
    masks: list[list[bool]] = []
    for document in documents:
        n_words = count_words(document)
        if n_words < length:
            continue
        text = document if tokenizer.chat else document[: _MAX_CHARS_PER_TOKEN * length]
        tokens, mask = tokenizer.with_mask(text)
        if len(tokens) < length:
            log.info("skipped a document of %d words: only %d tokens", n_words, len(tokens))
            continue
        if not any(mask[1:length]):
            continue
        sequences.append(tokens[:length])
        masks.append(mask[:length])
        if len(sequences) == n:
            break
    return sequences, masks


def take_blocks(
    documents: list[str],
    n: int,
    length: int,
    seed: int,
    tokenizer: DocumentTokenizer,
    advance: Callable[[int], None],
) -> MaskedSequences:
    """Return ``n`` random blocks of ``length`` tokens of all documents, concatenated.

    A block of conversations without a token of an answer is left out.
    """
    stream, masks = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    for document in documents:
        tokens, mask = tokenizer.with_mask(document)
        separator = tokenizer.separator
        stream.append(np.array(tokens + separator, np.int32))
        masks.append(np.array(mask + [True] * len(separator), bool))
        advance(1)
    blocks, loss_masks = (_blocks(np.concatenate(parts), length) for parts in (stream, masks))
    order = np.random.default_rng(seed).permutation(len(blocks))
    order = order[loss_masks[order, 1:].any(1)][:n]
    return list(blocks[order]), list(loss_masks[order])


def _blocks(stream: NDArray[Any], length: int) -> NDArray[Any]:
    """Return a stream (S,) cut into blocks (S // length, length)."""
    n_blocks = len(stream) // length
    return stream[: n_blocks * length].reshape(n_blocks, length)
