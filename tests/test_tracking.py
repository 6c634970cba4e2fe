"""W&B with the real SDK, offline: what is logged, and that no failure can stop a run."""

import io
import json
import logging
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image
from rich.console import Console

from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.record.schema import Record, Timings
from hyperfitting.reporting.report import write_report
from hyperfitting.runtime.config import TrackingConfig
from hyperfitting.tracking.report_sweep import report_sweep
from hyperfitting.tracking.run_info import MAX_POINTS, RunInfo
from hyperfitting.tracking.wandb_run import track
from tests.conftest import Compose
from tests.records import (
    image_record,
    make_continuation,
    make_next_tokens,
    make_record,
    make_sample,
    make_slice,
    ttr_record,
    write_sweep,
)

KEY = "0123456789abcdef" * 2 + "01234567"
TTR = Estimate(0.6, (0.5, 0.7), 1)


def make_run_record(**fields: Any) -> Record:
    """Return the record of a run on one text."""
    slices = [
        make_slice(
            {"gen/ttr": TTR},
            {"gen/ttr": Estimate(0.3, None, 1)},
            {"gen/ttr": Difference(0.3, (0.2, 0.4), 1, 0.01)},
            max_new_tokens=96,
        ),
        make_slice({"gen/ttr": Estimate(0.7, None, 1)}, dataset="news", max_new_tokens=96),
        make_slice({"gen/ttr": Estimate(0.8, None, 1)}, max_new_tokens=32),
    ]
    tuned, base = make_continuation("c"), make_continuation("b")
    return make_record(
        slices,
        [make_sample(tuned, base, context="<script>")],
        per_text={"tuned": {"gen/ttr": [0.6]}, "base": {"gen/ttr": [0.3]}},
        history=[{"epoch": 1, "step": 2, "train/loss": 2.5}],
        timings=Timings(run_seconds=5.0, build_seconds={"tuned": 4.0}),
        next_tokens={"news": make_next_tokens()},
        **fields,
    )


RECORD = make_run_record()
ROWS: list[dict[str, float]] = [
    {"step": 1, "train/loss": 3.0},
    {"step": 2, "train/loss": 2.0},
    {"epoch": 1, "step": 2, "train/loss": 2.5, "val/loss": 3.1, "val/entropy": 3.0, "gen/ttr": 0.4},
]


@pytest.fixture
def run_info(compose: Compose, tmp_path: Path) -> RunInfo:
    (tmp_path / "tuned").mkdir()
    config = compose("preset=debug", "tracking=offline")
    return RunInfo("tuned", tmp_path / "tuned", config, {"model": "m", "hydra/x": "y"})


def log_run(run_info: RunInfo, **fields: Any) -> Path | None:
    """Track a whole run, with changed tracking settings."""
    config = replace(run_info.config, tracking=TrackingConfig(**fields))
    with track(replace(run_info, config=config)) as tracker:
        for row in ROWS:
            tracker.log_metrics(row)
        tracker.finish(RECORD)
        return tracker.folder


def messages(path: Path) -> Iterator[bytes]:
    """Yield the messages of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole message, or its last part
            yield message
            message = b""


def records(run: Path) -> Iterator[Any]:
    """Yield what W&B wrote into an offline run's own file."""
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # W&B's service may write until it ends, as it does with the process
    for message in messages(next(run.glob("*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        yield record


def logged(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read history and summary back from an offline run's own file."""

    def values(items: Any) -> dict[str, Any]:
        return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}

    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for record in records(run):
        if record.HasField("history"):
            history.append(values(record.history.item))
        summary |= values(record.summary.update)
    return history, summary


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it has read the environment of the test before


def test_an_offline_run_holds_curves_summary_and_continuations(run_info: RunInfo) -> None:
    run = log_run(run_info)
    assert run is not None
    history, summary = logged(run)
    assert [row["train/loss"] for row in history if "train/loss" in row] == [3.0, 2.0]
    (epoch,) = [row for row in history if "epoch/val/loss" in row]
    assert {k: v for k, v in epoch.items() if not k.startswith("_")} == {
        "epoch": 1, "step": 2, "epoch/train/loss": 2.5, "epoch/val/loss": 3.1,
        "epoch/val/entropy": 3.0, "epoch/gen/ttr": 0.4,
    }  # fmt: skip
    assert {
        "texts/path",
        "texts_highlighted/path",
        "overlap/base/values",
        "next_tokens/news_1_table/path",
    } <= set(history[-1])
    assert (summary["gen/ttr"], summary["gen/ttr_low"], summary["base/gen/ttr"]) == (
        0.6,
        0.5,
        0.3,
    )
    assert (summary["difference/gen/ttr_high"], summary["difference/gen/ttr_p"]) == (0.4, 0.01)
    assert (summary["news/gen/ttr"], summary["at_32/gen/ttr"]) == (0.7, 0.8)
    assert summary["speed/training_tokens_per_second"] == 16 / 4


def test_a_run_alone_has_a_new_id_and_a_run_of_a_sweep_keeps_its_id(run_info: RunInfo) -> None:
    assert len({log_run(run_info), log_run(run_info)}) == 2
    swept = replace(run_info, sweep="s", job_type="sweep-run", folder=run_info.folder / "m")
    swept.folder.mkdir()
    first = log_run(swept)
    second = log_run(swept)
    assert first is not None
    assert second is not None
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == swept.id
    assert list(swept.folder.glob("wandb/offline-run-*")) == [
        second
    ]  # it repeats all rows of the first
    (started,) = [record.run for record in records(second) if record.HasField("run")]
    assert (started.run_id, started.run_group, started.job_type) == (swept.id, "s", "sweep-run")
    assert list(started.tags) == ["s"]
    swept.config.optimizer["lr"] = 0.5
    assert log_run(swept) != second


def test_a_rows_number_is_its_step(run_info: RunInfo) -> None:
    history, _ = logged(log_run(run_info) or Path())
    assert [row["_step"] for row in history if "step" in row] == [0, 1, 2]


def test_a_long_training_logs_at_most_the_maximum_of_points(run_info: RunInfo) -> None:
    run_info.config.trainer.epochs, run_info.config.trainer.batch_size = (
        5000,
        run_info.config.dataset.n_train,
    )
    with track(run_info) as tracker:
        for step in range(1, 5001):
            tracker.log_metrics({"step": step, "train/loss": 1.0})
            tracker.log_metrics({"epoch": step, "step": step, "train/loss": 1.0})
        run = tracker.folder
    history, _ = logged(run or Path())
    assert 990 < sum("train/loss" in row for row in history) <= MAX_POINTS + 1
    assert 990 < sum("epoch/train/loss" in row for row in history) <= MAX_POINTS


def test_disabled_writes_nothing(run_info: RunInfo) -> None:
    assert log_run(run_info, mode="disabled") is None
    assert not list(run_info.folder.iterdir())


def test_online_without_a_login_falls_back_to_offline(
    run_info: RunInfo, caplog: pytest.LogCaptureFixture
) -> None:
    run = log_run(run_info, mode="online")
    assert run is not None
    assert run.name.startswith("offline-run")
    assert "wandb login" in caplog.text
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert logged(run)[0]


def test_online_with_a_dead_server_soon_falls_back_to_offline_and_keeps_the_key_secret(
    run_info: RunInfo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:  # a port where nothing answers
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        start = time.monotonic()
        run = log_run(run_info, mode="online", timeout=3)
        waited = time.monotonic() - start
    assert run is not None
    assert url in caplog.text
    assert "offline" in caplog.text
    assert logged(run)[0]
    assert waited < 60  # not a benchmark: the SDK's own default would wait 90 s for the start alone
    for path in run_info.folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in caplog.text


def test_a_failure_midway_is_one_warning_and_stops_nothing(
    run_info: RunInfo, caplog: pytest.LogCaptureFixture
) -> None:
    with track(run_info) as tracker:
        tracker._run.finish()  # as if the service had died
        for row in ROWS:
            tracker.log_metrics(row)
        tracker.finish(RECORD)
    assert caplog.text.count("no longer tracked") == 1


def test_the_config_on_wandb_has_choices_and_labels_to_group_by(run_info: RunInfo) -> None:
    config = replace(run_info, labels={"system": "greedy"}).wandb_config
    assert config["choice"] == {"model": "m"}
    assert config["label"] == {"system": "greedy"}
    assert config["dataset"]["n_train"] == run_info.config.dataset.n_train


def test_settings_that_change_no_result_do_not_change_the_id(run_info: RunInfo) -> None:
    swept = replace(run_info, sweep="s")
    elsewhere = replace(swept.config, store="elsewhere", tracking=TrackingConfig(mode="disabled"))
    assert replace(swept, config=elsewhere).id == swept.id
    assert replace(swept, config=replace(swept.config, seed=1)).id != swept.id
    assert replace(swept, folder=run_info.folder / "other").id != swept.id


def test_the_end_of_a_sweep_is_a_report_and_a_run_of_its_own(
    run_info: RunInfo, tmp_path: Path
) -> None:
    table = {"rows": ["seed"], "columns": {"TTR": {"key": "gen/ttr"}}}
    figure = {"kind": "bars", "rows": "seed", "y": {"TTR": {"key": "gen/ttr"}}}
    folder = write_sweep(
        tmp_path / "sweeps" / "x",
        {"tables": {"main": table}, "figures": {"f": figure}},
        {"tuned_0": ttr_record([0.1, 0.2, 0.4], 0.5)},
    )
    output = io.StringIO()
    console = Console(file=output, width=110)
    report = report_sweep(folder, run_info.config, console, log_to_wandb=False)
    assert report == write_report(folder)
    assert str(report) in output.getvalue()
    assert not list(folder.glob("wandb"))
    report_sweep(folder, run_info.config, console, log_to_wandb=True)
    (run,) = folder.glob("wandb/offline-run-*")
    (row,) = [row for row in logged(run)[0] if "contexts/path" in row]
    assert "figures/f/path" in row
    (started,) = [record.run for record in records(run) if record.HasField("run")]
    assert (started.display_name, started.job_type) == ("x report", "report")
    table_file = next(run.glob("files/media/table/contexts*"))
    assert json.loads(table_file.read_text())["columns"] == [
        "context", "base, greedy", "tuned_0", "reference"
    ]  # fmt: skip


def test_an_offline_run_of_an_image_model_holds_its_images(run_info: RunInfo) -> None:
    with track(run_info) as tracker:
        tracker.finish(image_record())
        folder = tracker.folder
    assert folder is not None
    history, _ = logged(folder)
    (row,) = [row for row in history if "images/_type" in row]
    assert row["images/captions"][0].endswith("1: context, base, tuned, real")
    images = [Image.open(path) for path in (folder / "files" / "media" / "images").glob("*.png")]
    assert [image.size for image in images] == [(4 * 128 + 3 * 8, 128)] * 2
