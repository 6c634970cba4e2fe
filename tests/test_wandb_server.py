"""W&B's real SDK against a real server: openwandb over loopback.

One file, so that one worker starts the server and installs its environment.
"""

import http.server
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
import wandb_workspaces.reports.v2 as wr

from hyperfitting.errors import UserError
from hyperfitting.record.files import read_record, write_record
from hyperfitting.runtime.config import TrackingConfig
from hyperfitting.tracking import workspace
from hyperfitting.tracking.run_info import RunInfo
from hyperfitting.tracking.sync import sync, unsynced
from hyperfitting.tracking.wandb_run import track
from tests.cli import hyperfit
from tests.conftest import Compose
from tests.openwandb import KEY, ListeningHandler, Server, refusing, storing_views
from tests.records import make_predictions
from tests.test_tracking import RECORD, ROWS, make_run_record

pytestmark = pytest.mark.server  # installs the server
LOGGER = "hyperfitting.tracking.wandb_run"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("openwandb") / "data")
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it has read the environment of the test before


@pytest.fixture
def run_info(compose: Compose, tmp_path: Path) -> RunInfo:
    folder = tmp_path / "outputs" / "tuned"
    folder.mkdir(parents=True)
    write_record(folder, RECORD, make_predictions())
    config = compose("preset=debug")
    return RunInfo("tuned", folder, config, {"model": "m"}, "s", job_type="sweep-run")


def online(run_info: RunInfo, **fields: Any) -> RunInfo:
    tracking = TrackingConfig(**{"mode": "online", "timeout": 20} | fields)
    return replace(run_info, config=replace(run_info.config, tracking=tracking))


def log_run(run_info: RunInfo, rows: int = len(ROWS)) -> None:
    with track(run_info) as tracker:
        for row in ROWS[:rows]:
            tracker.log_metrics(row)
        tracker.finish(RECORD)
    wandb.teardown()


HISTORY = {
    "train/loss": [(0, 3.0), (1, 2.0)],
    "epoch/train/loss": [(2, 2.5)],
    "epoch/val/loss": [(2, 3.1)],
    "epoch/val/entropy": [(2, 3.0)],
    "epoch/gen/ttr": [(2, 0.4)],
    "epoch": [(2, 1.0)],
    "step": [(0, 1.0), (1, 2.0), (2, 2.0)],
}


def check_complete(server: Server, run: str) -> None:
    assert server.history(run) == HISTORY
    summary = json.loads(server.file(run, "wandb-summary.json"))
    assert (summary["gen/ttr"], summary["gen/ttr_low"]) == (0.6, 0.5)
    files = server.files(run)
    table = next(name for name in files if name.startswith("media/table/texts"))
    texts = json.loads(server.file(run, table))
    row = dict(zip(texts["columns"], texts["data"][0], strict=True))
    assert (row["context"], row["tuned"], row["gen/ttr"]) == ("<script>", " c", 0.6)
    assert (row["base"], row["base/gen/ttr"]) == (" b", 0.3)
    page = next(name for name in files if name.startswith("media/html/texts_highlighted"))
    assert "&lt;script&gt;" in server.file(run, page)
    assert "<script>alert" not in server.file(run, page)
    artifacts = server.get(f"api/v2/runs/{run}/artifacts")["artifacts"]
    assert f"record-{run}" in {artifact["name"] for artifact in artifacts}


def test_a_sweep_of_three_runs_is_read_back_equal_to_its_records(
    server: Server, tmp_path: Path
) -> None:
    process = hyperfit(
        tmp_path, "-m", "preset=debug", "seed=0,1,2", "tracking=online",
        "hydra.sweep.dir=outputs/sweeps/tiny", "tracking.timeout=60",
        WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    runs = {
        run["display_name"]: (id_, run)
        for id_, run in server.runs().items()
        if run["display_name"].startswith("seed=")
    }
    assert set(runs) == {"seed=0", "seed=1", "seed=2"}
    for name, (run, details) in runs.items():
        record = read_record(tmp_path / "outputs/sweeps/tiny" / name / "results.json")
        assert details["state"] == "finished"
        assert server.tags(run) == ["tiny"]
        config = {k: v["value"] for k, v in json.loads(details["config_json"]).items()}
        assert config["label"] == {"seed": name.removeprefix("seed=")}
        assert config["choice"]["decode"] == "greedy"
        assert config["dataset"] == record.config["dataset"]
        history = server.history(run)
        for key in ("train/loss", "val/loss", "val/entropy", "gen/ttr"):
            values = [value for _, value in history[f"epoch/{key}"]]
            assert values == [row[key] for row in record.history]
        assert len(history["train/loss"]) == record.history[-1]["step"]
        summary = json.loads(server.file(run, "wandb-summary.json"))
        for key, estimate in record.overall.tuned.items():
            assert summary[key] == estimate.mean
            if estimate.ci95:
                assert (summary[f"{key}_low"], summary[f"{key}_high"]) == estimate.ci95
        table = next(n for n in server.files(run) if n.startswith("media/table/texts"))
        texts = json.loads(server.file(run, table))
        rows = [dict(zip(texts["columns"], row, strict=True)) for row in texts["data"]]
        assert [row["tuned"] for row in rows] == [sample.tuned.text for sample in record.samples]
        artifacts = server.get(f"api/v2/runs/{run}/artifacts")["artifacts"]
        assert f"record-{run}" in {artifact["name"] for artifact in artifacts}
    (report,) = [id_ for id_, r in server.runs().items() if r["display_name"] == "tiny report"]
    table = next(n for n in server.files(report) if n.startswith("media/table/contexts"))
    contexts = json.loads(server.file(report, table))
    models = ["base, greedy", "seed=0", "seed=1", "seed=2"]
    assert contexts["columns"] == ["context", *models, "reference"]
    assert len(contexts["data"]) == len(record.samples)
    for path in (tmp_path / "outputs").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def track_until_killed(run_info: RunInfo) -> None:
    """Track the beginning of a run, then be killed."""
    with track(online(run_info)) as tracker:
        tracker.log_metrics(ROWS[0])
        tracker.log_metrics(ROWS[1])
        time.sleep(3)  # it may arrive, or not
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_is_resumed_on_the_server(server: Server, run_info: RunInfo) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=track_until_killed, args=(run_info,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    log_run(online(run_info))
    assert run_info.id is not None
    check_complete(server, run_info.id)


def test_offline_then_sync_is_complete_and_a_second_sync_adds_nothing(
    server: Server, run_info: RunInfo
) -> None:
    outputs = run_info.folder.parent
    log_run(online(run_info, mode="offline"), rows=1)  # a first attempt, killed early
    log_run(online(run_info, mode="offline"))
    assert sync(outputs) == 1
    assert run_info.id is not None
    check_complete(server, run_info.id)
    before = server.runs()[run_info.id], server.file(run_info.id, "wandb-history.jsonl")
    assert sync(outputs) == 0
    after = server.runs()[run_info.id], server.file(run_info.id, "wandb-history.jsonl")
    assert before[1] == after[1]
    check_complete(server, run_info.id)


def test_a_server_that_dies_midway_gets_the_whole_run_later(
    server: Server, run_info: RunInfo, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        with track(online(run_info, timeout=4)) as tracker:
            tracker.log_metrics(ROWS[0])
            time.sleep(2)
            server.kill()
            for row in ROWS[1:]:
                tracker.log_metrics(row)
            tracker.finish(RECORD)
            start = time.monotonic()
        assert time.monotonic() - start < 30  # a bound on the wait, not a measurement
        wandb.teardown()
        assert [r.levelname for r in caplog.records if r.name == LOGGER] == ["WARNING"]
        assert "hyperfit-dashboard sync" in caplog.text
        assert len(unsynced(run_info.folder.parent)) == 1
        with pytest.raises(UserError, match="cannot be reached"):
            sync(run_info.folder.parent)
        assert len(unsynced(run_info.folder.parent)) == 1
    finally:
        server.start()
    assert sync(run_info.folder.parent) == 1
    assert run_info.id is not None
    check_complete(server, run_info.id)
    assert unsynced(run_info.folder.parent) == []


@pytest.mark.parametrize("enabled", [True, False])
def test_tuned_parameters_are_uploaded_only_if_enabled(
    server: Server, run_info: RunInfo, tmp_path: Path, enabled: bool
) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"tuned")
    with track(online(run_info, checkpoint=enabled)) as tracker:
        tracker.finish(make_run_record(artifacts={"tuned": str(tmp_path)}))
    artifacts = server.get(f"api/v2/runs/{run_info.id}/artifacts")["artifacts"]
    assert (f"model-{run_info.id}" in {artifact["name"] for artifact in artifacts}) == enabled


@pytest.mark.parametrize(
    ("what", "status"), [("refuses the login", 401), ("is out of quota", 402), ("is slow", None)]
)
def test_a_server_that_refuses_leaves_a_run_that_syncs(
    server: Server, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, what: str, status: int | None,
) -> None:  # fmt: skip
    with refusing(status) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        wandb.teardown()
        start = time.monotonic()
        log_run(online(run_info, timeout=3))
        assert time.monotonic() - start < 40, what  # a bound on the wait, not a measurement
    assert [r.levelname for r in caplog.records if r.name == LOGGER] == ["WARNING"]
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    assert sync(run_info.folder.parent) == 1
    assert run_info.id is not None
    check_complete(server, run_info.id)


def test_group_and_job_type_are_sent_to_the_server(
    server: Server, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read from the request: openwandb has no query for them."""
    started: list[dict[str, Any]] = []
    handler = type("Handler", (ListeningHandler,), {"started": started, "upstream": server.url})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.server_port}")
        wandb.teardown()
        log_run(online(run_info))
        listener.shutdown()
    assert run_info.id is not None
    check_complete(server, run_info.id)
    first = started[0]
    assert (first["name"], first["groupName"], first["jobType"]) == (run_info.id, "s", "sweep-run")


def test_the_dashboard_is_built_once_and_then_replaced_in_place(
    server: Server, run_info: RunInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_run(online(run_info))  # a project that has a run
    with storing_views(server.url) as (url, views):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        wandb.teardown()
        first = workspace.build(None, "hyperfitting", tmp_path)
        assert sorted(view["type"] for view in views.values()) == ["project-view", "runs"]
        specs = {key: view["spec"] for key, view in views.items()}
        second = workspace.build(None, "hyperfitting", tmp_path)
    assert first == second
    assert len(views) == 2
    for view in views.values():
        for section in workspace.SECTIONS:
            assert section.name in view["spec"]
        for name in ("choice.value.model", "epoch/val/loss", "texts_highlighted"):
            assert name in view["spec"]
    for key, spec in specs.items():
        assert spec.count('"viewType"') == views[key]["spec"].count('"viewType"') > 10


def test_every_panels_metric_is_in_a_real_run(server: Server, tmp_path: Path) -> None:
    process = hyperfit(
        tmp_path, "preset=debug", "tracking=online", "hydra.run.dir=run", "tracking.timeout=60",
        "tracking.project=panels", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (run,) = server.get("api/v2/projects/default/panels/runs")["runs"]
    files = f"files/default/panels/{run['run_id']}"
    lines = server.read(f"{files}/wandb-history.jsonl").splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    summary = set(json.loads(server.read(f"{files}/wandb-summary.json")))
    for section in workspace.SECTIONS:
        for panel in section.panels():
            assert set(history_keys(panel)) <= logged, section.name
            assert set(summary_keys(panel)) <= summary, section.name
    config = {k: v["value"] for k, v in json.loads(run["config_json"]).items()}
    assert {"model", "dataset", "tuning", "decode"} <= set(config["choice"])


def history_keys(panel: Any) -> list[str]:
    """Return the history keys that a panel shows."""
    if isinstance(panel, wr.LinePlot):
        return [panel.x, *panel.y]
    if isinstance(panel, wr.MediaBrowser):
        return list(panel.media_keys)
    return [panel.table_name] if isinstance(panel, wr.WeavePanelSummaryTable) else []


def summary_keys(panel: Any) -> list[str]:
    """Return the summary keys that a panel shows."""
    if isinstance(panel, wr.ScatterPlot):
        return [panel.x.name, panel.y.name]
    return list(panel.metrics) if isinstance(panel, wr.BarPlot) else []
