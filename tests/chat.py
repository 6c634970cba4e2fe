"""Conversations, and tokenizers with a chat template."""

import json
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.data.config import DatasetConfig
from hyperfitting.models.base import BaseModel
from hyperfitting.models.random_init import byte_tokenizer
from tests.conftest import tiny_model
from tests.documents import files_config

CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Turns on lines of their own, as in SmolLM2's and Qwen2.5's templates."""
TRIMMED = (
    "{{- '<|begin|>Today: ' + (date_string if date_string is defined else now()) }}"
    "{%- for m in messages %}{{- '<|' + m.role + '|>\n\n' }}"
    "{%- if m.role == 'assistant' %}{%- generation %}{{- m.content | trim }}{{- '<|end|>' }}"
    "{%- endgeneration %}{%- else %}{{- m.content | trim + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n\n' }}{%- endif %}"
)
"""Trims messages and prints a date, as Llama 3's template."""


def without_marks(template: str) -> str:
    for dash in ("", "-"):
        for mark in ("generation", "endgeneration"):
            template = template.replace(f"{{%{dash} {mark} %}}", "")
    return template


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def messages(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


_ANSWER = "It is because number {i} follows from what was said before, as everybody knows. " * 5


def chat_file(folder: Path, n: int = 60) -> Path:
    """Conversations, every other one as `prompt` and `response`."""
    rows: list[dict[str, Any]] = []
    for i in range(n):
        prompt, answer = f"Why is it {i}?", _ANSWER.format(i=i * 7919)
        rows.append({"prompt": prompt, "response": answer})
        if i % 2:
            rows[-1] = {"messages": messages(prompt, answer)}
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def chat_config(path: Path, **fields: Any) -> DatasetConfig:
    sizes = {"seq_len": 48, "n_train": 8, "n_val": 4}
    return files_config(path, **{"chat": True, "text_field": "messages"} | sizes | fields)


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A tiny model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    model = tiny_model(folder, "llama")
    tokenizer_with(without_marks(CHATML)).save_pretrained(folder)
    return model
