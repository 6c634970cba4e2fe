"""The part of results.json about downstream tasks."""

from typing import Literal

from pydantic import Field

from hyperfitting.metrics.accuracy import McNemar
from hyperfitting.metrics.calibration import Calibration
from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.runtime.strict_model import StrictModel

Form = Literal["likelihood", "generation"]


class TaskScore(StrictModel):
    """One model's answers to a task."""

    accuracy: Estimate = Field(description="share of right answers; exact binomial interval")
    metric: str = Field(description="the harness's metric, with its filter: `acc,none`")
    value: float | None = Field(description="its value as the harness reports it")
    stderr: float | None = Field(description="its standard error as the harness reports it")
    at_chance: bool | None = Field(
        description="whether the interval of the accuracy contains the chance level; null: there "
        "is no chance level"
    )
    calibration: Calibration | None = Field(
        description="of multiple-choice answers by likelihood; null: of other tasks"
    )


class DownstreamTask(StrictModel):
    """Base and tuned model on the same questions."""

    form: Form = Field(description="`likelihood`: choices are scored; `generation`: it writes")
    version: str | None = Field(description="version of the task")
    hash: str | None = Field(description="the harness's hash of the task's samples")
    num_fewshot: int = Field(description="solved examples in the prompt")
    chance: float | None = Field(description="accuracy of guessing; null: of free answers")
    tuned: TaskScore = Field(description="the tuned model")
    base: TaskScore = Field(description="the base model")
    difference: Difference = Field(
        description="accuracy of the tuned minus the base model's, paired by question"
    )
    mcnemar: McNemar = Field(description="test of the difference")


class Downstream(StrictModel):
    """Downstream tasks (`evaluation.downstream`)."""

    harness: str = Field(description="version of lm_eval, EleutherAI's lm-evaluation-harness")
    tasks: dict[str, DownstreamTask] = Field(description="by task; of groups, their parts")
    estimates: dict[str, dict[str, Estimate]] = Field(
        description="by `tuned` and `base`, metrics `down/…` over the questions of all tasks"
    )
    by_name: dict[str, dict[str, dict[str, Estimate]]] = Field(
        default_factory=dict,
        description="the same over the questions of each task or group that "
        "`evaluation.downstream` names",
    )

    def is_at_chance(self, task: str, side: str) -> bool:
        """Return whether a model does not answer a task better than by guessing; False: a group."""
        scored = self.tasks.get(task)
        score = {"tuned": scored.tuned, "base": scored.base}.get(side) if scored else None
        return bool(score and score.at_chance)
