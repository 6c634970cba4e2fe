"""Tokenizing documents, and the text of each token."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from hyperfitting.data.chat import check_template, encode
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel


class DocumentTokenizer:
    """A model's tokenizer for documents: BOS before each if the model uses one, no padding.

    Args:
        base: the model.
        chat: documents are conversations, in the model's chat template.

    Raises:
        UserError: it is a model of images, or it has no chat template.
    """

    def __init__(self, base: BaseModel, chat: bool = False) -> None:
        if base.image_format() is not None:
            raise UserError(
                "is a model of images, and the dataset is of texts",
                field="model.name",
                value=base.name,
                hint="dataset=digits, cifar10 or image_files",
            )
        self._tokenizer = base.tokenizer()
        self.chat = chat
        """Whether documents are conversations."""
        if chat:
            check_template(self._tokenizer, base.name, "dataset.chat")
        eos = self._tokenizer.eos_token_id
        special = list(self._tokenizer("").input_ids)
        while special and special[-1] == eos and eos != self._tokenizer.bos_token_id:
            special.pop()
        self.bos_ids: list[int] = special
        """Ids that the tokenizer puts before every text; none or one for most models."""

    @cached_property
    def separator(self) -> list[int]:
        """Ids between packed documents: EOS, or a blank line for tokenizers without one.

        None between conversations: their templates end them.
        """
        if self.chat:
            return []
        eos = self._tokenizer.eos_token_id
        return [eos] if eos is not None else self._tokenize("\n\n")

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a document."""
        return self.with_mask(text)[0]

    def with_mask(self, text: str) -> tuple[list[int], list[bool]]:
        """Return the token ids of a document, and which are the assistant's; of texts all are."""
        if self.chat:
            return encode(self._tokenizer, text)
        ids = self.bos_ids + self._tokenize(text)
        return ids, [True] * len(ids)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(list(tokens)))

    def _tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


_WINDOW = 8
"""Preceding tokens that can change how a token is decoded."""
Decode = Callable[[list[int]], str]
"""From token ids to text, as a tokenizer's `decode`."""


def token_texts(decode: Decode, tokens: list[int], context: Sequence[int] = ()) -> list[str]:
    """Return the text of each token; they join to the text of all.

    A token that is only a part of a character gives "", and the token that completes the character
    gives the whole character.

    (`tokenizers.decoders.DecodeStream` gives the same for valid UTF-8, but withholds bytes that
    never complete a character, so that generated texts would lose their end.)

    Args:
        decode: the tokenizer's.
        tokens: (T,) token ids.
        context: ids that precede them; many tokenizers decode the first word of a text without its
            leading space.
    """
    prefix = [int(token) for token in context[-_WINDOW:]]
    tokens = prefix + tokens
    texts: list[str] = []
    ends = [0]  # after how many tokens a text has been emitted
    for n in range(1, len(tokens) + 1):
        decoded, end = ends[-1], n
        # starting inside a character, byte fallback would decode all of its bytes as invalid
        start = next((i for i in reversed(ends) if decoded - i >= _WINDOW), 0)
        emitted, text = decode(tokens[start:decoded]), decode(tokens[start:n])
        texts.append("")
        if text.endswith("\ufffd") and n < len(tokens):
            if n - decoded < _WINDOW:
                continue
            # bytes that are no text: all but those of the last character, which may be incomplete
            end = start + _last_character(decode, tokens[start:n], text)
            end = end if end > decoded else n
            text = decode(tokens[start:end])
        texts[end - 1] = text[len(emitted) :]
        ends.append(end)
    return texts[len(prefix) :]


def _last_character(decode: Decode, tokens: list[int], text: str) -> int:
    """Return the index of the token with which the last character of a text begins."""
    shorter = (i for i in reversed(range(1, len(tokens))) if len(decode(tokens[:i])) < len(text))
    return next(shorter, len(tokens))


def token_text_in_context(tokenizer: Any) -> Callable[[int], str]:
    """Return the function from a token id to its text inside a text, with its leading space."""
    anchor = list(tokenizer("a", add_special_tokens=False).input_ids)
    return lambda token: token_texts(tokenizer.decode, [token], anchor)[0]
