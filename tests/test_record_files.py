"""Reading records of earlier versions."""

import json
from pathlib import Path

import pytest

from hyperfitting.errors import UserError
from hyperfitting.record.files import RECORD_FILE, read_record, write_record
from hyperfitting.record.schema import SCHEMA_VERSION
from tests.records import make_predictions, ttr_record


def _rewrite(path: Path, version: int) -> None:
    """Write a record as an earlier version did: without `mechanism`."""
    values = json.loads(path.read_text("utf-8")) | {"schema_version": version}
    del values["mechanism"]
    path.write_text(json.dumps(values), "utf-8")


def test_a_record_of_version_5_is_read_with_all_its_numbers(tmp_path: Path) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5)
    write_record(tmp_path, record, make_predictions())
    _rewrite(tmp_path / RECORD_FILE, 5)
    read = read_record(tmp_path / RECORD_FILE)
    assert read == record
    assert read.schema_version == SCHEMA_VERSION
    assert read.mechanism is None


def test_a_record_of_any_other_version_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path, ttr_record([0.1, 0.2], 0.5), make_predictions())
    for version in (4, SCHEMA_VERSION + 1):
        values = json.loads((tmp_path / RECORD_FILE).read_text("utf-8"))
        (tmp_path / RECORD_FILE).write_text(json.dumps(values | {"schema_version": version}))
        with pytest.raises(UserError, match=f"schema_version {version}"):
            read_record(tmp_path / RECORD_FILE)
