"""Splitting documents, independent of any tokenizer: held-out ones, order, passages."""

import hashlib
import re
from collections.abc import Iterable, Iterator

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
"""A word, or a run of punctuation."""


def split_holdout(documents: Iterable[str], holdout_fraction: float) -> tuple[list[str], list[str]]:
    """Return the documents held out for evaluation, and the others.

    A document is assigned by a hash of its own text alone; exact duplicates count once.
    """
    held_out: list[str] = []
    others: list[str] = []
    for document in dict.fromkeys(documents):
        side = held_out if _hash("split", document) < holdout_fraction else others
        side.append(document)
    return held_out, others


def shuffled(documents: Iterable[str], seed: int) -> list[str]:
    """Return documents in a random order that depends only on ``seed`` and their own texts."""
    return sorted(documents, key=lambda document: (_hash(str(seed), document), document))


def _hash(salt: str, text: str) -> float:
    """Return a number in [0, 1), uniform over texts."""
    value = hashlib.sha256(f"{salt}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(value[:8], "big") / 2**64


def count_words(text: str) -> int:
    """Return the number of words and runs of punctuation in a text."""
    return sum(1 for _ in WORD.finditer(text))


def cut_passages(documents: list[str], length: int) -> list[str]:
    """Cut documents into non-overlapping passages of at least ``length`` words.

    Each begins at a paragraph. The first passages of all documents come first, then the second
    ones, and so on, so that a few passages come from many documents.
    """
    by_document = [list(_cut_document(document, length)) for document in documents]
    most = max(map(len, by_document), default=0)
    return [passages[i] for i in range(most) for passages in by_document if i < len(passages)]


def _cut_document(document: str, length: int) -> Iterator[str]:
    paragraphs: list[str] = []
    n_words = 0
    for paragraph in document.split("\n\n"):
        paragraphs.append(paragraph)
        n_words += count_words(paragraph)
        if n_words >= length:
            yield "\n\n".join(paragraphs)
            paragraphs, n_words = [], 0
