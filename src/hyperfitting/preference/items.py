"""A preference study before anybody is asked: its items, its question, who judges what.

The task file (`task.json`) fixes all of it, the exclusion rule and the sides included. An item
compares a ``first`` text with a ``second`` one; which of them is on the left is a hash of annotator
and item. What `Item.shown` leaves out is hidden from annotators.
"""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hyperfitting.errors import UserError
from hyperfitting.runtime.files import read_versioned, write_json
from hyperfitting.runtime.strict_model import StrictModel

TASK_VERSION = 1
FOLDER = "preference"
"""Folder of a study, in the folder of its sweep or record."""
TASK_FILE, JUDGMENTS_FILE, ANALYSIS_FILE = "task.json", "judgments.jsonl", "preference.json"

Kind = Literal["normal", "attention_check", "gold", "repeat"]
Source = Literal["tuned", "base", "reference", "scrambled"]
"""A side of a record, or a reference whose words were shuffled."""
Place = Literal["first", "second"]
"""One of an item's two texts."""
Shown = Literal["left", "right", "equal", "both_bad"]
"""A choice as the annotator sees it."""
Choice = Literal["first", "second", "equal", "both_bad"]
"""A choice with the sides resolved."""
Aspect = Literal["fluency", "coherence", "repetition"]
Form = Literal["p1", "fine"]
CHOICES: dict[Form, tuple[Shown, ...]] = {
    "p1": ("left", "equal", "right"),
    "fine": ("left", "right", "equal", "both_bad"),
}
"""The choices of each form of the question, in the order in which they are shown."""
LABELS: dict[Form, dict[Shown, str]] = {
    "p1": {"left": "I prefer A", "equal": "Equally good", "right": "I prefer B"},
    "fine": {
        "left": "A is better",
        "right": "B is better",
        "equal": "Equally good",
        "both_bad": "Both are bad",
    },
}
"""The words of each choice; A is the text on the left, B the one on the right."""
ASPECT_CHOICES: tuple[Shown, ...] = ("left", "equal", "right")
ASPECT_LABELS: dict[Shown, str] = {"left": "A", "equal": "Equal", "right": "B"}
ASPECT_QUESTIONS: dict[Aspect, str] = {
    "fluency": "Which is better written, sentence by sentence?",
    "coherence": "Which makes more sense as a whole, and fits the beginning better?",
    "repetition": "Which repeats itself less?",
}


class Question(StrictModel):
    """What is asked about every item."""

    form: Form = Field(description="its choices: `p1` has three, `fine` also 'both bad'")
    wording: str = Field(description="the question")
    guidelines: str = Field(description="what annotators read before they begin")
    aspects: tuple[Aspect, ...] = Field(default=(), description="asked in addition, optional")

    @property
    def choices(self) -> dict[Shown, str]:
        """The choices with their words, in the order in which they are shown."""
        return {choice: LABELS[self.form][choice] for choice in CHOICES[self.form]}


class Origin(StrictModel):
    """Where a text comes from; hidden from annotators."""

    run: str = Field(description="the run whose record holds the text")
    side: Source = Field(description="who wrote it; `scrambled`: the reference, words shuffled")
    sample: int = Field(ge=0, description="index of the sample in the record")


class Text(StrictModel):
    """One of the two texts of an item."""

    text: str = Field(description="as it is shown")
    origin: Origin = Field(description="where it comes from; hidden")


class Item(StrictModel):
    """Two texts to compare. Its id is a hash of everything else in it."""

    id: str = Field(default="", description="hash of the content; filled in if empty")
    kind: Kind = Field(default="normal", description="hidden")
    dataset: str = Field(description="evaluation dataset; hidden")
    length: int = Field(description="new tokens of the continuations before they were cut; hidden")
    context: str = Field(description="what both texts continue")
    first: Text
    second: Text
    expected: Choice | None = Field(
        default=None, description="the right answer of a check or gold item; hidden"
    )
    repeats: str | None = Field(default=None, description="id of the item that it repeats; hidden")

    @model_validator(mode="after")
    def _check(self) -> "Item":
        content_id = content_hash(self.model_dump(mode="json", exclude={"id"}))
        if not self.id:
            object.__setattr__(self, "id", content_id)
        if self.id != content_id:
            raise ValueError(f"item {self.id} is not what it was when it got its id")
        if (self.expected is not None) != (self.kind in ("attention_check", "gold")):
            raise ValueError(f"item {self.id}: checks and gold items alone have a right answer")
        if (self.repeats is not None) != (self.kind == "repeat"):
            raise ValueError(f"item {self.id}: repeats alone repeat an item")
        return self

    @property
    def key(self) -> tuple[str, str]:
        """What no annotator sees twice, but in a repeat: dataset and context."""
        return self.dataset, self.context

    def text(self, place: Place) -> str:
        """Return one of its texts."""
        return (self.first if place == "first" else self.second).text

    def shown(self, left: Place) -> dict[str, str]:
        """Return all that an annotator may see: context, and the texts by side."""
        return {"context": self.context, "left": self.text(left), "right": self.text(other(left))}


class Annotator(StrictModel):
    """Somebody who judges, and the items for them in order."""

    kind: Literal["person", "script"] = Field(description="scripts are for trying a study out")
    items: tuple[str, ...] = Field(description="ids, in the order in which they are shown")


ANNOTATOR_NAME = re.compile(r"[\w.@+-]{1,64}")
AnnotatorName = Annotated[str, Field(pattern=rf"^{ANNOTATOR_NAME.pattern}$")]
"""Letters, digits and `_.@+-`: an e-mail address is one."""


class ExclusionRule(StrictModel):
    """Which annotators the sensitivity analysis leaves out; fixed before anybody is asked."""

    max_failed_checks: float = Field(
        default=0.25, ge=0, le=1, description="share of failed checks and gold items above which"
    )
    min_median_seconds: float = Field(
        default=3.0, ge=0, description="median seconds per item below which"
    )
    max_side_share: float = Field(
        default=0.85,
        ge=0.5,
        le=1,
        description="share of one side among the preferences (ties apart) above which, if 20 or "
        "more were given",
    )


class Task(StrictModel):
    """A study: everything that is fixed before anybody is asked."""

    task_version: int = Field(default=TASK_VERSION, description="version of this format")
    sweep: str = Field(description="name of the sweep, or of the record's folder")
    question: Question
    seed: int = Field(description="of the sampling, the order and the sides")
    votes: int = Field(ge=1, description="annotators for each item")
    exclusion: ExclusionRule = Field(default=ExclusionRule())
    max_flip_rate: float = Field(
        default=0.3, ge=0, le=1, description="a judge that flips more often is not reliable"
    )
    texts: dict[str, str] = Field(
        description="hash of a side's texts in the record, by `run/side`: tables refuse a record "
        "whose texts have changed since"
    )
    annotators: dict[AnnotatorName, Annotator] = Field(description="by name")
    items: tuple[Item, ...]
    hash: str = Field(default="", description="hash of everything else")

    @model_validator(mode="after")
    def _check(self) -> "Task":
        if len(self._by_id) != len(self.items):
            raise ValueError("items: one occurs twice")
        for name, annotator in self.annotators.items():
            unknown = [item for item in annotator.items if item not in self._by_id]
            if unknown or len(set(annotator.items)) < len(annotator.items):
                raise ValueError(f"annotators.{name}: an item is unknown or occurs twice")
        if self.hash and self.hash != self.content_hash:
            raise ValueError("it was changed after it was made: its hash is another")
        return self

    @cached_property
    def content_hash(self) -> str:
        """Hash of everything but the field `hash`; judgments carry it."""
        return content_hash(self.model_dump(mode="json", exclude={"hash"}))

    @cached_property
    def _by_id(self) -> dict[str, Item]:
        return {item.id: item for item in self.items}

    def item(self, item_id: str) -> Item | None:
        """Return the item with an id, if there is one."""
        return self._by_id.get(item_id)

    def items_of(self, annotator: str) -> list[Item]:
        """Return an annotator's items, in the order in which they are shown."""
        return [self._by_id[item_id] for item_id in self.annotators[annotator].items]

    def left(self, annotator: str, item: Item) -> Place:
        """Return which text is on the left: a hash of annotator and item.

        A repeat has the sides of the item that it repeats swapped.
        """
        digest = content_hash([self.seed, annotator, item.repeats or item.id])
        is_first = int(digest, 16) % 2 == 0
        return "first" if is_first != (item.repeats is not None) else "second"


def other(place: Place) -> Place:
    """Return the other of the two texts."""
    return "second" if place == "first" else "first"


def resolve(shown: Shown, left: Place) -> Choice:
    """Return which text was chosen, given which one was on the left."""
    if shown == "left":
        return left
    return other(left) if shown == "right" else shown


def content_hash(value: Any) -> str:
    """Return 16 hex digits of the SHA-256 of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_task(folder: Path, task: Task) -> None:
    """Write a study's `task.json` atomically.

    Raises:
        UserError: the folder has one already; judgments of it would be of no use.
    """
    path = folder / TASK_FILE
    if path.exists():
        raise UserError("has a task already", field="task", value=path, hint="another --out folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, task.model_dump(mode="json") | {"hash": task.content_hash})


def read_task(folder: Path) -> Task:
    """Return the study in a folder.

    Raises:
        UserError: there is none, it is damaged or was changed after it was made.
    """
    return read_versioned(
        folder / TASK_FILE,
        Task,
        "task_version",
        TASK_VERSION,
        field="task",
        value=folder / TASK_FILE,
        hint="hyperfit-preference make",
    )
