"""A judge in this process: the choices of a local or Hub model, by their log-likelihood.

Nothing is generated. Each choice is scored as the whole answer `{"choice": "A"` and the most likely
one is taken, so every answer is valid. The closing quote is scored with it: these are probabilities
of texts of which none begins another, and need no normalization by length.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperfitting.preference.items import Question
from hyperfitting.preference.judge_answers import AnswerFile, JudgeQuestion, KeptAnswer
from hyperfitting.preference.judge_prompt import Message, keys
from hyperfitting.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hyperfitting.models.base import BaseModel


@dataclass(frozen=True)
class LocalJudge:
    """A causal language model in this process."""

    base: "BaseModel"
    model: "PreTrainedModel"
    tokenizer: Any
    question: Question

    @property
    def settings(self) -> dict[str, Any]:
        """What determines an answer, beside the prompt."""
        return {"weights": self.base.id, "method": "log-likelihood"}

    def ask(
        self, questions: Sequence[JudgeQuestion], answers: AnswerFile, advance: Advance
    ) -> bool:
        """Ask all questions.

        Raises:
            UserError: a prompt is longer than the model's context.
        """
        for question in questions:
            answers.keep(self._answer(question))
            advance(1)
        return True

    def _answer(self, question: JudgeQuestion) -> KeptAnswer:
        start = time.monotonic()
        prompt, n_tokens = self._render(question.messages), 0
        answer: dict[str, str] = {}
        for key, words in keys(self.question).items():
            candidates = [{**answer, key: word} for word in words]
            texts = [prompt + json.dumps(each).removesuffix("}") for each in candidates]
            scores, n = self._score(texts)
            answer = candidates[scores.index(max(scores))]
            n_tokens += n
        return KeptAnswer(
            key=question.key,
            text=json.dumps(answer),
            prompt_tokens=n_tokens,
            completion_tokens=0,
            seconds=time.monotonic() - start,
            created=datetime.now(UTC),
        )

    def _render(self, messages: list[Message]) -> str:
        """Return a prompt as the model reads it; without a chat template, as plain text."""
        if self.tokenizer.chat_template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    def _score(self, texts: list[str]) -> tuple[list[float], int]:
        """Return log-likelihoods, in nats, of what comes after the tokens that all texts share.

        Args:
            texts: C prompts with one candidate each.

        Returns:
            The C scores, and how many tokens were read.
        """
        import numpy as np

        from hyperfitting.evaluation.forward import compute_token_stats

        has_template = self.tokenizer.chat_template is not None  # which writes special tokens
        tokens = [self.tokenizer.encode(t, add_special_tokens=not has_template) for t in texts]
        longest = max(map(len, tokens))
        self.base.check_length("the longest prompt", longest)
        # a causal model: padding on the right changes no earlier prediction
        padded = np.array([ids + [0] * (longest - len(ids)) for ids in tokens], dtype=np.int32)
        losses = compute_token_stats(self.model, padded, batch_size=1)["loss"]  # (C, T - 1)
        shared = next(
            (i for i, column in enumerate(zip(*tokens, strict=False)) if len(set(column)) > 1),
            min(map(len, tokens)),
        )
        scores = [
            -float(loss[shared - 1 : len(ids) - 1].sum())
            for loss, ids in zip(losses, tokens, strict=True)
        ]
        return scores, sum(map(len, tokens))


def load_local_judge(model: str, dtype: str, question: Question) -> LocalJudge:
    """Return a judge of the model in a folder, or on the Hub.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    from hyperfitting.models.base import base_model
    from hyperfitting.models.config import ModelConfig
    from hyperfitting.models.loading import ModelState
    from hyperfitting.runtime.config import HardwareConfig
    from hyperfitting.runtime.device import setup_torch
    from hyperfitting.store.artifact import Store

    source = "local" if Path(model).expanduser().is_dir() else "hub"
    config = ModelConfig(name=model, source=source, path=model, dtype=dtype)
    device = setup_torch(HardwareConfig())
    base = base_model(config, Store("."))  # these two sources store nothing
    base.ensure()
    return LocalJudge(base, ModelState(base).load(device), base.tokenizer(), question)
