"""Conversations: as rows of a dataset, and as tokens in a model's chat template.

A conversation is kept as a document whose text is the JSON of its messages, so that splitting and
near-duplicates work as for any text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hyperfitting.errors import UserError

Message = dict[str, str]
"""`role` (`system`, `user` or `assistant`) and `content`."""
_MARKED = re.compile(r"\{%-?\s*generation")
"""Of templates that mark answers."""
_ROLES = ("system", "user", "assistant")
_VALID = 'a list of {"role": "user", "content": "…"} and so on, which the assistant answers'
_OPTIONS = {"date_string": "26 Jul 2024"}
"""Passed to the template: Llama 3's would otherwise print the date of today, or this one."""


def conversation(value: Any, where: str, field: str) -> str:
    """Return the document of a list of messages.

    Args:
        value: of the row.
        where: the row, for the error.
        field: its name.

    Raises:
        UserError: it is no conversation, or the assistant says nothing in it.
    """
    rows = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    messages = [
        {"role": row["role"], "content": row["content"]} for row in rows if _is_message(row)
    ]
    is_answered = any(message["role"] == "assistant" for message in messages[1:])
    starts = bool(messages) and messages[0]["role"] != "assistant"
    if len(messages) < len(rows) or not (starts and is_answered):
        raise UserError(
            f"{where} holds no conversation there", field="dataset.text_field", value=field,
            valid=_VALID, hint="dataset.chat=false for plain texts",
        )  # fmt: skip
    return json.dumps(messages, ensure_ascii=False)


def _is_message(row: Any) -> bool:
    return (
        isinstance(row, Mapping)
        and row.get("role") in _ROLES
        and isinstance(row.get("content"), str)
    )


def question(text: str) -> list[Message]:
    """Return the messages of a user's single question."""
    return [{"role": "user", "content": text}]


def row_conversation(row: Any, where: str, field: str) -> str:
    """Return the document of a row of JSON: its messages, or its `prompt` and `response`.

    Raises:
        UserError: it has neither.
    """
    if isinstance(row, Mapping) and field not in row and {"prompt", "response"} <= set(row):
        answer = {"role": "assistant", "content": row["response"]}
        return conversation([*question(row["prompt"]), answer], where, field)
    messages = row.get(field) if isinstance(row, Mapping) else None
    return conversation(messages, where, field)


def check_template(tokenizer: Any, name: str, field: str) -> None:
    """Refuse a model without a chat template.

    Args:
        tokenizer: the model's.
        name: of the model.
        field: of the config that needs the template.

    Raises:
        UserError: its tokenizer has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "its tokenizer has no chat template",
            field=field,
            value=name,
            valid="an instruct model, such as smollm2_135m or llama31_8b_instruct",
        )


def prompt_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to where the assistant answers."""
    return _tokenize(tokenizer, _render(tokenizer, messages, add_generation_prompt=True))[0]


def encode(tokenizer: Any, document: str) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them are the assistant's.

    An answer ends with its end-of-turn token; the white space that templates put after it does not
    count, since generation has ended there. In a template with `{% generation %}` these spans are
    the answers. Without it, an answer is what rendering the conversation up to and including it
    adds to the prompt before it (`add_generation_prompt=True`).

    Args:
        tokenizer: with a chat template.
        document: of `conversation`.

    Raises:
        UserError: the template changes earlier messages, so that the answers cannot be located.
    """
    messages: list[Message] = json.loads(document)
    if _MARKED.search(str(tokenizer.chat_template)):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **_OPTIONS
        )
        return list(encoded["input_ids"]), [bool(i) for i in encoded["assistant_masks"]]
    text = _render(tokenizer, messages)
    spans = list(_answer_spans(tokenizer, messages, text))
    ids, offsets = _tokenize(tokenizer, text)
    # a token that is partly the answer's counts, as transformers has it
    mask = [any(first < end and start < last for start, end in spans) for first, last in offsets]
    return ids, mask


def _answer_spans(
    tokenizer: Any, messages: Sequence[Message], text: str
) -> Iterator[tuple[int, int]]:
    """Yield where in the text each answer begins and ends, in characters."""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:i], add_generation_prompt=True)
        answered = _render(tokenizer, messages[: i + 1])
        if not (answered.startswith(prompt) and text.startswith(answered.rstrip())):
            raise UserError(
                "the model's chat template changes earlier messages, so that the answers cannot be "
                "located",
                field="dataset.assistant_only_loss",
                value=True,
                hint="dataset.assistant_only_loss=false, or a template with {% generation %}",
            )
        yield len(prompt), len(answered.rstrip())


def _render(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options, **_OPTIONS))


def _tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids, and where in the text each token begins and ends; the template has its BOS."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded.input_ids), list(encoded.offset_mapping)
