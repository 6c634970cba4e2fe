"""Potato (Pei et al., 2022): one project for all annotators, and the import of their states.

Each annotator logs in by name and gets the own items alone, in order (`assignment_strategy:
batch`). Potato writes what somebody has answered to `annotation_output/NAME/user_state.json`.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from hyperfitting.errors import UserError
from hyperfitting.preference.exchange_rows import (
    FIELDS,
    Answered,
    Asked,
    Row,
    asked,
    parse_answers,
    rows,
)
from hyperfitting.preference.items import Question, Task, content_hash
from hyperfitting.preference.judgments import Answer
from hyperfitting.runtime.files import first_problem, write_json, write_text

SOURCE = "potato"
_CONFIG, _ITEMS = "config.yaml", "items.jsonl"
_OUTPUT, _STATE = "annotation_output", "user_state.json"
_ID = "id"
T = TypeVar("T")


class _Label(BaseModel):
    schema_: str = Field(alias="schema")
    name: str


class _Behavior(BaseModel):
    session_end: float | None = Field(default=None, ge=0, lt=1e11)
    total_time_ms: float = Field(default=0, ge=0, allow_inf_nan=False)


class _State(BaseModel):
    user_id: str
    instance_id_to_label_to_value: dict[str, list[tuple[_Label, Any]]] = Field(default={})
    instance_id_to_behavioral_data: dict[str, _Behavior] = Field(default={})


_ROW = TypeAdapter(dict[str, str])


def export(task: Task, folder: Path) -> None:
    """Write a Potato project into a folder: `potato start config.yaml` serves it."""
    lines, groups = [], []
    for annotator in task.annotators:
        own = [{_ID: _instance_id(row), **row} for row in rows(task, annotator)]
        lines += [_ROW.dump_json(row).decode() + "\n" for row in own]
        instances = [row[_ID] for row in own]
        groups.append({"name": annotator, "annotators": [annotator], "instances": instances})
    write_text(folder / _ITEMS, "".join(lines))
    config = project_config(task) | {
        "assignment_strategy": "batch",
        "batch_assignment": {"groups": groups},
    }
    write_json(folder / _CONFIG, config)  # JSON is YAML


def project_config(task: Task) -> dict[str, Any]:
    """Return the project's configuration, without who annotates what."""
    fields = [("context", "Beginning"), ("text_a", "A"), ("text_b", "B")]
    return {
        "annotation_task_name": task.question.wording,
        "task_dir": ".",
        "output_annotation_dir": _OUTPUT,
        "data_files": [_ITEMS],
        "item_properties": {"id_key": _ID, "text_key": "context"},
        "instance_display": {
            "fields": [{"key": key, "label": label, "type": "text"} for key, label in fields]
        },
        "annotation_instructions": task.question.guidelines,
        "annotation_schemes": [_scheme(each) for each in asked(task.question)],
        "user_config": {"allow_all_users": False, "users": list(task.annotators)},
        "require_password": False,
    }


def _scheme(each: Asked) -> dict[str, Any]:
    labels = [
        {"name": choice, "displayed_label": words}
        | ({"key_value": str(n)} if each.is_required else {})
        for n, (choice, words) in enumerate(each.choices.items(), start=1)
    ]
    return {
        "annotation_type": "radio",
        "name": each.name,
        "description": each.wording,
        "labels": labels,
        "label_requirement": {"required": each.is_required},
    }


def read(task: Task, paths: Sequence[Path]) -> Iterator[Answered]:
    """Yield the answers in the folders of Potato projects, by annotator, in the order of the items.

    Raises:
        UserError: a folder is no project, or a file in it is damaged.
    """
    for folder in paths:
        shown = _read_items(folder / _ITEMS)
        states = sorted((folder / _OUTPUT).glob(f"*/{_STATE}"))
        for path in states:
            state = _read(path, _State.model_validate_json)
            for instance, labels in state.instance_id_to_label_to_value.items():
                where = f"{path.parent.name}/{path.name} instance {instance}"
                row = shown.get(instance, {})
                if row and row["annotator"] != state.user_id:
                    problem = f"answered by {state.user_id}, but it is for {row['annotator']}"
                    yield Answered(where, row, None, problem)
                else:
                    behavior = state.instance_id_to_behavioral_data.get(instance, _Behavior())
                    yield _answered(task.question, where, row, labels, behavior)


def _answered(
    question: Question, where: str, row: Row, labels: list[tuple[_Label, Any]], behavior: _Behavior
) -> Answered:
    given: dict[str, str] = {}
    for label, value in labels:
        if value not in (None, False, "", "false"):  # an option that is not selected
            chosen = given.get(label.schema_)
            given[label.schema_] = f"{chosen}; {label.name}" if chosen else label.name
    parsed = parse_answers(question, given)
    if isinstance(parsed, str):
        return Answered(where, row, None, parsed)
    seconds = behavior.total_time_ms / 1000 or None  # 0: not measured
    end = behavior.session_end
    created = None if end is None else datetime.fromtimestamp(end, UTC)
    return Answered(where, row, Answer(*parsed, seconds=seconds, created=created))


def _instance_id(row: Row) -> str:
    return content_hash([row["annotator"], row["item"]])


def _read_items(path: Path) -> dict[str, Row]:
    """Return the rows that were shown, by instance."""

    def parse(content: bytes) -> dict[str, Row]:
        lines = [_ROW.validate_json(line) for line in content.splitlines()]
        return {line.get(_ID, ""): {k: line[k] for k in FIELDS if k in line} for line in lines}

    return _read(path, parse)


def _read(path: Path, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(path.read_bytes())
    except (OSError, ValidationError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise UserError(
            f"{path.name} cannot be read: {problem}",
            field="file",
            value=path.parent,
            valid="the folder of a Potato project that export wrote",
        ) from error
