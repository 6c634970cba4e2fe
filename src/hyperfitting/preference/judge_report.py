"""`judge.json`: how reliable the judges of a study are, as typed classes.

`judge_reliability` computes it. Everything but the usage is of the items that the judge answered in
both orders.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.preference.judge_answers import Usage
from hyperfitting.runtime.files import read_versioned, write_json
from hyperfitting.runtime.strict_model import StrictModel

JUDGE_VERSION = 2
JUDGE_FILE = "judge.json"


class Agreement(StrictModel):
    """Agreement of two judges, or of a judge with people, about the same items."""

    share: Estimate = Field(description="share of the items on which both say the same")
    alpha: Estimate | None = Field(
        description="Krippendorff's alpha, nominal, with ties as a category; null: undefined"
    )


class Preference(StrictModel):
    """A judge's preference between the texts of two systems."""

    first: str = Field(description="a system: `run/side`, or `reference`")
    second: str = Field(description="the other")
    win_rate: Estimate = Field(description="of the first; a tie is half a win")
    length_controlled: Estimate = Field(description="the same between texts of one length")
    length_effect: Estimate = Field(description="log-odds of a win for a much longer text")
    position_effect: Estimate = Field(description="log-odds of a win on the left minus the right")


class JudgeReport(StrictModel):
    """One judge."""

    reliable: bool = Field(description="whether its preferences may be reported")
    reasons: list[str] = Field(description="why not")
    usage: Usage | None = Field(description="what was asked; null: answers are not kept here")
    items: int = Field(description="normal items answered in both orders")
    flip_rate: Estimate | None = Field(
        description="share of the items on which the answer depends on the order"
    )
    reversal_rate: Estimate | None = Field(
        description="share on which it prefers one text in one order and the other in the other"
    )
    tie_rate: Estimate | None = Field(description="share of the items with a tie as verdict")
    left_rate: Estimate | None = Field(
        description="share of the left side among its preferences, mean over items; 0.5: no bias"
    )
    longer_rate: Estimate | None = Field(
        description="share of the longer text among its verdicts that prefer one"
    )
    checks_passed: Estimate | None = Field(
        description="share of attention checks and gold items with the right verdict"
    )
    compared_with: Literal["people", "scripts"] = Field(
        description="who `with_people` and `people` are: scripts, if no person has judged"
    )
    with_people: Agreement | None = Field(description="with the majority of people on each item")
    people: Estimate | None = Field(
        description="for comparison: Krippendorff's alpha of people among themselves"
    )
    with_judges: dict[str, Agreement] = Field(description="with the verdicts of other judges")
    preferences: list[Preference] = Field(
        description="by pair of systems; also of a judge that is not reliable, to see why"
    )


class JudgeFile(StrictModel):
    """The content of `judge.json`."""

    judge_version: int = Field(default=JUDGE_VERSION, description="version of this format")
    task: str = Field(description="hash of the task")
    judges: dict[str, JudgeReport] = Field(description="by name")


def read_judge_file(study: Path) -> JudgeFile | None:
    """Return what is known of a study's judges; None: no judge was asked.

    Raises:
        UserError: the file is damaged.
    """
    path = study / JUDGE_FILE
    if not path.is_file():
        return None
    hint = "hyperfit-preference judge writes it again"
    return read_versioned(
        path, JudgeFile, "judge_version", JUDGE_VERSION, field="judge", value=path, hint=hint
    )


def write_judge_file(study: Path, report: JudgeFile) -> None:
    """Write `judge.json` atomically."""
    write_json(study / JUDGE_FILE, report.model_dump(mode="json"))
