"""Reading records of earlier versions."""

import json
from pathlib import Path

import pytest

from hyperfitting.errors import UserError
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.record.files import RECORD_FILE, read_record, write_record
from hyperfitting.record.mechanism import LayerCurve
from hyperfitting.record.schema import SCHEMA_VERSION
from tests.records import make_mechanism, make_predictions, ttr_record


def _rewrite(path: Path, version: int) -> None:
    """Write a record as an earlier version did: with `git` instead of `code` and `machine`."""
    values = json.loads(path.read_text("utf-8")) | {"schema_version": version}
    values["git"] = {"commit": "a" * 40, "dirty": True}
    for name in ("code", "machine", *(["mechanism"] if version == 5 else [])):
        del values[name]
    path.write_text(json.dumps(values), "utf-8")


@pytest.mark.parametrize("version", [5, 6])
def test_an_earlier_record_is_read_with_all_its_numbers(tmp_path: Path, version: int) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5)
    write_record(tmp_path, record, make_predictions())
    _rewrite(tmp_path / RECORD_FILE, version)
    read = read_record(tmp_path / RECORD_FILE)
    assert read == record.model_copy(update={"code": read.code, "machine": read.machine})
    assert read.schema_version == SCHEMA_VERSION
    assert read.code.git is not None
    assert (read.code.git.commit, read.code.git.dirty) == ("a" * 40, True)
    assert read.machine.cpu == "unknown"


@pytest.mark.parametrize("version", [7, 8, 9])
def test_a_record_without_what_was_added_last_is_read(tmp_path: Path, version: int) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5)
    write_record(tmp_path, record, make_predictions())
    values = json.loads((tmp_path / RECORD_FILE).read_text("utf-8"))
    if version == 7:
        del values["chat"]
    del values["timings"]["finished_at"]
    (tmp_path / RECORD_FILE).write_text(json.dumps(values | {"schema_version": version}), "utf-8")
    assert read_record(str(tmp_path / RECORD_FILE)) == record


def test_measures_of_the_logit_lens_are_read_under_their_new_names(tmp_path: Path) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5)
    mechanism = make_mechanism()
    depth = Estimate(3.0, (2.0, 4.0), 6)
    estimates = {"mech/divergence_depth": depth, "mech/prediction_depth_base": depth}
    curve = LayerCurve(layers=["0", "1"], mean=[0.0, 1.0], ci95=[(0.0, 0.0), (1.0, 1.0)])
    per_layer = {"lens/diverged": curve, "lens/tuned_final_choice": curve}
    update = {"estimates": estimates, "per_layer": per_layer}
    record = record.model_copy(update={"mechanism": mechanism.model_copy(update=update)})
    write_record(tmp_path, record, make_predictions())
    text = (tmp_path / RECORD_FILE).read_text("utf-8")
    for new, old in {
        "mech/divergence_depth": "mech/lens_parted",
        "mech/prediction_depth_base": "mech/lens_settled_base",
        "lens/diverged": "lens/parted",
        "lens/tuned_final_choice": "lens/tuned_settled",
    }.items():
        assert text.count(f'"{new}"') == 1
        text = text.replace(f'"{new}"', f'"{old}"')
    values = json.loads(text) | {"schema_version": 9}
    (tmp_path / RECORD_FILE).write_text(json.dumps(values), "utf-8")
    assert read_record(str(tmp_path / RECORD_FILE)) == record


def test_a_record_of_any_other_version_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path, ttr_record([0.1, 0.2], 0.5), make_predictions())
    for version in (4, SCHEMA_VERSION + 1):
        values = json.loads((tmp_path / RECORD_FILE).read_text("utf-8"))
        (tmp_path / RECORD_FILE).write_text(json.dumps(values | {"schema_version": version}))
        with pytest.raises(UserError, match=f"schema_version {version}"):
            read_record(tmp_path / RECORD_FILE)
