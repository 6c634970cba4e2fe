"""Questions of the local tasks, for the tests of downstream tasks."""

import json
from pathlib import Path
from typing import Any

from hyperfitting.evaluation.downstream import local_tasks

DOCUMENTS = [
    f"The {animal} came to the river in the {time} and looked around for a while. "
    f"Nobody had seen the {animal} there before, so many people stopped on the road. "
    f"Then it went back over the hill and slept behind the old {place}."
    for animal, time, place in (
        ("horse", "morning", "castle"),
        ("sheep", "evening", "church"),
        ("tiger", "winter", "market"),
        ("goose", "summer", "school"),
    )
]
OPTIONS: dict[str, Any] = {
    "batch_size": 4, "num_fewshot": None, "limit": None, "apply_chat_template": False,
}  # fmt: skip


def question_rows(name: str) -> list[local_tasks.Row]:
    return local_tasks.make_questions(local_tasks.parse(name), DOCUMENTS)


def local_task(tmp_path: Path, name: str) -> dict[str, Any]:
    """A local task on few questions, as the harness reads it."""
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in question_rows(name)[:6]), "utf-8")
    return local_tasks.harness_config(name, str(path))
