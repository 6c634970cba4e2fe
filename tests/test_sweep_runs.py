"""The runs that a sweep expands to, its description in sweep.json, and the state of a run."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from hyperfitting.config import conf_dir
from hyperfitting.errors import UserError
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.spec import parse_report
from hyperfitting.sweep.config import SweeperConfig
from hyperfitting.sweep.runs import (
    SweepRun,
    choose_scale,
    command_runs,
    sweep_name,
)
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec, write_sweep_spec
from hyperfitting.sweep.state import RunFolder, Status, StatusReporter, labels_of
from hyperfitting.sweep.sweeper import Sweep, _execute
from tests.conftest import Compose

PARSER = OverridesParser.create()
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize(
    "irrelevant",
    ["plan=true", "tracking=online", "hardware.threads=1", "store=/mnt/x", "hydra/launcher=slurm"],
)
def test_the_name_of_a_sweep_ignores_where_and_how_fast_it_runs(irrelevant: str) -> None:
    name = sweep_name(["seed=0,1", "tuning=full"])
    assert sweep_name(["tuning=full", irrelevant, "seed=0,1"]) == name


def test_the_name_of_a_sweep_depends_on_what_changes_its_runs() -> None:
    name = sweep_name(["seed=0,1", "tuning=full"])
    assert sweep_name(["tuning=full", "seed=0,2"]) != name
    assert sweep_name(["tuning=full", "seed=0,1", "preset=debug"]) != name
    assert sweep_name(["tuning=full", "seed=0,1", "scale=paper"]) != name
    assert len(sweep_name([f"trainer.epochs={i}" for i in range(90)])) < 120


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean paper"):
        choose_scale({"embedded": {}, "paper": {}}, "papr")
    with pytest.raises(UserError, match="changes nothing without an experiment"):
        choose_scale({}, "paper")


def with_a_new_override(runs: list[SweepRun], seen: set[str]) -> list[SweepRun]:
    """The runs that have an override which was not seen before them; adds theirs."""
    chosen = []
    for run in runs:
        if not seen.issuperset(run.overrides):
            chosen.append(run)
            seen.update(run.overrides)
    return chosen


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("all_runs", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_runs_of_every_experiment_compose_and_its_report_is_valid(
    experiment: str, all_runs: bool, compose: Compose, tmp_path: Path
) -> None:
    """All of them, or as many as have all overrides."""
    seen: set[str] = set()
    values = OmegaConf.to_container(
        OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml")
    )
    assert isinstance(values, dict)
    sweeper = values["hydra"]["sweeper"]
    assert set(sweeper["scales"]) == {"embedded", "paper"}
    config = SweeperConfig(**sweeper)
    for name in ("embedded", "paper"):
        runs = command_runs(config, name, [], PARSER)
        configs = [
            compose(*run.overrides)
            for run in (runs if all_runs else with_a_new_override(runs, seen))
        ]
        different = {json.dumps(asdict(config), sort_keys=True) for config in configs}
        assert len(different) == len(configs)
        table_rows = {
            axis for table in parse_report(sweeper["report"]).tables.values() for axis in table.rows
        }
        assert table_rows <= set(runs[0].labels)
    write_sweep_spec(
        tmp_path / name, name=experiment, scale=name, command=[],
        axes=sweeper.get("axes") or {}, scales=sweeper["scales"], report=sweeper["report"],
        runs=[{"name": run.name, "labels": run.labels} for run in runs],
    )  # fmt: skip
    assert write_report(tmp_path / name).is_dir()  # as at the other scale: no run has ended


SPEC: dict[str, Any] = {
    "name": "s", "scale": "embedded", "command": ["hyperfit", "-m"], "scales": {}, "axes": {},
    "report": {"tables": {"main": {}}}, "runs": [{"name": "seed=0", "labels": {"seed": "0"}}],
}  # fmt: skip


def test_a_sweeps_description_is_read_back_as_written(tmp_path: Path) -> None:
    written = write_sweep_spec(tmp_path / "s", **SPEC)
    assert read_sweep_spec(tmp_path / "s") == written
    assert labels_of(tmp_path / "s" / "seed=0") == {"seed": "0"}
    assert labels_of(tmp_path / "s" / "seed=1") == {}
    assert labels_of(tmp_path / "nowhere" / "seed=0") == {}


@pytest.mark.parametrize("name", ["../up", "a/b", "", "..", "a\\b"])
@pytest.mark.parametrize("section", ["runs", "tables", "figures"])
def test_a_name_that_would_leave_the_folder_is_refused(
    tmp_path: Path, section: str, name: str
) -> None:
    bad = SPEC | (
        {"runs": [{"name": name, "labels": {}}]}
        if section == "runs"
        else {"report": {section: {name: {}}}}
    )
    with pytest.raises(UserError, match="is not a plain file name"):
        write_sweep_spec(tmp_path, **bad)
    assert not (tmp_path / SPEC_FILE).exists()
    good = write_sweep_spec(tmp_path, **SPEC)
    (tmp_path / SPEC_FILE).write_text(json.dumps(good.model_dump() | bad))
    with pytest.raises(UserError, match="is not a plain file name"):
        read_sweep_spec(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{half", "sweep.json cannot be read"),
        ('{"version": 1}', "another version of this software"),
        (json.dumps({"version": 2, "name": 3}), "sweep.json is not valid: name"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / SPEC_FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        read_sweep_spec(tmp_path)


def test_a_run_is_locked_by_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.is_locked()
    with folder.lock() as acquired:
        assert acquired
        code = f"""
from pathlib import Path
from hyperfitting.sweep.state import RunFolder
with RunFolder(Path({str(folder.path)!r})).lock() as acquired: print(acquired)
"""
        other = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert other.stdout.strip() == "False"
    assert not folder.is_locked()


def test_the_status_of_a_run_is_in_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.status() == Status()
    with folder.lock():
        reporter = StatusReporter(folder)
        with reporter.progress("training", 10, "tokens") as advance:
            advance(4, loss=1.5)
            advance(2, loss=0.5)
            status = folder.read_status()
            assert (status.kind, status.task, status.total) == ("running", "training", 10)
        reporter.failed("too hot")
        assert folder.read_status().reason == "too hot"
    folder.write_status(Status("running"))
    assert folder.status().kind == "interrupted"  # without a lock no process executes it
    (folder.path / "status.json").write_text("{half")
    assert folder.status() == Status()


def test_reporting_progress_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced = RunFolder(tmp_path / "run"), []
    monkeypatch.setattr("hyperfitting.sweep.state._WRITE_INTERVAL", 0.0)
    with folder.lock():
        reporter = StatusReporter(folder)
        with reporter.progress("training", 10, "tokens") as advance:
            monkeypatch.setattr("os.fsync", synced.append)
            advance(4, loss=1.5)
            assert folder.read_status().done == 4
            assert synced == []
        reporter.failed("too hot")
        assert synced


@pytest.mark.parametrize("kind", ["failed", "finished"])
def test_a_run_that_ended_before_and_now_dies_at_its_start_is_attempted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """A `finished` run without a record is one whose record is of another config."""
    run = SweepRun("only", {}, ())
    folder = RunFolder(tmp_path / run.name)
    folder.path.mkdir()
    folder.write_status(Status(kind, reason="too hot", attempts=2))
    launched = []

    class Dying:
        """A launcher whose processes die before they write anything."""

        def launch(self, jobs: Any, initial_job_idx: int) -> None:
            launched.append((folder.read_status().kind, folder.read_status().attempts))

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_, **__: Dying())
    config = OmegaConf.create({"hydra": {"launcher": {}, "sweeper": {"max_attempts": 3}}})
    hydra: Any = SimpleNamespace(config=config, context=None, task=None)
    _execute(Sweep("s", tmp_path, [run], {}, {run.name: []}), [run], hydra)
    assert launched == 3 * [("waiting", 2)]
    assert folder.status().kind == "failed"
    assert "its process died 3 times, last while starting" in folder.status().reason


def test_an_old_status_is_not_replaced_while_the_run_executes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        folder.write_status(Status("failed"))
        folder.reset_status()
        assert folder.read_status().kind == "failed"
    folder.reset_status()
    assert folder.read_status().kind == "waiting"


def test_a_run_that_never_started_can_be_marked_failed(tmp_path: Path) -> None:
    """Its launcher may fail before it has a folder; the sweep would launch it forever."""
    RunFolder(tmp_path / "sweep" / "seed=0").mark_failed(3)
    status = RunFolder(tmp_path / "sweep" / "seed=0").status()
    assert status.kind == "failed"
    assert "died 3 times, last while starting" in status.reason
