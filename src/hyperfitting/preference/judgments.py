"""What annotators and judges chose: one JSON object a line in `judgments.jsonl`.

The page, Label Studio, Potato, CSV files and judges make judgments with `make_judgment`, check them
with `validate` and add them with `append`; nothing is ever overwritten.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hyperfitting.preference.items import (
    Aspect,
    Choice,
    Item,
    Place,
    Shown,
    Task,
    resolve,
)
from hyperfitting.preference.json_lines import parse_lines
from hyperfitting.runtime.files import fsync_path

JUDGMENT_VERSION = 1
JUDGE = "judge:"
"""Prefix of the source and of the annotator's name of a model that judges."""


class Judgment(BaseModel):
    """One answer about one item."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    judgment_version: int = Field(
        default=JUDGMENT_VERSION, ge=JUDGMENT_VERSION, le=JUDGMENT_VERSION
    )
    task: str = Field(description="hash of the task")
    item: str = Field(description="id of the item: a hash of its content")
    annotator: str = Field(description="name; `judge:MODEL` if a model judged")
    left: Place = Field(description="which text was on the left")
    shown: Shown = Field(description="the choice as it was shown")
    choice: Choice = Field(description="the choice with its side resolved")
    aspects: dict[Aspect, Choice] = Field(default={}, description="answers by aspect, resolved")
    seconds: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="time that the item was visible"
    )
    created: AwareDatetime = Field(description="when it was given")
    source: str = Field(pattern=r"^(page|label_studio|potato|csv|judge:.+)$")

    @model_validator(mode="after")
    def _check(self) -> "Judgment":
        if self.choice != resolve(self.shown, self.left):
            raise ValueError(f"choice {self.choice} is not what {self.shown} means here")
        if self.is_model != self.annotator.startswith(JUDGE):
            raise ValueError(f"annotator {self.annotator} does not fit source {self.source}")
        return self

    @property
    def is_model(self) -> bool:
        """Whether a model judged."""
        return self.source.startswith(JUDGE)

    @property
    def key(self) -> tuple[str, ...]:
        """What there is one judgment of: annotator and item, and for a model the order."""
        return (self.annotator, self.item, *([self.left] if self.is_model else []))


@dataclass(frozen=True)
class Rejected:
    """A judgment that does not belong to a task, and why."""

    index: int
    """Its position among those given."""
    judgment: Judgment
    reason: str


@dataclass(frozen=True)
class Answer:
    """What an annotator chose, as it was shown."""

    shown: Shown
    aspects: Mapping[Aspect, Shown] = field(default_factory=dict)
    seconds: float | None = None
    """That the item was visible."""
    created: datetime | None = None
    """None: now."""


def make_judgment(
    task: Task, item: Item, annotator: str, answer: Answer, source: str, left: Place | None = None
) -> Judgment:
    """Return the judgment that an answer is, its sides resolved.

    Args:
        task: the study.
        item: that was judged.
        annotator: name; `judge:MODEL` for a model.
        answer: what was chosen.
        source: such as `page`; for a model the same as the annotator.
        left: which text was on the left; none: where the task puts it for this annotator.

    Raises:
        pydantic.ValidationError: a field is invalid.
    """
    left = left or task.left(annotator, item)
    return Judgment(
        task=task.content_hash,
        item=item.id,
        annotator=annotator,
        left=left,
        shown=answer.shown,
        choice=resolve(answer.shown, left),
        aspects={aspect: resolve(shown, left) for aspect, shown in answer.aspects.items()},
        seconds=answer.seconds,
        created=answer.created or datetime.now(UTC),
        source=source,
    )


def validate(
    task: Task, judgments: Sequence[Judgment], existing: Iterable[Judgment] = ()
) -> tuple[list[Judgment], list[Rejected]]:
    """Return the judgments that belong to a task, and those that do not with the reason.

    Args:
        task: the study.
        judgments: to check, in order: of two by one annotator about one item the first is accepted.
        existing: that were accepted before.
    """
    seen = {judgment.key for judgment in existing}
    accepted, rejected = [], []
    for index, judgment in enumerate(judgments):
        reason = next(_problems(task, judgment), "")
        if not reason and judgment.key in seen:
            reason = f"{judgment.annotator} has judged item {judgment.item} before"
        if reason:
            rejected.append(Rejected(index, judgment, reason))
        else:
            seen.add(judgment.key)
            accepted.append(judgment)
    return accepted, rejected


def _problems(task: Task, judgment: Judgment) -> Iterator[str]:
    """Yield why a judgment does not belong to a task."""
    item = task.item(judgment.item)
    if judgment.task != task.content_hash:
        yield f"of another task ({judgment.task})"
    if item is None:
        yield f"the task has no item {judgment.item}"
        return
    if judgment.shown not in task.question.choices:
        yield f"the question has no choice {judgment.shown}"
    if unasked := sorted(set(judgment.aspects).difference(task.question.aspects)):
        yield f"the question has no aspect {', '.join(unasked)}"
    if "both_bad" in judgment.aspects.values():
        yield "aspects have no choice both_bad"
    if judgment.is_model:
        return
    annotator = task.annotators.get(judgment.annotator)
    if annotator is None:
        yield f"the task has no annotator {judgment.annotator}"
    elif judgment.item not in annotator.items:
        yield f"item {judgment.item} is not for {judgment.annotator}"
    elif judgment.left != task.left(judgment.annotator, item):
        yield f"item {judgment.item} has its sides swapped for {judgment.annotator}"


def read_judgments(path: Path) -> list[Judgment]:
    """Return the judgments in a file; [] if it does not exist.

    A last line that a crash cut short was never confirmed and is left out.

    Raises:
        UserError: a line is invalid; the message gives its number and the field.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    return parse_lines(content[: _complete_size(content)], Judgment, "judgment", path)


def append(path: Path, judgments: Sequence[Judgment]) -> None:
    """Add judgments to a file and flush them to disk; several processes may do so at once."""
    lines = "".join(judgment.model_dump_json() + "\n" for judgment in judgments).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        size = _complete_size(content)
        file.truncate(size)
        if size and not content[:size].endswith(b"\n"):
            lines = b"\n" + lines
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    fsync_path(path.parent)


def _complete_size(content: bytes) -> int:
    """Return the bytes of a file without a last line that was cut short."""
    end = content.rfind(b"\n") + 1
    try:
        Judgment.model_validate_json(content[end:])
    except ValidationError:
        return end
    return len(content)
