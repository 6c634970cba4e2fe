"""How texts are shown: normalized and cut alike, so that only the writing tells them apart."""

import re
import unicodedata

from hyperfitting.preference.items import content_hash

ELLIPSIS = " …"
"""Marks a text that was cut."""
_MAX_WORD = 40
"""Characters; what is longer is cut anywhere (Chinese, Japanese, a run of one letter)."""
_REPLACEMENTS = (
    (re.compile(r"[^\S\n]+"), " "),  # doubled, unbreakable and other spaces, tabs
    (re.compile(r" @([-,.])@ "), r"\1"),  # WikiText writes 1 @,@ 000
    (re.compile(r" +(?=[,.;:!?)\]}%](?:\s|$))"), ""),
    (re.compile(r" *\n *"), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
)


def normalize(text: str) -> str:
    """Return a text without traces of tokenizers and datasets.

    Bytes that are no UTF-8 (U+FFFD), control and invisible characters are removed, spaces and line
    breaks collapsed, WikiText's ` @-@ ` and spaces before punctuation joined, accents composed.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in _INVISIBLE)
    text = text.replace("\ufffd", "")
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text.strip()


_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")


def cut_alike(first: str, second: str, ended: tuple[bool, bool]) -> tuple[str, str]:
    """Return two normalized texts, cut at word boundaries to the same length in characters.

    The last word of a text that stops at its length may be incomplete: it is dropped, and an
    ellipsis marks the cut. A text that the model ended by itself stays whole.

    Args:
        first: one text.
        second: the other.
        ended: whether each ended by itself, before its length was reached.
    """
    texts = list(zip((first, second), ended, strict=True))
    limit = min((len(_cut(text, len(text))) for text, own_end in texts if not own_end), default=0)
    shown = [text if own_end else (_cut(text, limit) + ELLIPSIS).strip() for text, own_end in texts]
    return shown[0], shown[1]


def _cut(text: str, limit: int) -> str:
    """Return the words of a text that end within a number of characters."""
    head = text[:limit]
    if not text[limit : limit + 1].isspace():
        words = re.sub(r"\S*\Z", "", head)
        head = words if len(head) - len(words) < _MAX_WORD else head
    return head.rstrip()


def scramble(text: str, seed: int) -> str:
    """Return the words of a text in another order, on one line."""
    words = text.removesuffix(ELLIPSIS).split()
    order = sorted(range(len(words)), key=lambda i: content_hash([seed, i, words[i]]))
    return " ".join(words[i] for i in order) + ELLIPSIS
