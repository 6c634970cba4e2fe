"""Sweeps on the command line: a record per run, reports, and what a second command runs."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.config import from_plain
from hyperfitting.errors import UserError
from hyperfitting.record.files import read_record
from hyperfitting.record.schema import SCHEMA_VERSION
from hyperfitting.reporting import figures
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.sweep_records import load_sweep
from hyperfitting.sweep.state import RunFolder
from tests.cli import hyperfit, start
from tests.conftest import only_sweep, sweep_numbers

SWEEP = [
    "-m", "preset=debug", "evaluation.top_tokens=3", "mechanism.measures=[geometry,ranks]",
    "seed=0,1", "decode=greedy,top_p",
]  # fmt: skip
NAMES = [f"seed={seed}_decode={decode}" for seed in (0, 1) for decode in ("greedy", "top_p")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which SWEEP has finished, by two workers."""
    folder = tmp_path_factory.mktemp("sweep")
    result = hyperfit(folder, *SWEEP, "hydra.launcher.workers=2")
    assert result.returncode == 0, result.stderr
    for name in NAMES:
        assert f"{name} finished in" in result.stdout
    return folder


def test_a_sweep_ends_with_a_record_per_run_and_a_report(finished: Path) -> None:
    sweep = only_sweep(finished)
    assert sorted(sweep_numbers(sweep)) == sorted(NAMES)
    assert len(list((finished / "outputs/store/tuned").glob("*/manifest.json"))) == 2  # per seed
    table = (finished / "outputs/reports" / sweep.name / "runs.md").read_text()
    record = read_record(sweep / NAMES[0] / "results.json")
    assert f"{record.overall.tuned['gen/ttr'].mean:.3f}" in table
    assert len(list(load_sweep(sweep).finished())) == 4


FIGURES: dict[str, dict[str, Any]] = {
    "curves": {"series": ["train/loss", "gen/ttr"], "lines": "seed"},
    "line_plot": {"x": "seed", "y": {"TTR": {"key": "gen/ttr"}}, "lines": "decode"},
    "bars": {"rows": "decode", "y": {"TTR": {"key": "gen/ttr"}, "@1": {"key": "val/top1_mass"}}},
    "scatter": {
        "points": "seed",
        "x": {"key": "gen/ttr"},
        "x_label": "TTR",
        "y": {"@1": {"key": "val/top1_mass"}},
    },
    "histogram": {"lines": "decode"},
    "per_position": {"series": ["gen/entropy"], "lines": "decode", "window": 4},
    "agreement": {"axis": "seed"},
    "ranks": {"lines": "seed"},
    "next_tokens": {"dataset": "code_sample"},
    "per_layer": {"panels": {"cosine": ["reference/cosine"]}, "lines": "decode"},
    "rank_shift": {"count": 3},
    "text": {"rows": "decode", "number": 1},
}


def draw(finished: Path, out: Path, described: dict[str, dict[str, Any]]) -> Path:
    """Draw other figures of the finished sweep."""
    sweep = only_sweep(finished)
    spec = json.loads((sweep / "sweep.json").read_text())
    folder = out / sweep.name
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(spec | {"report": {"figures": described}}))
    for name in NAMES:
        (folder / name).symlink_to(sweep / name)
    return write_report(folder, out / "reports")


def test_every_kind_of_figure_is_drawn_from_records(finished: Path, tmp_path: Path) -> None:
    described = {kind: {"kind": kind} | fields for kind, fields in FIGURES.items()}
    assert {*described, "image_grid"} == set(figures._KINDS)  # of images: test_image_reports
    out = draw(finished, tmp_path / "drawn", described)  # again, the others: test_report_figures
    for kind in described:
        assert (out / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{kind}.pdf").read_bytes().startswith(b"%PDF")
    again = draw(finished, tmp_path / "again", {"scatter": described["scatter"]})
    for suffix in ("svg", "png", "pdf"):
        files = [(folder / f"scatter.{suffix}").read_bytes() for folder in (out, again)]
        assert files[0] == files[1]
    labels = (out / "curves.svg").read_text()
    assert "training loss, nats" in labels
    assert "epoch" in labels


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ({"kind": "curve"}, "did you mean curves"),
        ({"kind": "curves", "serie": []}, "did you mean series"),
        ({"kind": "agreement", "axis": "seeds"}, "seeds"),
    ],
)
def test_an_invalid_figure_is_refused(
    finished: Path, tmp_path: Path, figure: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        draw(finished, tmp_path, {"x": figure})


def test_a_figure_without_data_is_explained_in_the_report(finished: Path, tmp_path: Path) -> None:
    out = draw(finished, tmp_path, {"x": {"kind": "next_tokens", "dataset": "poems"}})
    assert "poems" in (out / "README.md").read_text()
    assert not (out / "x.svg").exists()


def test_an_invalid_report_is_refused_before_any_run_starts(tmp_path: Path) -> None:
    misspelled = "+hydra.sweeper.report.figures.x.kind=curve"
    result = hyperfit(tmp_path, *SWEEP, misspelled, from_nothing=True)
    assert result.returncode == 1
    assert "did you mean curves" in result.stderr
    assert not (tmp_path / "outputs/store").exists()


def test_the_same_command_runs_nothing_again(finished: Path) -> None:
    sweep = only_sweep(finished)
    modified = {p: p.stat().st_mtime_ns for p in sweep.rglob("*") if p.name != "sweep.json"}
    plan = hyperfit(finished, *SWEEP, "plan=true")
    assert plan.stdout.count("nothing: finished") == 4
    again = hyperfit(finished, *SWEEP)
    assert again.returncode == 0
    assert "finished in" not in again.stdout
    assert {p: p.stat().st_mtime_ns for p in modified} == modified


def test_a_sweep_needs_a_worker(tmp_path: Path) -> None:
    result = hyperfit(tmp_path, *SWEEP, "plan=true", "hydra.launcher.workers=0")
    assert result.returncode == 1
    assert "hydra.launcher.workers=0: out of range" in result.stderr


def test_a_plan_prints_its_table_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    plan = hyperfit(tmp_path, *SWEEP, "plan=true")
    assert plan.returncode == 0, plan.stderr
    assert (tmp_path / "outputs/store/saved_tensors").is_dir()  # what it counts is kept
    assert plan.stdout.lstrip().startswith("run ")
    assert "built" not in plan.stdout + plan.stderr
    log = only_sweep(finished) / NAMES[0] / "hyperfit.log"
    assert "built tuned" in log.read_text()  # as a run logs it


def test_new_runs_of_a_sweep_are_added_to_the_finished_ones(finished: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    for name in NAMES:
        (sweep / name).symlink_to(only_sweep(finished) / name)
    more = hyperfit(
        finished, *SWEEP[:-1], "decode=greedy,top_p,min_p", f"hydra.sweep.dir='{sweep}'"
    )
    assert more.stdout.count("finished in") == 2  # those with min_p alone


def test_a_field_that_an_older_record_lacks_counts_as_its_default(
    finished: Path, tmp_path: Path
) -> None:
    record = json.loads((only_sweep(finished) / NAMES[0] / "results.json").read_text())
    cfg, folder = from_plain(record["config"]), RunFolder(tmp_path)
    cfg.trainer.eval_every_epochs, cfg.evaluation.max_new_tokens = 1, [96, 224]  # the defaults
    older = json.loads(json.dumps(asdict(cfg)))
    del older["trainer"]["eval_every_epochs"]
    del older["evaluation"]["max_new_tokens"]
    del older["decode"]["top_p"]
    older["tracking"], older["hardware"] = {}, {"gone": 1}  # which change no result

    def stale_reason(**fields: object) -> str:
        folder.record_path.write_text(json.dumps(record | {"config": older | fields}))
        return folder.stale_reason(cfg)

    assert stale_reason() == ""
    assert folder.is_finished(cfg)
    assert stale_reason(gone=1) == "of another config (changed: gone)"
    assert not folder.is_finished(cfg)
    cfg.trainer.eval_every_epochs = 2
    assert stale_reason() == "of another config (changed: trainer.eval_every_epochs)"
    cfg.evaluation.max_new_tokens, cfg.decode.citation_blocker.enabled = [8], True
    assert stale_reason().count(",") == 2


def test_a_run_whose_config_changed_is_set_aside_and_runs_again(
    finished: Path, tmp_path: Path
) -> None:
    sweep = [*SWEEP[:-1], f"store={finished / 'outputs/store'}", "hydra.sweep.dir=sweep"]
    for seed in (0, 1):
        run = only_sweep(finished) / f"seed={seed}_decode=greedy"
        shutil.copytree(run, tmp_path / "sweep" / f"seed={seed}")
    changed = hyperfit(tmp_path, *sweep, "evaluation.n_texts=3")
    assert changed.returncode == 0
    output = " ".join(changed.stdout.split())
    assert output.count("of another config (changed: evaluation.n_texts)") == 2
    for seed in (0, 1):
        aside = tmp_path / "sweep" / f"seed={seed}" / "results.stale-1.json"
        assert read_record(aside).config["evaluation"]["n_texts"] == 4
    record = tmp_path / "sweep" / "seed=0" / "results.json"
    record.write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1}))
    again = hyperfit(tmp_path, *sweep, "evaluation.n_texts=3")
    assert "another version of this software" in " ".join(again.stdout.split())
    assert again.stdout.count("finished in") == 1


def test_a_failed_run_is_repeated_unless_it_should_not_be(tmp_path: Path) -> None:
    sweep = ["-m", "preset=debug", "optimizer.lr=1e-3,1e30"]
    assert hyperfit(tmp_path, *sweep).returncode == 1
    for extra, repetitions in (([], 1), (["hydra.sweeper.retry_failed=false"], 0)):
        again = hyperfit(tmp_path, *sweep, *extra)
        assert again.returncode == 1
        events, _, summary = again.stderr.partition("finished runs: 1, failed: 1")
        assert events.count("failed: training diverged") == repetitions
        assert summary.count("training diverged in epoch 1") == 1


def test_two_commands_share_the_runs(finished: Path, tmp_path: Path) -> None:
    processes = [start(tmp_path, *SWEEP) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.wait() for process in processes] == [0, 0], outputs
    sweep = only_sweep(tmp_path)
    assert sweep_numbers(sweep) == sweep_numbers(only_sweep(finished))
    # each run was started by one of them, once
    assert {RunFolder(p.parent).read_status().attempts for p in sweep.glob("*/status.json")} == {1}
    assert all("finished" in stdout for stdout, _ in outputs)


def test_a_sweep_in_another_folder_keeps_the_name_of_its_experiment(
    finished: Path, tmp_path: Path
) -> None:
    result = hyperfit(
        tmp_path, "-m", "preset=debug", "tuning=none", f"store={finished / 'outputs/store'}",
        "hydra.sweeper.name=mine_embedded", "hydra.sweep.dir=mine_embedded_0123abcd",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert load_sweep(tmp_path / "mine_embedded_0123abcd").spec.experiment == "mine"


def test_runs_of_the_same_config_are_refused_before_any_starts(tmp_path: Path) -> None:
    axis = "+hydra.sweeper.axes.system={one: [], other: ['seed=0']}"
    result = hyperfit(tmp_path, "-m", "preset=debug", axis)
    assert result.returncode == 1
    assert "two runs have the same config: one, other" in result.stderr
    assert not list(tmp_path.rglob("results.json"))
