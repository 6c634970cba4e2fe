"""The generated documentation is that of the code."""

import json
from pathlib import Path

import pytest

from hyperfitting.metrics.registry import METRICS
from hyperfitting.record.schema import Record
from hyperfitting.reporting.docs import PAGES, metrics_page, results_page
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
