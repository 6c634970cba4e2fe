"""The part of results.json about answers to open questions."""

from pydantic import Field

from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.record.texts import Continuation
from hyperfitting.runtime.strict_model import StrictModel

CHAT = "chat"
"""The dataset that the answers are of in tables, on the page and on W&B; no other has that name."""


class ChatAnswer(StrictModel):
    """A question with both models' answers."""

    question: str = Field(description="what the user asks")
    tuned: Continuation = Field(description="the tuned model's answer")
    base: Continuation = Field(description="the base model's answer")


class Chat(StrictModel):
    """Answers to open questions in the chat template (`evaluation.chat`)."""

    max_new_tokens: int = Field(description="longest answer, in tokens")
    tuned: dict[str, Estimate] = Field(description="`gen/` metrics of the tuned model's answers")
    base: dict[str, Estimate] = Field(description="`gen/` metrics of the base model's answers")
    difference: dict[str, Difference] = Field(
        description="tuned minus base, paired by question: `gen/` metrics"
    )
    answers: list[ChatAnswer] = Field(description="one per question")
    per_text: dict[str, dict[str, list[float | None]]] = Field(
        description="of `tuned` and of `base`, by metric one value per question (null: it has none)"
    )
