"""Splitting documents, independent of any tokenizer: into sets, into an order, into passages."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
"""A word, or a run of punctuation."""
CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Chinese and Japanese characters, which are written without spaces."""
_CJK_CHAR = re.compile(f"[{CJK}]")
_CHARS_PER_WORD = 2
"""CJK characters of a word; seven tokenizers put at most 1.8 into a token (docs/data.md)."""


@dataclass(frozen=True)
class Split:
    """Three sets of documents. Near-duplicates are never in two of them."""

    held_out: list[str]
    """For evaluation: of near-duplicates the longest only."""
    validation: list[str]
    """Of near-duplicates the longest only."""
    train: list[str]
    """Near-duplicates of each other stay; exact copies count once."""


def split_documents(
    documents: Sequence[str],
    groups: Sequence[int],
    holdout_fraction: float,
    validation_fraction: float,
) -> Split:
    """Split documents by groups of near-duplicates.

    A group's set depends on a hash of its first text in alphabetical order, so for a document
    without near-duplicates on its own text alone: not on the seed, the tokenizer, the number of
    sequences, or which other documents there are.

    Args:
        documents: N texts.
        groups: (N,) the group of each.
        holdout_fraction: of the groups, for evaluation.
        validation_fraction: of the other groups.
    """
    members: dict[int, dict[str, None]] = {}
    first_group: dict[str, int] = {}
    for document, group in zip(documents, groups, strict=True):
        # copies of a text without words share no n-gram
        members.setdefault(first_group.setdefault(document, group), {})[document] = None
    split = Split([], [], [])
    for texts in members.values():
        representative = min(texts)
        if uniform_hash("split", representative) < holdout_fraction:
            split.held_out.append(max(texts, key=len))
        elif uniform_hash("validation", representative) < validation_fraction:
            split.validation.append(max(texts, key=len))
        else:
            split.train.extend(texts)
    return split


def shuffled(documents: Iterable[str], seed: int) -> list[str]:
    """Return documents in a random order that depends only on ``seed`` and their own texts."""
    return sorted(documents, key=lambda document: (uniform_hash(str(seed), document), document))


def uniform_hash(salt: str, text: str) -> float:
    """Return a number in [0, 1), uniform over texts."""
    value = hashlib.sha256(f"{salt}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(value[:8], "big") / 2**64


def count_words(text: str) -> int:
    """Return the number of words and runs of punctuation in a text.

    Of a Chinese or Japanese text, which has few spaces, the number of pairs of characters.
    """
    return _n_words(*_counts(text))


def _counts(text: str) -> tuple[int, int]:
    """Return the numbers of runs between spaces or punctuation, and of CJK characters."""
    return sum(1 for _ in WORD.finditer(text)), len(_CJK_CHAR.findall(text))


def _n_words(n_runs: int, n_cjk: int) -> int:
    return max(n_runs, n_cjk // _CHARS_PER_WORD)


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
    n_runs = n_cjk = 0
    for paragraph in document.split("\n\n"):
        paragraphs.append(paragraph)
        more_runs, more_cjk = _counts(paragraph)
        n_runs, n_cjk = n_runs + more_runs, n_cjk + more_cjk
        if _n_words(n_runs, n_cjk) >= length:
            yield "\n\n".join(paragraphs)
            paragraphs, n_runs, n_cjk = [], 0, 0
