"""Records of two runs compared, as `hyperfit-verify --again` does: which differences it finds."""

import functools
import operator
from pathlib import Path
from typing import Any, get_args

import pytest

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.record.downstream import Downstream, Form
from hyperfitting.record.schema import Record
from hyperfitting.verify.compare_runs import compare_runs
from tests.records import image_record, make_chat, make_mechanism, make_next_tokens, make_task

EXCLUDED = {
    "config", "versions", "code", "device", "machine", "generation_batches", "artifacts", "timings",
}  # fmt: skip
"""Fields in which two runs of one config may differ."""


@pytest.fixture(scope="module")
def record() -> Record:
    """A record with a value in every field."""
    half = Estimate(0.5, (0.4, 0.6), 2)
    down = {side: {"down/likelihood": half} for side in ("tuned", "base")}
    return image_record(
        generation_batches={"tuned": [2]},
        artifacts={"tuned": "store/tuned/0"},
        notes=["a text is empty"],
        history=[{"epoch": 1, "step": 1, "train/loss": 1.0}],
        next_tokens={"news": make_next_tokens()},
        mechanism=make_mechanism(),
        downstream=Downstream(harness="0", tasks={"easy": make_task(False)}, estimates=down),
        chat=make_chat({"Why?": ("so it is", "it is")}, tuned={"gen/ttr": half}),
    )


def differing(old: Record, new: Record) -> set[str]:
    """Return the failed checks of a comparison without stores."""
    checks = compare_runs(old, new, None, Path())
    return {check.name for check in checks if check.outcome == "failed"}


def altered(value: Any) -> Any:
    """Return plain values of which every text and number is another, where any is valid."""
    if isinstance(value, dict):
        return {name: altered(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [altered(item) for item in value]
    if isinstance(value, str):
        return value if value in get_args(Form) else f"{value}x"
    if isinstance(value, bool):
        return not value
    return None if value is None else value + 1


@pytest.mark.parametrize("field", Record.model_fields)
def test_every_field_is_compared_but_those_that_no_repetition_reproduces(
    record: Record, field: str
) -> None:
    values = record.model_dump()
    other = Record.model_validate(values | {field: altered(values[field])})
    assert other != record
    expected = set() if field in EXCLUDED else {f"record: {field}"}
    assert differing(record, other) == differing(other, record) == expected


@pytest.mark.parametrize("field", ["image", "recognition", "mechanism", "downstream", "chat"])
def test_a_part_that_only_one_record_has_is_a_difference(record: Record, field: str) -> None:
    without = record.model_copy(update={field: None})
    assert differing(record, without) == differing(without, record) == {f"record: {field}"}
    assert differing(without, without) == set()


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("downstream", "tasks", "easy", "tuned", "accuracy", "mean"), 0.75),
        (("downstream", "estimates", "base", "down/likelihood", "n"), 9),
        (("chat", "answers", 0, "tuned", "text"), " anything else"),
        (("chat", "tuned", "gen/ttr", "mean"), 0.9),
        (("notes", 0), "no text is empty"),
    ],
)
def test_an_edited_value_is_found(record: Record, keys: tuple[str | int, ...], value: Any) -> None:
    values = record.model_dump()
    parent = functools.reduce(operator.getitem, keys[:-1], values)
    assert parent[keys[-1]] != value
    parent[keys[-1]] = value
    assert differing(Record.model_validate(values), record) == {f"record: {keys[0]}"}


def test_the_place_of_the_model_and_the_version_of_the_harness_may_differ(record: Record) -> None:
    assert record.downstream is not None
    update = {
        "model": record.model.model_copy(update={"location": "elsewhere"}),
        "downstream": record.downstream.model_copy(update={"harness": "1"}),
    }
    assert differing(record, record.model_copy(update=update)) == set()
