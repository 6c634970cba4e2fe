"""What all annotation platforms are given for an item, and what an import accepts of their answers.

A platform gets one file for each annotator, one row for each of the annotator's items, sides as
this annotator sees them. A row names the item by its hash and holds nothing else that is hidden:
not which text is whose. An answer comes back with its row, so a text that was changed on the way is
found.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from hyperfitting.preference.items import (
    ASPECT_CHOICES,
    ASPECT_LABELS,
    ASPECT_QUESTIONS,
    Aspect,
    Item,
    Question,
    Shown,
    Task,
)
from hyperfitting.preference.judgments import Answer, Judgment, make_judgment, validate
from hyperfitting.runtime.files import first_problem

Row = Mapping[str, str]
FIELDS = ("task", "annotator", "item", "context", "text_a", "text_b")
"""Of a row: hash of the task, name of the annotator, id of the item; A is the text on the left."""
PREFERENCE = "preference"
"""Name of the question, beside those of the aspects."""


@dataclass(frozen=True)
class Asked:
    """The question about an item, or about an aspect of it."""

    name: str
    """`PREFERENCE`, or the aspect."""
    wording: str
    choices: Mapping[Shown, str]
    """With their words, in the order in which they are shown."""

    @property
    def is_required(self) -> bool:
        """Whether an answer needs it: aspects are optional."""
        return self.name == PREFERENCE


@dataclass(frozen=True)
class Answered:
    """An answer as a platform returns it."""

    where: str
    """Its place in the platform's file, for messages."""
    row: Row
    """What was shown, with the fields of `FIELDS` that came back."""
    answer: Answer | None
    """None: there is none that can be used."""
    problem: str = ""
    """Why there is none."""
    account: str | None = None
    """Who gave it, by the platform's own names."""


@dataclass(frozen=True)
class LeftOut:
    """An answer that is not imported, and why."""

    where: str
    reason: str


def rows(task: Task, annotator: str) -> list[dict[str, str]]:
    """Return what a platform is given for an annotator: one row for each item, in order."""
    return [_row(task, annotator, item) for item in task.items_of(annotator)]


def _row(task: Task, annotator: str, item: Item) -> dict[str, str]:
    shown = item.shown(task.left(annotator, item))
    texts = (shown["context"], shown["left"], shown["right"])
    return dict(zip(FIELDS, (task.content_hash, annotator, item.id, *texts), strict=True))


def asked(question: Question) -> list[Asked]:
    """Return all that is asked about an item: the question, then its aspects."""
    aspects = {choice: ASPECT_LABELS[choice] for choice in ASPECT_CHOICES}
    return [
        Asked(PREFERENCE, question.wording, question.choices),
        *(Asked(name, ASPECT_QUESTIONS[name], aspects) for name in question.aspects),
    ]


def parse_choice(choices: Mapping[Shown, str], text: str) -> Shown | None:
    """Return the choice that a text names by its key or its words; None: it names none."""
    plain = text.strip().casefold()
    for choice, words in choices.items():
        if plain in (choice, words.casefold()):
            return choice
    return None


def parse_answers(
    question: Question, given: Mapping[str, str]
) -> tuple[Shown, dict[Aspect, Shown]] | str:
    """Return the choices of the question and of the aspects, or what is wrong with them.

    Args:
        question: that was asked.
        given: by name of the question or aspect, the key or the words of the choice; "": none.
    """
    by_name = {each.name: each.choices for each in asked(question)}
    choices = {}
    for name, text in given.items():
        if name not in by_name:
            return f"{name} was not asked"
        if text.strip():
            choice = parse_choice(by_name[name], text)
            if choice is None:
                return f"{name} has no choice {text!r}"
            choices[name] = choice
    if PREFERENCE not in choices:
        return "no choice was made"
    return choices[PREFERENCE], {a: choices[a] for a in question.aspects if a in choices}


def accept(
    task: Task, answers: Iterable[Answered], source: str, existing: Iterable[Judgment]
) -> tuple[list[Judgment], list[LeftOut]]:
    """Return the judgments that answers are, and those that are left out with the reason.

    Left out is what does not belong: unknown tasks, annotators and items, texts that were changed,
    a second answer, an account that answers for two annotators or for one that has another.

    Args:
        task: the study.
        answers: in the platform's order.
        source: such as `csv`.
        existing: judgments that the study has already.
    """
    accounts = _Accounts()
    judged: list[tuple[str, Judgment]] = []
    left_out = []
    for answered in answers:
        reason = next(_problems(task, answered), "") or accounts.problem(answered)
        item = task.item(answered.row.get("item", ""))
        if not reason and item is not None and answered.answer is not None:
            try:
                judgment = make_judgment(
                    task, item, answered.row["annotator"], answered.answer, source
                )
                judged.append((answered.where, judgment))
                continue
            except ValidationError as error:
                reason = first_problem(error)
        left_out.append(LeftOut(answered.where, reason))
    accepted, rejected = validate(task, [judgment for _, judgment in judged], existing)
    left_out += [LeftOut(judged[each.index][0], each.reason) for each in rejected]
    return accepted, left_out


def _problems(task: Task, answered: Answered) -> Iterator[str]:
    """Yield why an answer does not belong to a task."""
    row = answered.row
    missing = [name for name in FIELDS if name not in row]
    if missing:
        yield f"has no {', '.join(missing)}"
        return
    if row["task"] != task.content_hash:
        yield f"of another task ({row['task']})"
    if row["annotator"] not in task.annotators:
        yield f"the task has no annotator {row['annotator']}"
    item = task.item(row["item"])
    if item is None:
        yield f"the task has no item {row['item']}"
        return
    shown = _row(task, row["annotator"], item)
    changed = [name for name in FIELDS[3:] if _plain(row[name]) != _plain(shown[name])]
    if changed:
        yield f"item {item.id}: {', '.join(changed)} is not what the task shows {row['annotator']}"
    if answered.answer is None:
        yield answered.problem


class _Accounts:
    """Which account of the platform answers for which annotator: one each, the first that does."""

    def __init__(self) -> None:
        self._account: dict[str, str] = {}
        self._annotator: dict[str, str] = {}

    def problem(self, answered: Answered) -> str:
        """Return why an answer's account may not give it; "" if it may."""
        annotator, account = answered.row["annotator"], answered.account
        if account is None:
            return ""
        if self._annotator.setdefault(account, annotator) != annotator:
            return f"account {account} answers for {self._annotator[account]} already"
        if self._account.setdefault(annotator, account) != account:
            return f"account {account} answers for {annotator}, who is {self._account[annotator]}"
        return ""


def _plain(text: str) -> str:
    """Return a text with line ends as Unix has them: forms and spreadsheets change those."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
