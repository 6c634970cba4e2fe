"""A judge's answers, kept as they come: one JSON object a line in `judges/NAME.jsonl`.

What is kept is never asked again. An answer's key is a hash of all that determines it: the model
and its settings, the prompt, the item and the order of its texts.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from hyperfitting.errors import UserError
from hyperfitting.preference.items import Item, Place, Task, content_hash
from hyperfitting.preference.json_lines import parse_lines
from hyperfitting.preference.judge_prompt import Message, correction, messages
from hyperfitting.runtime.files import make_folder

FOLDER = "judges"
_PLACES: tuple[Place, ...] = ("first", "second")
_MAX_FILE_NAME = 200
MAX_ANSWERS = 2
"""An answer that is not valid is asked for once more, with what is wrong with it."""


class KeptAnswer(BaseModel):
    """What a judge answered to one question, valid or not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(description="of the question")
    text: str = Field(description="the answer, as the model wrote it")
    problem: str = Field(default="", description="why it is not valid; empty: it is")
    prompt_tokens: int = Field(ge=0, description="as the server counts them, or an upper bound")
    completion_tokens: int = Field(ge=0, description="the same of the answer")
    seconds: float = Field(ge=0, allow_inf_nan=False, description="until the answer was there")
    created: AwareDatetime


class Usage(BaseModel):
    """What a judge was asked in a study, and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int = Field(description="that have an answer: items times orders")
    invalid: int = Field(description="of these, without a valid answer after all attempts")
    requests: int = Field(description="answers, those that were not valid included")
    prompt_tokens: int = Field(description="of all requests")
    completion_tokens: int = Field(description="of all answers")


@dataclass(frozen=True)
class JudgeQuestion:
    """An item, with one of its texts as A."""

    item: Item
    left: Place
    key: str
    messages: list[Message]

    def again(self, answer: KeptAnswer) -> "JudgeQuestion":
        """Return the question after an answer that is not valid; an empty one is not quoted."""
        more = correction(answer.text, answer.problem) if answer.text.strip() else []
        return JudgeQuestion(self.item, self.left, self.key, self.messages + more)


def judge_questions(task: Task, settings: Mapping[str, Any]) -> list[JudgeQuestion]:
    """Return what a judge is asked: every item but the repeats, in both orders.

    Args:
        task: the study. Its repeats swap the sides of an item, which a judge sees anyway.
        settings: of the judge; part of each key.
    """
    questions = []
    for item in task.items:
        if item.kind != "repeat":
            for left in _PLACES:
                prompt = messages(task.question, item, left)
                key = content_hash([dict(settings), prompt, item.id, left])
                questions.append(JudgeQuestion(item, left, key, prompt))
    return questions


class AnswerFile:
    """The answers of one judge in a study, open to be added to."""

    def __init__(self, path: Path, file: BinaryIO, answers: Sequence[KeptAnswer]) -> None:
        self.path, self._file = path, file
        self._answers: dict[str, list[KeptAnswer]] = {}
        for answer in answers:
            self._answers.setdefault(answer.key, []).append(answer)

    def keep(self, answer: KeptAnswer) -> None:
        """Add an answer and flush it to disk."""
        self._file.write(answer.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._answers.setdefault(answer.key, []).append(answer)

    @property
    def usage(self) -> Usage:
        """How much was asked."""
        return _usage([answer for kept in self._answers.values() for answer in kept])

    def valid(self, key: str) -> KeptAnswer | None:
        """Return the valid answer to a question, if there is one."""
        return next((a for a in self._answers.get(key, []) if not a.problem), None)

    def pending(self, questions: Sequence[JudgeQuestion]) -> list[JudgeQuestion]:
        """Return the questions that are still to be asked, those with an invalid answer last."""
        new, again = [], []
        for question in questions:
            kept = self._answers.get(question.key, [])
            if not kept:
                new.append(question)
            elif len(kept) < MAX_ANSWERS and self.valid(question.key) is None:
                again.append(question.again(kept[-1]))
        return new or again

    def check_same(self, questions: Sequence[JudgeQuestion]) -> None:
        """Refuse answers to other questions than these.

        Raises:
            UserError: the study's prompt or the judge's settings were others.
        """
        if self._answers.keys() - {question.key for question in questions}:
            raise UserError(
                "holds answers of this judge to other prompts, or with other settings",
                field="answers",
                value=self.path,
                hint="--name with another name for this judge",
            )


@contextmanager
def answer_file(study: Path, name: str) -> Iterator[AnswerFile]:
    """Yield the file of a judge's answers; nobody else can add to it meanwhile.

    A last line that a crash cut short is removed.

    Raises:
        UserError: another process has it open, or it is damaged; or the name cannot be one.
    """
    path = _path(study, name)
    if not name.isprintable() or not 0 < len(path.name) <= _MAX_FILE_NAME:
        raise UserError("cannot be the name of a judge", field="--name", value=name)
    make_folder(path.parent, "study", "a writable folder")
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0), path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            answers = _parse(path, content)
            file.truncate(_complete_size(content))
            yield AnswerFile(path, file, answers)
    except Timeout as error:
        raise UserError(
            "another process is asking this judge", field="judge", value=name
        ) from error


def judge_names(study: Path) -> list[str]:
    """Return the names of the judges that were asked in a study."""
    return sorted(unquote(path.stem) for path in (study / FOLDER).glob("*.jsonl"))


def judge_usage(study: Path, name: str) -> Usage | None:
    """Return how much a judge was asked so far; None: its answers are not kept in this study.

    Raises:
        UserError: a line is damaged.
    """
    path = _path(study, name)
    return _usage(_parse(path, path.read_bytes())) if path.is_file() else None


def _usage(answers: Sequence[KeptAnswer]) -> Usage:
    keys = {answer.key for answer in answers}
    return Usage(
        questions=len(keys),
        invalid=len(keys - {answer.key for answer in answers if not answer.problem}),
        requests=len(answers),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
    )


def _path(study: Path, name: str) -> Path:
    return study / FOLDER / f"{quote(name, safe='')}.jsonl"


def _complete_size(content: bytes) -> int:
    """Return the bytes of a file without a last line that was cut short."""
    return content.rfind(b"\n") + 1


def _parse(path: Path, content: bytes) -> list[KeptAnswer]:
    return parse_lines(content[: _complete_size(content)], KeptAnswer, "answer", path)
