"""Answers to open questions in a model's chat template: artifacts, and their scores.

An answer ends where the model ends it, so answers differ in length, and a type-token ratio falls
with length: `n_tokens` is reported alongside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.chat import check_template, prompt_tokens, question
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.evaluation.arrays import load_arrays, load_continuations, save_continuations
from hyperfitting.evaluation.artifacts import citation_blocker
from hyperfitting.evaluation.chat_questions import QUESTIONS
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.record_builder import recorded_continuation
from hyperfitting.evaluation.scoring import (
    ModelOutput,
    NgramCorpus,
    TokenizedText,
    scoring_inputs,
)
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.evaluation.slices import differences, estimates, jsonable
from hyperfitting.metrics.distribution import STEP_STATS
from hyperfitting.metrics.inputs import Floats, ScoringInputs
from hyperfitting.metrics.registry import METRICS
from hyperfitting.models.base import BaseModel
from hyperfitting.models.size import forward_flops, model_size
from hyperfitting.record.chat import CHAT, Chat, ChatAnswer
from hyperfitting.store.artifact import Step

VERSION = 1
_PROMPT_TOKENS = 48
"""Of a question in a template, on average; for the plan."""


@dataclass(frozen=True)
class ChatArtifacts:
    """Both models' answers."""

    tuned: Step
    """The base model's if nothing is trained."""
    base: Step

    def named(self) -> Iterator[tuple[str, Step]]:
        """Yield the steps with their names."""
        if self.tuned is not self.base:
            yield "chat/tuned", self.tuned
        yield "chat/base", self.base


def chat_artifacts(
    setting: Setting, base: LazyModel, tuned: LazyModel | None
) -> ChatArtifacts | None:
    """Return the steps of both models' answers; none: they are not asked for."""
    if not setting.evaluation.chat:
        return None
    of_base = answers_step(setting, base)
    return ChatArtifacts(of_base if tuned is None else answers_step(setting, tuned), of_base)


def check_chat(evaluation: EvaluationConfig, base: BaseModel) -> None:
    """Refuse to ask a model that has no chat template, or no room for the answers.

    Raises:
        UserError: it is such a model.
    """
    if evaluation.chat:
        tokenizer = base.tokenizer()
        check_template(tokenizer, base.name, "evaluation.chat")
        longest = max(len(prompt_tokens(tokenizer, question(text))) for text in QUESTIONS)
        length = longest + evaluation.chat_max_new_tokens
        base.check_length("evaluation.chat_max_new_tokens + question", length)


def answers_step(setting: Setting, model: LazyModel) -> Step:
    """Return the step of a model's answers.

    Files: `continuations.json`, an object per question with the answer's `tokens` (ids) and
    `token_texts`; for each of `STEP_STATS` ``NAME.npy`` (N, max_new_tokens), NaN past the end.
    """
    blocked = setting.decode.citation_blocker.enabled and not model.state.is_base
    decode = replace(setting.decode, stop_at_eos=True)
    n_new = setting.evaluation.chat_max_new_tokens

    def build(work: Path) -> None:
        tokenizer = model.state.base.tokenizer()
        prompts = [prompt_tokens(tokenizer, question(text)) for text in QUESTIONS]
        blocker = citation_blocker(setting.sequences, decode, tokenizer) if blocked else None
        title = f"answering questions with {model.label}"
        with setting.progress(title, len(prompts) * n_new, "tokens") as advance:
            tokens: list[list[int]] = [[] for _ in prompts]
            stats = {name: np.empty((len(prompts), n_new), np.float32) for name in STEP_STATS}
            for rows in _equally_long(prompts):
                contexts = np.array([prompts[row] for row in rows], np.int32)  # (B, T)
                batch_size = setting.hardware.generation_batch_size
                answers = continue_texts(
                    model(), contexts, n_new, decode, batch_size, advance, blocker
                )
                for name in STEP_STATS:
                    stats[name][rows] = answers.stats[name]
                for row, answer in zip(rows.tolist(), answers.tokens, strict=True):
                    tokens[row] = answer
        save_continuations(work, prompts, tokens, stats, tokenizer)

    def flops() -> float:
        size = model_size(model.state.base, setting.store)
        n_passes = len(QUESTIONS) * decode.num_candidates
        return forward_flops(size, n_passes, _PROMPT_TOKENS + n_new)

    artifact = setting.store.artifact(
        "chat_answers",
        version=VERSION,
        config={
            "questions": list(QUESTIONS),
            "decode": decode.id_config(blocked),
            "max_new_tokens": n_new,
        },
        inputs={"model": model.state.id} | ({"blocked": setting.sequences.id} if blocked else {}),
    )
    return Step(artifact, build, flops)


def _equally_long(prompts: Sequence[Sequence[int]]) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of prompts of one length after another, since a batch has no padding."""
    lengths = np.array([len(prompt) for prompt in prompts])
    for length in np.unique(lengths):
        yield np.flatnonzero(lengths == length)


def build_chat(artifacts: ChatArtifacts, corpus: NgramCorpus, evaluation: EvaluationConfig) -> Chat:
    """Return what the record holds of the answers.

    Args:
        artifacts: both models' answers; built.
        corpus: the sequences that the tuned model was trained on.
        evaluation: lengths, n-grams and resamples.
    """
    length, resamples = evaluation.chat_max_new_tokens, evaluation.bootstrap
    outputs = {"tuned": _output(artifacts.tuned), "base": _output(artifacts.base)}
    inputs = {
        side: scoring_inputs(output, outputs["base"], corpus, evaluation, length)
        for side, output in outputs.items()
    }
    values = {side: _values(of_side) for side, of_side in inputs.items()}
    return Chat(
        max_new_tokens=length,
        tuned=estimates(values["tuned"], inputs["tuned"], resamples),
        base=estimates(values["base"], inputs["base"], resamples),
        difference=differences(values["tuned"], values["base"], resamples),
        answers=[
            ChatAnswer(
                question=question,
                **{
                    side: recorded_continuation(output, inputs[side].overlap, row)
                    for side, output in outputs.items()
                },
            )
            for row, question in enumerate(QUESTIONS)
        ],
        per_text={
            side: {key: jsonable(of_texts) for key, of_texts in by_key.items()}
            for side, by_key in values.items()
        },
    )


def _output(answers: Step) -> ModelOutput:
    """Return a model's answers as its continuations, without anything on reference texts."""
    texts = load_continuations(answers.artifact)
    return ModelOutput(
        datasets=[CHAT] * len(texts),
        token_stats={},
        step_stats=load_arrays({CHAT: answers}, STEP_STATS),
        base_loglikelihoods={},
        continuations=[TokenizedText(**text) for text in texts],
    )


def _values(inputs: ScoringInputs) -> dict[str, Floats]:
    """Return every metric of the answers alone, by question."""
    values = {
        key: metric.per_text(inputs)
        for key, metric in METRICS.items()
        if metric.per_text is not None and metric.of_continuations and metric.is_measured(inputs)
    }
    n_tokens = np.array([len(tokens) for tokens in inputs.continuations], np.float64)
    return values | {"gen/n_tokens": n_tokens}
