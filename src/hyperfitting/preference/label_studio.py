"""Label Studio: a project for each annotator, and the import of its JSON export.

Label Studio's own tag for two texts (Pairwise) has no tie, so the question is asked with Choices.
The community edition shows a project's tasks to everyone in it: hence one project an annotator.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, Field, TypeAdapter, ValidationError

from hyperfitting.errors import UserError
from hyperfitting.preference.exchange_rows import (
    FIELDS,
    Answered,
    Row,
    asked,
    parse_answers,
    rows,
)
from hyperfitting.preference.items import Question, Task
from hyperfitting.preference.judgments import Answer
from hyperfitting.runtime.files import first_problem, write_json, write_text

SOURCE = "label_studio"
_TEXT = {"valueType": "text"}  # else a text that is an address would be fetched


class _Value(BaseModel):
    choices: list[str] = Field(default=[])


class _Result(BaseModel):
    from_name: str
    value: _Value


class _Annotation(BaseModel):
    id: int
    result: list[_Result]
    completed_by: int | dict[str, Any] | None = None
    was_cancelled: bool = False
    created_at: AwareDatetime
    lead_time: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class _ExportedTask(BaseModel):
    id: int
    data: dict[str, Any]
    annotations: list[_Annotation]


_EXPORT = TypeAdapter(list[_ExportedTask])


def export(task: Task, folder: Path) -> None:
    """Write the labeling configuration, the instructions, and a file of tasks per annotator."""
    write_text(folder / "labeling_config.xml", labeling_config(task.question))
    write_text(folder / "instructions.txt", task.question.guidelines + "\n")
    for annotator in task.annotators:
        tasks = [{"data": row} for row in rows(task, annotator)]
        write_json(folder / f"{annotator}.json", tasks)


def labeling_config(question: Question) -> str:
    """Return the labeling configuration: context, both texts side by side, choices with hotkeys."""
    view = ET.Element("View")
    ET.SubElement(view, "Header", value="Beginning", size="5")
    ET.SubElement(view, "Text", {"name": "context", "value": "$context", **_TEXT})
    columns = ET.SubElement(view, "View", style="display: flex; gap: 2em")
    for name, heading in (("text_a", "A"), ("text_b", "B")):
        column = ET.SubElement(columns, "View", style="flex: 1")
        ET.SubElement(column, "Header", value=heading, size="5")
        ET.SubElement(column, "Text", {"name": name, "value": f"${name}", **_TEXT})
    for each in asked(question):
        ET.SubElement(view, "Header", value=each.wording, size="5")
        options = {
            "name": each.name,
            "toName": "context",
            "choice": "single-radio",
            "showInline": "true",
            "required": str(each.is_required).lower(),
        }
        element = ET.SubElement(view, "Choices", options)
        for number, (choice, words) in enumerate(each.choices.items(), start=1):
            hotkey = {"hotkey": str(number)} if each.is_required else {}
            ET.SubElement(element, "Choice", {"value": words, "alias": choice, **hotkey})
    ET.indent(view)
    return ET.tostring(view, encoding="unicode") + "\n"


def read(task: Task, paths: Sequence[Path]) -> Iterator[Answered]:
    """Yield the annotations in exports of the format JSON, in order.

    Raises:
        UserError: a file is no such export.
    """
    for path in paths:
        for exported in _read_export(path):
            row = {name: str(exported.data[name]) for name in FIELDS if name in exported.data}
            for annotation in exported.annotations:
                where = f"{path.name} task {exported.id}, annotation {annotation.id}"
                yield _answered(task.question, where, row, annotation)


def _answered(question: Question, where: str, row: Row, annotation: _Annotation) -> Answered:
    user = annotation.completed_by
    account = str(user.get("id")) if isinstance(user, dict) else None if user is None else str(user)
    if annotation.was_cancelled:
        return Answered(where, row, None, "skipped by the annotator", account)
    given = {result.from_name: "; ".join(result.value.choices) for result in annotation.result}
    parsed = parse_answers(question, given)
    if isinstance(parsed, str):
        return Answered(where, row, None, parsed, account)
    seconds, created = annotation.lead_time, annotation.created_at
    return Answered(where, row, Answer(*parsed, seconds=seconds, created=created), account=account)


def _read_export(path: Path) -> list[_ExportedTask]:
    try:
        return _EXPORT.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise UserError(
            f"is no export of Label Studio: {problem}",
            field="file",
            value=path,
            hint="export the project in the format JSON (not JSON-MIN)",
        ) from error
