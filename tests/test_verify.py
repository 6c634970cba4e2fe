"""`hyperfit-verify` on a debug sweep: what is intact passes, and every edit is found."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hyperfitting.errors import UserError
from hyperfitting.record.files import CHECKSUMS_FILE, RECORD_FILE, read_record
from hyperfitting.runtime.code_version import code_version
from hyperfitting.store.hashing import file_sha256
from hyperfitting.store.manifest import MANIFEST
from hyperfitting.sweep.spec import SPEC_FILE
from hyperfitting.verify import cli
from hyperfitting.verify.again import check_again
from hyperfitting.verify.check import Check, exit_code
from hyperfitting.verify.compare_runs import compare_artifacts, compare_runs
from hyperfitting.verify.run_checks import check_run
from hyperfitting.verify.sweep_checks import check_sweep
from tests.cli import hyperfit
from tests.conftest import SWEEP, only_sweep
from tests.tamperings import (
    OF_SWEEPS,
    TAMPERINGS,
    WITHOUT_STORE,
    Edit,
    edit_record,
    edit_spec,
    edited_score,
    other_seed,
    sign_again,
)


@pytest.fixture
def sweep(debug_sweep: Path, tmp_path: Path) -> Path:
    """A copy of the sweep, to edit; the records name the store of the original."""
    return Path(shutil.copytree(only_sweep(debug_sweep), tmp_path / "sweep"))


@pytest.fixture
def run(sweep: Path) -> Path:
    return sweep / "seed=0"


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def failed(checks: Any) -> set[str]:
    return {check.name for check in checks if check.outcome == "failed"}


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_an_intact_sweep_passes_every_check_and_nothing_is_written(
    debug_sweep: Path, sweep: Path
) -> None:
    before = stamps(debug_sweep) | stamps(sweep)
    checks = [*check_run(sweep / "seed=0"), *check_run(sweep / "seed=1"), *check_sweep(sweep)]
    assert [check for check in checks if check.outcome != "passed"] == []
    assert exit_code(checks) == 0
    assert {"files", "scores", "artifact ids", "artifacts", "record from artifacts"} <= {
        check.name for check in checks
    }
    assert stamps(debug_sweep) | stamps(sweep) == before


@pytest.mark.parametrize(("of_other_code", "outcome"), [(True, "passed"), (False, "failed")])
def test_a_metric_that_this_code_has_added_is_not_missed(
    run: Path, of_other_code: bool, outcome: str
) -> None:
    def without_rep_3(record: dict[str, Any]) -> None:
        for part in record["slices"]:
            for group in ("tuned", "base", "reference", "difference"):
                part[group].pop("gen/rep_3", None)
        for values in record["per_text"].values():
            values.pop("gen/rep_3", None)
        if of_other_code:
            record["code"]["digest"] = "0" * 16

    edit_record(run, without_rep_3)
    sign_again(run)
    assert by_name(check_run(run))["scores"].outcome == outcome


@pytest.mark.parametrize("edit", TAMPERINGS, ids=lambda edit: edit.__name__)
def test_tampering_is_found_with_checksums_and_without(edit: Edit, run: Path) -> None:
    edit(run)
    if edit is not other_seed:  # its files are those of a whole run
        files = next(check for check in check_run(run) if check.name == "files")
        assert files.outcome == "failed"
    sign_again(run)
    checks = list(check_run(run))
    assert TAMPERINGS[edit] <= failed(checks)
    assert "files" not in failed(checks)
    assert exit_code(checks) == 1


@pytest.mark.parametrize("edit", WITHOUT_STORE, ids=lambda edit: edit.__name__)
def test_tampering_is_found_in_the_record_alone(edit: Edit, run: Path, tmp_path: Path) -> None:
    edit(run)
    sign_again(run)
    assert failed(check_run(run, tmp_path / "nowhere")) == WITHOUT_STORE[edit]


@pytest.mark.parametrize("edit", OF_SWEEPS, ids=lambda edit: edit.__name__)
def test_tampering_with_a_sweep_is_found(edit: Edit, sweep: Path) -> None:
    edit(sweep)
    assert failed(check_sweep(sweep)) == {OF_SWEEPS[edit]}


def test_configs_of_no_record_are_not_checked(sweep: Path) -> None:
    for path in sweep.glob(f"*/{RECORD_FILE}"):
        path.unlink()
    assert by_name(check_sweep(sweep))["configs of the labels"].outcome == "not checked"


def test_axes_that_the_experiment_does_not_have_here_are_not_checked(sweep: Path) -> None:
    """Another version of the experiment, or a forged one: the commit tells, if it is this one."""

    def edit(spec: dict[str, Any]) -> None:
        runs = [{"name": "a", "labels": {"system": "a"}}, {"name": "b", "labels": {"system": "b"}}]
        spec.update(name="table1_embedded", axes={"system": {"a": [], "b": []}}, runs=runs)
        spec["command"] = ["hyperfit", "experiment=table1", "hydra/launcher=slurm"]

    edit_spec(sweep, edit)
    check = by_name(check_sweep(sweep))["description"]
    own = code_version().git
    assert check.outcome == ("failed" if own is not None and not own.dirty else "not checked")
    assert check.detail == "its axes are not those of the experiment here"


def test_the_command_of_a_stranger_reads_no_config_from_elsewhere(
    sweep: Path, tmp_path: Path
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/elsewhere.yaml").write_text("seed: 1")
    elsewhere = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    edit_spec(
        sweep, lambda s: s.update(command=["hyperfit", elsewhere, "+elsewhere@_global_=elsewhere"])
    )
    check = by_name(check_sweep(sweep))["description"]
    assert check.outcome == "not checked"
    assert "elsewhere" in check.detail


def test_the_checksums_are_those_of_sha256sum(run: Path) -> None:
    command = ["sha256sum", "--check", "--strict", CHECKSUMS_FILE]
    result = subprocess.run(command, cwd=run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_without_its_store_a_record_is_checked_as_far_as_that_goes(
    run: Path, tmp_path: Path
) -> None:
    checks = by_name(check_run(run, tmp_path / "nowhere"))
    assert checks["artifact ids"].outcome == checks["scores"].outcome == "passed"
    assert checks["artifacts"].outcome == "not checked"
    assert "gen/dataset_overlap at 16" in checks["scores"].detail
    assert "checks history" in checks["consistency"].detail
    assert exit_code(list(checks.values())) == 2


def test_a_config_without_what_hydra_composed_is_not_checked(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run, tmp_path / "alone/run"))
    edit_record(alone, lambda record: record["config"].update(seed=17))
    shutil.rmtree(alone / ".hydra", ignore_errors=True)
    sign_again(alone)
    checks = list(check_run(alone))
    assert by_name(checks)["config"].outcome == "not checked"
    assert exit_code(checks) == 2


def test_a_damaged_artifact_is_found_and_left_in_place(
    debug_sweep: Path, run: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(debug_sweep / "outputs/store", tmp_path / "store"))
    tuned = Path(read_record(run / RECORD_FILE).artifacts["tuned"])
    weights = store / "tuned" / tuned.name / "last.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = stamps(store)
    checks = by_name(check_run(run, store))
    assert checks["artifacts"].outcome == "failed"
    assert "last.safetensors" in checks["artifacts"].detail
    assert checks["record from artifacts"].outcome == "not checked"
    assert stamps(store) == before


def replace_by_other_seed(sweep: Path, store: Path, kind: str, *files: str) -> None:
    """Put files of the same artifact of seed 1 into that of seed 0, with new checksums."""
    ids = [read_record(sweep / f"seed={i}" / RECORD_FILE).artifacts for i in (0, 1)]
    label = next(label for label in ids[0] if label.startswith(kind))
    target, source = (store / Path(i[label]).parent.name / Path(i[label]).name for i in ids)
    manifest = json.loads((target / MANIFEST).read_text())
    for name in files:
        shutil.copy(source / name, target / name)
        manifest["files"][name]["sha256"] = file_sha256(target / name)
    (target / MANIFEST).write_text(json.dumps(manifest))


def test_texts_of_another_run_in_the_store_are_found(
    debug_sweep: Path, sweep: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(debug_sweep / "outputs/store", tmp_path / "store"))
    replace_by_other_seed(sweep, store, "tuned/continuations", "continuations.json")
    assert failed(check_run(sweep / "seed=0", store)) == {"record from artifacts"}


def test_a_record_that_reads_the_environment_is_refused(run: Path) -> None:
    edit_record(run, lambda r: r["config"]["model"].update(name="${oc.env:HOME}"))
    (check,) = check_run(run)
    assert (check.name, check.outcome) == ("record", "failed")


def test_the_command_prints_json_and_returns_the_status(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited_score(run)
    assert cli.verify(cli._parser().parse_args([str(run), "--json"])) == 1
    printed = json.loads(capsys.readouterr().out)
    outcomes = {check["name"]: check["outcome"] for check in printed["results"][str(run)]}
    assert printed["status"] == 1 and outcomes["scores"] == "failed"


def test_runs_are_compared_in_the_order_of_the_pipeline(
    debug_sweep: Path, sweep: Path, tmp_path: Path
) -> None:
    """A loss that differs is named with its step, and so is the first artifact of another seed."""
    store = debug_sweep / "outputs/store"
    copied = Path(shutil.copytree(store, tmp_path / "copy"))
    record = read_record(sweep / "seed=0" / RECORD_FILE)
    history = copied / "tuned" / Path(record.artifacts["tuned"]).name / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    changed = next(row for row in rows[2:] if "epoch" not in row)
    changed["train/loss"] += 1.0
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checks = by_name(compare_runs(record, record, store, copied))
    assert failed(checks.values()) == {"tuned"}
    line = rows.index(changed) + 1
    place = f"history.jsonl.line {line} (step {changed['step']}).train/loss"
    assert place in checks["tuned"].detail
    assert "tuned: history.jsonl" in checks["first difference"].detail
    other = read_record(sweep / "seed=1" / RECORD_FILE)
    seeds = by_name(compare_runs(record, other, store, store))
    assert seeds["documents"].detail.endswith("bit-equal")
    assert seeds["first difference"].detail.startswith("sequences: ")


def test_artifacts_that_are_missing_from_a_store_are_named(debug_sweep: Path, run: Path) -> None:
    record = read_record(run / RECORD_FILE)
    checks = by_name(compare_runs(record, record, None, debug_sweep / "outputs/store"))
    assert checks["missing artifacts"].outcome == "not checked"
    assert "documents" in checks["missing artifacts"].detail
    assert checks["first difference"].detail == "none: bit-equal as far as compared"


def test_an_edited_record_is_named_though_all_artifacts_are_equal(
    debug_sweep: Path, run: Path
) -> None:
    store = debug_sweep / "outputs/store"
    record = read_record(run / RECORD_FILE)
    edit_record(run, lambda r: r["slices"][0]["tuned"]["gen/ttr"].update(mean=0.5))
    checks = by_name(compare_runs(record, read_record(run / RECORD_FILE), store, store))
    assert failed(checks.values()) == {"record: slices"}
    first = checks["first difference"].detail
    assert first.startswith("record: slices[0].tuned.gen/ttr.mean: ")


def test_weights_that_differ_a_little_are_rounding(debug_sweep: Path, tmp_path: Path) -> None:
    (folder, *_) = (debug_sweep / "outputs/store/tuned").glob("*/last.safetensors")
    for factor, kind in ((1 + 1e-6, "rounding"), (1.1, "different")):
        copied = Path(shutil.copytree(folder.parent, tmp_path / kind))
        tensors = load_file(folder)
        name = max(tensors, key=lambda name: tensors[name].size)
        save_file(tensors | {name: (tensors[name] * factor).astype(np.float32)},
                  copied / "last.safetensors")  # fmt: skip
        differences = compare_artifacts(folder.parent, copied)
        assert (differences.kind, name in differences.first) == (kind, True)


def test_a_sweep_of_other_code_runs_again_in_a_new_folder(
    debug_sweep: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(debug_sweep, tmp_path / "copy"))
    sweep = only_sweep(folder)
    spec = json.loads((sweep / SPEC_FILE).read_text())
    digest = code_version().digest
    assert spec["code"]["digest"] == digest
    (sweep / SPEC_FILE).write_text(json.dumps(spec | {"code": spec["code"] | {"digest": "f" * 16}}))
    before = stamps(sweep)
    result = hyperfit(folder, *SWEEP)
    assert result.returncode == 0, result.stderr
    assert "2 finished and 0 running runs of other code" in " ".join(result.stdout.split())
    assert stamps(sweep) == before
    records = sweep.with_name(f"{sweep.name}_{digest[:8]}").glob(f"*/{RECORD_FILE}")
    assert sorted(path.parent.name for path in records) == ["seed=0", "seed=1"]


@pytest.mark.exhaustive
def test_a_rerun_is_bit_equal(run: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time everything is there already
        checks = by_name(check_again(run, work=tmp_path / "work"))
        assert failed(checks.values()) == set()
        assert checks["first difference"].detail == "none: bit-equal throughout"
        assert checks["tuned"].detail.endswith("bit-equal")


@pytest.mark.exhaustive
def test_a_rerun_in_another_environment_uses_its_interpreter(run: Path, tmp_path: Path) -> None:
    """A script stands in for its Python: it logs its arguments, and is the Python of this one."""
    python, log = tmp_path / "python", tmp_path / "arguments"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    checks = by_name(check_again(run, python=python, work=tmp_path / "work"))
    assert failed(checks.values()) == set()
    assert checks["first difference"].detail == "none: bit-equal throughout"
    assert log.read_text().startswith("-m hyperfitting.run --config-dir")
    with pytest.raises(UserError, match="is no Python interpreter"):
        list(check_again(run, python=tmp_path / "nowhere"))


@pytest.mark.exhaustive
def test_weights_of_another_run_are_found_by_rerunning(
    debug_sweep: Path, sweep: Path, tmp_path: Path
) -> None:
    """And by nothing else: docs/verify.md says so."""
    store = Path(shutil.copytree(debug_sweep / "outputs/store", tmp_path / "store"))
    replace_by_other_seed(sweep, store, "tuned", "last.safetensors")
    assert failed(check_run(sweep / "seed=0", store)) == set()
    checks = check_again(sweep / "seed=0", work=tmp_path / "work", store=store)
    assert failed(checks) == {"tuned"}


def test_again_is_of_one_run(sweep: Path) -> None:
    arguments = argparse.Namespace(result=sweep, again=True, json=False, store=None)
    with pytest.raises(UserError, match="reruns one run, and this has 2"):
        cli.verify(arguments)
