"""Chat: conversations as rows and tokens, and the loss on answers only."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from hyperfitting.data import chat
from hyperfitting.data.config import DatasetConfig
from hyperfitting.data.sequences import Sequences, load_sequences, sequences_step
from hyperfitting.data.sources import documents_step
from hyperfitting.errors import UserError
from hyperfitting.evaluation.chat import check_chat
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.progress import no_op
from hyperfitting.store.artifact import Store
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.loss import NextTokenLoss
from hyperfitting.training.step import build_train_state, train_step
from hyperfitting.training.validation import validate
from tests.chat import (
    CHATML,
    TRIMMED,
    chat_base,
    chat_config,
    chat_file,
    messages,
    tokenizer_with,
    without_marks,
)
from tests.conftest import Compose
from tests.documents import files_config
from tests.training import DATA, cache_location, cfg

__all__ = ["cfg", "chat_base"]


def masked_text(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> str:
    return str(tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts]))


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
@given(contents=st.lists(st.text(max_size=8), min_size=2, max_size=5))
@hypothesis_settings(max_examples=25)
def test_the_answers_without_marks_are_those_that_transformers_finds_by_marks(
    template: str, contents: list[str]
) -> None:
    conversation = messages(*contents)
    expected = tokenizer_with(template).apply_chat_template(
        conversation, return_dict=True, return_assistant_tokens_mask=True, date_string="26 Jul 2024"
    )
    for written in (template, without_marks(template)):
        ids, mask = chat.encode(tokenizer_with(written), json.dumps(conversation))
        assert ids == list(expected["input_ids"])
        assert mask == [bool(i) for i in expected["assistant_masks"]]


def test_an_answer_counts_up_to_its_end_token() -> None:
    tokenizer = tokenizer_with(without_marks(CHATML))
    ids, mask = chat.encode(tokenizer, json.dumps(messages("Hi", "Yes.", "Why?", "No.\n")))
    assert masked_text(tokenizer, ids, mask) == "Yes.<|end|>No.\n<|end|>"


def test_the_prompt_is_the_conversation_up_to_the_answer() -> None:
    tokenizer = tokenizer_with(without_marks(CHATML))
    prompt = chat.prompt_tokens(tokenizer, chat.question("Why?"))
    ids, mask = chat.encode(tokenizer, json.dumps(messages("Why?", "Because.")))
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    last_only = "{% for m in messages[-1:] %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="changes earlier messages"):
        chat.encode(tokenizer_with(last_only), json.dumps(messages("a", "b", "c", "d")))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "text"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"messages": [{"role": "assistant", "content": "no question"}]},
        {"messages": [*messages("a", "b"), {"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": 3}, *messages("a", "b")]},
        {"prompt": "p"},
        {"prompt": "p", "response": None},
        ["p", "r"],
    ],
)
def test_a_row_that_is_no_conversation_is_an_error_that_names_it(
    tmp_path: Path, store: Store, row: Any
) -> None:
    path = tmp_path / "chat.jsonl"
    good = {"messages": messages("a", "b")}
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, row)), "utf-8")
    config = files_config(path, chat=True, text_field="messages")
    with pytest.raises(UserError, match=r"line 2 of chat.jsonl holds no conversation"):
        documents_step(config, store).ensure()


def build(base: BaseModel, config: DatasetConfig, store: Store) -> tuple[str, Sequences]:
    documents = documents_step(config, store).ensure()
    artifact = sequences_step(config, documents, base, store).ensure()
    return artifact.id, load_sequences(artifact)


@pytest.mark.parametrize("sequences", ["prefix", "packed"])
def test_the_mask_of_the_sequences_is_that_of_their_conversations(
    chat_base: BaseModel, tmp_path: Path, store: Store, sequences: str
) -> None:
    config = chat_config(chat_file(tmp_path), sequences=sequences)
    _, built = build(chat_base, config, store)
    assert built.train_mask is not None
    assert built.val_mask is not None
    assert built.train_mask.shape == built.train.shape
    assert built.val_mask.shape == built.val.shape
    tokenizer = chat_base.tokenizer()
    for ids, mask in zip(built.train.tolist(), built.train_mask.tolist(), strict=True):
        answer = masked_text(tokenizer, ids, mask)
        assert answer
        assert "Why" not in answer
        assert "<|assistant|>" not in answer
        question = masked_text(tokenizer, ids, [not counts for counts in mask])
        assert "because" not in question


def test_the_loss_on_answers_only_enters_the_id_and_its_absence_has_no_mask(
    chat_base: BaseModel, tmp_path: Path, store: Store
) -> None:
    path = chat_file(tmp_path)
    answers_id, answers = build(chat_base, chat_config(path), store)
    all_id, whole = build(chat_base, chat_config(path, assistant_only_loss=False), store)
    assert answers_id != all_id
    assert whole.train_mask is None
    np.testing.assert_array_equal(whole.train, answers.train)


def test_chat_needs_a_template_and_the_loss_a_chat(
    base: BaseModel, tmp_path: Path, store: Store, compose: Compose
) -> None:
    with pytest.raises(UserError, match="no chat template"):
        build(base, chat_config(chat_file(tmp_path)), store)
    with pytest.raises(UserError, match="no conversations"):
        compose("preset=debug", "dataset.assistant_only_loss=false")
    with pytest.raises(UserError, match="no conversations"):
        compose("preset=debug", "dataset.chat=true")
    with pytest.raises(UserError, match="without questions"):
        compose("preset=debug", "evaluation.chat_max_new_tokens=9")
    with pytest.raises(UserError, match="no chat template"):
        check_chat(compose("preset=debug", "evaluation.chat=true").evaluation, base)


def test_with_questions_no_evaluation_dataset_is_called_chat(compose: Compose) -> None:
    datasets = ["+dataset@evaluation.datasets.chat=news_sample"]
    assert "chat" in compose("preset=debug", *datasets).evaluation.datasets
    for overrides in (datasets, ["dataset.name=chat"]):
        with pytest.raises(UserError, match="chat: is the name that the answers"):
            compose("preset=debug", "evaluation.chat=true", *overrides)


MASK = np.random.default_rng(2).random(DATA.train.shape) < 0.4
MASK[:, -1] = True


def test_a_masked_loss_and_its_gradient_are_those_of_ignored_labels(any_base: BaseModel) -> None:
    model = load(any_base).eval()
    ids, mask = torch.as_tensor(DATA.train).long(), torch.as_tensor(MASK)
    loss = NextTokenLoss(model)(ids, mask=MASK)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    labels = ids.masked_fill(~mask, -100)[:, 1:]
    logits = model(input_ids=ids).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_grads = torch.autograd.grad(expected, parameters, allow_unused=True)
    largest = max(grad.abs().max().item() for grad in expected_grads if grad is not None)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:  # rounding errors are of the size of the largest entries
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("micro_batch_size", [2, 7])
def test_a_train_step_averages_over_the_answers_of_the_whole_batch(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, micro_batch_size: int
) -> None:
    cfg.hardware.micro_batch_size = micro_batch_size
    state = build_train_state(cfg, base, DATA.train, cache_location(tmp_path / "w", base))
    ids, mask = torch.as_tensor(DATA.train).long(), torch.as_tensor(MASK)
    model = load(base).eval()
    labels = ids.masked_fill(~mask, -100)
    logits = model(input_ids=ids).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss = train_step(state, ids, np.arange(len(ids)), MASK)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)


def test_validation_is_over_the_answers(cfg: TrainingConfig, base: BaseModel) -> None:
    model = load(base).eval()
    mask = MASK[: len(DATA.val)]
    data = Sequences(DATA.train, DATA.val, MASK, mask)
    metrics = validate(model, data, cfg.trainer, cfg.hardware, no_op)
    ids = torch.as_tensor(DATA.val).long()
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    counted = torch.as_tensor(mask)[:, 1:]
    losses = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    entropies = -(log_p.exp() * log_p).sum(-1)
    assert metrics["val/loss"] == pytest.approx(losses[counted].mean().item(), rel=1e-5)
    assert metrics["val/entropy"] == pytest.approx(entropies[counted].mean().item(), rel=1e-4)


@pytest.mark.slow
def test_the_packaged_models_template_tells_its_answers(compose: Compose, store: Store) -> None:
    from hyperfitting.models.base import base_model

    base = base_model(compose().model, store)
    base.ensure()
    tokenizer = base.tokenizer()
    ids, mask = chat.encode(tokenizer, json.dumps(messages("Hi?", "Hello.", "Why?", "So.")))
    assert masked_text(tokenizer, ids, mask) == "Hello.<|im_end|>So.<|im_end|>"
    assert "<|im_start|>assistant" in tokenizer.decode(ids)
