"""The generated documentation is that of the code."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.metrics.registry import METRICS
from hyperfitting.record.schema import Record
from hyperfitting.reporting.docs import PAGES, config_page, metrics_page, results_page
from tests.conftest import Compose
from tests.records import ttr_record

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_the_generated_one(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == PAGES[name](), "run `make docs`"


def test_every_metric_and_every_field_of_a_record_is_described() -> None:
    for key in METRICS:
        assert f"| `{key}`" in metrics_page()
    for name, field in Record.model_fields.items():
        assert field.description
        assert f"| `{name}` |" in results_page()
    assert "|  |\n" not in results_page()  # no field without a description


def test_every_config_field_is_described(compose: Compose) -> None:
    sections = {part.split("\n", 1)[0]: part for part in config_page().split("\n## ")}
    free = ("optimizer", "architecture", "datasets")  # mappings of any keys

    def check(values: dict[str, Any], title: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and name not in free:
                check(value, f"`{name}`" if title == "Top level" else f"{title[:-1]}.{name}`")
            else:
                assert f"| `{name}` |" in sections[title]

    check(dataclasses.asdict(compose("preset=images")), "Top level")  # with `model.pretraining`
    assert "|  |\n" not in config_page()  # no field without a description


def test_the_schema_accepts_a_record_and_refuses_a_missing_field() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((DOCS / "results.schema.json").read_text("utf-8"))
    record = ttr_record([0.1, 0.2, 0.4], 0.5).model_dump(mode="json")
    jsonschema.validate(record, schema)
    Record.model_validate(record)
    for part, name in ((record, "samples"), (record["slices"][0]["tuned"]["gen/ttr"], "ci95")):
        value = part.pop(name)
        with pytest.raises(jsonschema.ValidationError, match=f"'{name}' is a required property"):
            jsonschema.validate(record, schema)
        part[name] = value
