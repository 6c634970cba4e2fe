"""A judge behind a server that speaks the OpenAI protocol: a commercial one, vLLM, llama.cpp, …

The `openai` client retries what may pass (429, 5xx, a dropped connection) with backoff, and waits
as long as the server's `Retry-After` says. The key comes from the environment alone; it is sent to
the server and stands in no file, message or log.
"""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hyperfitting.errors import UserError
from hyperfitting.formatting import first_line
from hyperfitting.preference.items import Question
from hyperfitting.preference.judge_answers import AnswerFile, JudgeQuestion, KeptAnswer
from hyperfitting.preference.judge_prompt import parse
from hyperfitting.progress import Advance

if TYPE_CHECKING:
    from openai import AsyncOpenAI

OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
_MAX_RETRIES = 8
_MAX_MALFORMED = 3
_MAX_SAID = 300
"""Characters of a server's error that a message quotes."""
_TEMPLATE_TOKENS = 256
"""More than a chat template adds to a prompt."""


@dataclass
class Budget:
    """Money for a judge, in the currency of the prices; nothing is asked that might exceed it."""

    price_in: float = 0.0
    """Per million tokens of prompts."""
    price_out: float = 0.0
    """Per million tokens of answers."""
    max_cost: float = math.inf
    """For all answers of this judge in this study."""
    spent: float = 0.0
    reserved: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return what a request costs."""
        return (self.price_in * prompt_tokens + self.price_out * completion_tokens) / 1e6

    def reserve(self, cost: float) -> bool:
        """Set an amount aside, if it is there."""
        if self.spent + self.reserved + cost > self.max_cost:
            return False
        self.reserved += cost
        return True

    def settle(self, reserved: float, cost: float) -> None:
        """Replace an amount set aside by what was spent."""
        self.reserved -= reserved
        self.spent += cost


@dataclass(frozen=True)
class ServerJudge:
    """A model behind a server."""

    model: str
    base_url: str
    question: Question
    budget: Budget
    key: str = field(default="", repr=False)
    max_tokens: int = 256
    """Of an answer."""
    temperature: float = 0.0
    timeout: float = 600.0
    """Of a request, in seconds."""
    concurrency: int = 4
    """Requests at a time."""

    @property
    def settings(self) -> dict[str, Any]:
        """What determines an answer, beside the prompt."""
        return {
            "model": self.model, "max_tokens": self.max_tokens, "temperature": self.temperature
        }  # fmt: skip

    def ask(
        self, questions: Sequence[JudgeQuestion], answers: AnswerFile, advance: Advance
    ) -> bool:
        """Ask questions while the budget allows; return whether all were asked.

        Raises:
            UserError: the server refuses, or does not answer; the answers so far are kept.
        """
        usage = answers.usage
        self.budget.spent = self.budget.cost(usage.prompt_tokens, usage.completion_tokens)
        return asyncio.run(self._ask(deque(questions), answers, advance))

    async def _ask(
        self, remaining: deque[JudgeQuestion], answers: AnswerFile, advance: Advance
    ) -> bool:
        from openai import AsyncOpenAI, OpenAIError

        failures: list[UserError] = []

        async def work() -> None:
            while remaining and not failures:
                reserved = self.budget.cost(_max_prompt_tokens(remaining[0]), self.max_tokens)
                if not self.budget.reserve(reserved):
                    return
                cost = 0.0
                try:
                    answer = await self._answer(client, remaining.popleft())
                    cost = self.budget.cost(answer.prompt_tokens, answer.completion_tokens)
                    answers.keep(answer)
                    advance(1)
                except OpenAIError as error:
                    failures.append(self._explain(error))
                finally:
                    self.budget.settle(reserved, cost)

        async with AsyncOpenAI(
            api_key=self.key or "none",
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=_MAX_RETRIES,
        ) as client:
            await asyncio.gather(*(work() for _ in range(self.concurrency)))
        if failures:
            raise failures[0]
        return not remaining

    async def _answer(self, client: "AsyncOpenAI", question: JudgeQuestion) -> KeptAnswer:
        from openai import OpenAIError

        start = time.monotonic()
        messages: Any = question.messages
        for _ in range(_MAX_MALFORMED):
            try:
                completion = await client.chat.completions.create(
                    model=self.model,
                    messages=messages,
                    max_completion_tokens=self.max_tokens,
                    temperature=self.temperature,
                )
                choice, usage = completion.choices[0], completion.usage
                text = self._redacted(choice.message.content or "")
            except (ValueError, AttributeError, TypeError, IndexError):
                continue  # a status of 200, but no chat completion
            problem = parse(self.question, text)
            problem = problem if isinstance(problem, str) else ""
            if problem and choice.finish_reason == "length":
                problem += f" (it was cut at {self.max_tokens} tokens)"
            return KeptAnswer(
                key=question.key,
                text=text,
                problem=problem,
                prompt_tokens=usage.prompt_tokens if usage else _max_prompt_tokens(question),
                completion_tokens=usage.completion_tokens if usage else len(text.encode()),
                seconds=time.monotonic() - start,
                created=datetime.now(UTC),
            )
        raise OpenAIError(f"{_MAX_MALFORMED} of its answers were no chat completions")

    def _explain(self, error: Exception) -> UserError:
        from openai import APIConnectionError, APIStatusError

        status, said = None, first_line(error)
        if isinstance(error, APIStatusError):
            status, said = error.status_code, error.response.text[:_MAX_SAID]
        problem = f"the server failed{f' ({status})' if status else ''}: {self._redacted(said)}"
        hint = "the same command resumes where it stopped"
        if isinstance(error, APIConnectionError):
            problem = f"the server does not answer, asked {_MAX_RETRIES + 1} times"
        if status in (401, 403):
            hint = "the name of the environment variable that holds the server's key: --key-env"
        if status == 404:
            hint = "--model as the server names it, and --base-url up to /v1"
        return UserError(problem, field="--base-url", value=self.base_url, hint=hint)

    def _redacted(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def _max_prompt_tokens(question: JudgeQuestion) -> int:
    """Return an upper bound: a token is a byte or more."""
    n_bytes = sum(len(message["content"].encode()) for message in question.messages)
    return n_bytes + _TEMPLATE_TOKENS


def check_base_url(url: str) -> str:
    """Return the address of a server.

    Raises:
        UserError: it is none, or holds a password.
    """
    try:
        parts = urlsplit(url)
        host, has_password = parts.hostname, "@" in parts.netloc
    except ValueError:
        host, has_password, parts = None, False, urlsplit("")
    if has_password:
        raise UserError(
            "holds a name or password, which would stand in files",
            field="--base-url",
            hint="--key-env with the name of an environment variable that holds it",
        )
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(
            "is no address of a server",
            field="--base-url",
            value=url,
            valid="such as http://127.0.0.1:8000/v1",
        )
    return url


def read_key(base_url: str, variable: str | None) -> str:
    """Return the key for a server from the environment; "" if it needs none.

    OpenAI's own variable is read for OpenAI's own server alone, so that no other one is sent that
    key.

    Raises:
        UserError: the variable is not set.
    """
    if variable is None and urlsplit(base_url).hostname != OPENAI_HOST:
        return ""
    name = variable or OPENAI_KEY
    key = os.environ.get(name, "")
    if not key:
        raise UserError("this environment variable is not set", field="--key-env", value=name)
    return key
