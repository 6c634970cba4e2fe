"""W&B's real SDK against a real server: openwandb over loopback, in an environment of its own."""

import base64
import http.server
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

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
from tests.own_environment import program
from tests.records import make_predictions
from tests.test_tracking import RECORD, ROWS, make_run_record

pytestmark = pytest.mark.server  # installs the server
VERSION = "openwandb==0.5.25"
LOGGER = "hyperfitting.tracking.wandb_run"
KEY = "local" + "0" * 40


class Server:
    """A W&B server that can be killed, and restarted on its data."""

    def __init__(self, data: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._data = f"http://127.0.0.1:{self.port}", data
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["serve", "--host", "127.0.0.1", "-p", str(self.port), "--data-dir"]
        with (self._data.parent / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(program("openwandb", VERSION)), *arguments, str(self._data)],
                stdout=log,
                stderr=log,
            )
        for _ in range(300):
            try:
                self.get("api/v2/projects")
                return
            except (OSError, ValueError):
                time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def read(self, path: str, sent: bytes | None = None) -> str:
        request = urllib.request.Request(f"{self.url}/{path}", sent)  # noqa: S310 (our own server)
        request.add_header("Content-Type", "application/json")
        credentials = base64.b64encode(f"api:{KEY}".encode()).decode()
        request.add_header("Authorization", f"Basic {credentials}")
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 (our own server)
            return str(answer.read().decode())

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def runs(self) -> dict[str, dict[str, Any]]:
        runs = self.get("api/v2/projects/default/hyperfitting/runs")["runs"]
        return {run["run_id"]: run for run in runs}

    def tags(self, run: str) -> list[str]:
        """Return a run's tags."""
        query = f"""{{project(name: "hyperfitting", entityName: "default")
            {{run(name: "{run}") {{tags}}}}}}"""
        answer = json.loads(self.read("graphql", json.dumps({"query": query}).encode()))
        return list(answer["data"]["project"]["run"]["tags"])

    def history(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """Return by key the steps and values of a run."""
        metrics = self.get(f"api/v2/runs/{run}/metrics")["metrics_by_key"]
        return {
            key: sorted((point["step"], point["value"]) for point in points)
            for key, points in metrics.items()
        }

    def file(self, run: str, name: str) -> str:
        return self.read(f"files/default/hyperfitting/{run}/{name}")

    def files(self, run: str) -> list[str]:
        return [file["name"] for file in self.get(f"api/v1/runs/{run}/files")["files"]]


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


class _RefusingHandler(http.server.BaseHTTPRequestHandler):
    """Answers every request with one status, or never."""

    status: int | None = None

    def do_POST(self) -> None:
        if self.status is None:
            time.sleep(60)
            return
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "no"}]}')

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def refusing(status: int | None) -> Iterator[str]:
    handler = type("Handler", (_RefusingHandler,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


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


def forward(
    handler: http.server.BaseHTTPRequestHandler, upstream: str, body: bytes | None
) -> tuple[int, bytes]:
    """Forward a handler's request to another server; return the status and body of its answer."""
    request = urllib.request.Request(upstream + handler.path, body, method=handler.command)  # noqa: S310
    for name in ("Authorization", "Content-Type", "Content-Encoding"):
        if name in handler.headers:
            request.add_header(name, handler.headers[name])
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class _ListeningHandler(http.server.BaseHTTPRequestHandler):
    """Forwards every request to the real server, and keeps those that start a run."""

    started: ClassVar[list[dict[str, Any]]]
    upstream: ClassVar[str]

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        if self.path.endswith("graphql") and b"upsertBucket" in (body or b""):
            self.started.append(json.loads(body or b"")["variables"])
        status, content = forward(self, self.upstream, body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _forward

    def log_message(self, *_: object) -> None:
        pass


def test_group_and_job_type_are_sent_to_the_server(
    server: Server, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read from the request: openwandb has no query for them."""
    started: list[dict[str, Any]] = []
    handler = type("Handler", (_ListeningHandler,), {"started": started, "upstream": server.url})
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


class _ViewsHandler(http.server.BaseHTTPRequestHandler):
    """Stores views as W&B does, and forwards all other requests to the real server."""

    views: ClassVar[dict[str, dict[str, Any]]]
    upstream: ClassVar[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        query, variables = request.get("query", ""), request.get("variables", {})
        if "upsertView" in query:
            view = self._store(variables)
            answer = {"data": {"upsertView": {"view": view, "inserted": not variables.get("id")}}}
        elif "allViews" in query:
            views = [v for v in self.views.values() if v["name"] == variables["viewName"]]
            edges = [{"node": view} for view in views]
            answer = {"data": {"project": {"allViews": {"edges": edges}}}}
        elif "ProjectInternalId" in query:
            internal = base64.b64encode(b"ProjectInternalId:1").decode()
            answer = {"data": {"project": {"id": "1", "internalId": internal}}}
        elif "models(" in query:
            node = {
                "__typename": "Project", "id": "1", "name": "hyperfitting", "isBenchmark": False,
                "entityName": "default", "createdAt": "2026-01-01T00:00:00", "user": None,
            }  # fmt: skip
            last = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            answer = {"data": {"models": {"pageInfo": last, "edges": [{"node": node}]}}}
        elif "SpecificReport" in query:
            answer = {"data": {"view": self.views.get(variables["reportId"])}}
        else:
            # openwandb rejects an empty operation name
            named = {k: v for k, v in request.items() if (k, v) != ("operationName", "")}
            self._answer(*forward(self, self.upstream, json.dumps(named).encode()))
            return
        self._answer(200, json.dumps(answer).encode())

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def _store(self, variables: dict[str, Any]) -> dict[str, Any]:
        key = variables.get("id") or base64.b64encode(f"View:{len(self.views)}".encode()).decode()
        project = {
            "id": "1",
            "name": variables["projectName"],
            "entityName": variables["entityName"],
        }
        when = "2026-01-01T00:00:00"
        self.views[key] = {
            **{k: variables.get(k) for k in ("name", "displayName", "description", "spec", "type")},
            "id": key, "project": project, "createdAt": when, "updatedAt": when,
        }  # fmt: skip
        return self.views[key]

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def storing_views(upstream: str) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    views: dict[str, dict[str, Any]] = {}
    handler = type("Handler", (_ViewsHandler,), {"views": views, "upstream": upstream})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", views
        server.shutdown()


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
