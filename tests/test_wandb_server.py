"""W&B's real SDK against a real server (openwandb, in an environment of its own, over loopback)."""

import base64
import http.server
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
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

from hyperfitting import workspace
from hyperfitting.config import TrackingConfig
from hyperfitting.errors import UserError
from hyperfitting.tracking import Identity, sync, tracked, unsent
from tests.conftest import Compose, hyperfit
from tests.test_tracking import RECORD, ROWS

ENVIRONMENT = Path(__file__).parents[1] / ".venv-openwandb"
VERSION = "openwandb==0.5.25"
LOGGER = "hyperfitting.tracking"
KEY = "local" + "0" * 40


def openwandb() -> Path:
    """Return the server's program, installed apart: it is no dependency of anything here."""
    program = ENVIRONMENT / "bin" / "openwandb"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", VERSION]
        subprocess.run(pip, check=True)
    return program


class Server:
    """A W&B server that can be killed and started again on what it has."""

    def __init__(self, data: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._data = f"http://127.0.0.1:{self.port}", data
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["serve", "--host", "127.0.0.1", "-p", str(self.port), "--data-dir"]
        with (self._data.parent / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(openwandb()), *words, str(self._data)], stdout=log, stderr=log
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
        found = self.get("api/v2/projects/default/hyperfitting/runs")["runs"]
        return {run["run_id"]: run for run in found}

    def tags(self, run: str) -> list[str]:
        """Return a run's tags."""
        asked = f"""{{project(name: "hyperfitting", entityName: "default")
            {{run(name: "{run}") {{tags}}}}}}"""
        answer = json.loads(self.read("graphql", json.dumps({"query": asked}).encode()))
        return list(answer["data"]["project"]["run"]["tags"])

    def history(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """Return by key the steps and values of a run."""
        found = self.get(f"api/v2/runs/{run}/metrics")["metrics_by_key"]
        return {
            key: sorted((point["step"], point["value"]) for point in points)
            for key, points in found.items()
        }

    def file(self, run: str, name: str) -> str:
        return self.read(f"files/default/hyperfitting/{run}/{name}")

    def files(self, run: str) -> list[str]:
        return [file["name"] for file in self.get(f"api/v1/runs/{run}/files")["files"]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("openwandb") / "data")
    made.start()
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it has read the environment of the test before


@pytest.fixture
def who(compose: Compose, tmp_path: Path) -> Identity:
    folder = tmp_path / "outputs" / "member"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(RECORD))
    config = compose("preset=debug")
    return Identity("member", folder, config, {"model": "m"}, "s", job_type="member")


def online(who: Identity, **fields: Any) -> Identity:
    tracking = TrackingConfig(**{"mode": "online", "timeout": 20} | fields)
    return replace(who, config=replace(who.config, tracking=tracking))


def track(who: Identity, rows: int = len(ROWS)) -> None:
    with tracked(who) as tracker:
        for row in ROWS[:rows]:
            tracker.row(row)
        tracker.finish(RECORD)
    wandb.teardown()


WHOLE = {
    "train/loss": [(0, 3.0), (1, 2.0)],
    "epoch/train/loss": [(2, 2.5)],
    "epoch/val/loss": [(2, 3.1)],
    "epoch/val/entropy": [(2, 3.0)],
    "epoch/gen/ttr": [(2, 0.4)],
    "epoch": [(2, 1.0)],
    "step": [(0, 1.0), (1, 2.0), (2, 2.0)],
}


def check_whole(server: Server, run: str) -> None:
    assert server.history(run) == WHOLE
    summary = json.loads(server.file(run, "wandb-summary.json"))
    assert (summary["gen/ttr"], summary["gen/ttr_low"]) == (0.6, 0.5)
    files = server.files(run)
    table = next(name for name in files if name.startswith("media/table/texts"))
    held = json.loads(server.file(run, table))
    row = dict(zip(held["columns"], held["data"][0], strict=True))
    assert (row["context"], row["continuation"], row["ttr"]) == ("<script>", "c", 0.6)
    page = next(name for name in files if name.startswith("media/html/texts_coloured"))
    assert "&lt;script&gt;" in server.file(run, page)
    assert "<script>alert" not in server.file(run, page)
    artefacts = server.get(f"api/v2/runs/{run}/artifacts")["artifacts"]
    assert f"record-{run}" in {one["name"] for one in artefacts}


def test_a_sweep_of_three_members_is_read_back_equal_to_its_records(
    server: Server, tmp_path: Path
) -> None:
    done = hyperfit(
        tmp_path, "-m", "preset=debug", "seed=0,1,2", "tracking=online",
        "hydra.sweep.dir=outputs/sweeps/tiny", "tracking.timeout=60",
        WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    members = {
        run["display_name"]: (id_, run)
        for id_, run in server.runs().items()
        if run["display_name"].startswith("seed=")
    }
    assert set(members) == {"seed=0", "seed=1", "seed=2"}
    for name, (run, said) in members.items():
        record = json.loads((tmp_path / "outputs/sweeps/tiny" / name / "results.json").read_text())
        assert said["state"] == "finished"
        assert server.tags(run) == ["tiny"]
        config = {k: v["value"] for k, v in json.loads(said["config_json"]).items()}
        assert config["label"] == {"seed": name.removeprefix("seed=")}
        assert config["choice"]["decode"] == "greedy"
        assert config["dataset"] == record["config"]["dataset"]
        history = server.history(run)
        for key in ("train/loss", "val/loss", "val/entropy", "gen/ttr"):
            values = [value for _, value in history[f"epoch/{key}"]]
            assert values == [row[key] for row in record["history"]]
        assert len(history["train/loss"]) == record["history"][-1]["step"]
        summary = json.loads(server.file(run, "wandb-summary.json"))
        for key, one in record["metrics"].items():
            assert summary[key] == one["mean"]
            if one["ci95"]:
                assert [summary[f"{key}_low"], summary[f"{key}_high"]] == one["ci95"]
        table = next(n for n in server.files(run) if n.startswith("media/table/texts"))
        held = json.loads(server.file(run, table))
        found = [dict(zip(held["columns"], row, strict=True)) for row in held["data"]]
        assert [row["continuation"] for row in found] == [
            sample["continuation"]["text"] for sample in record["samples"]
        ]
        artefacts = server.get(f"api/v2/runs/{run}/artifacts")["artifacts"]
        assert f"record-{run}" in {one["name"] for one in artefacts}
    (drawn,) = [id_ for id_, r in server.runs().items() if r["display_name"] == "tiny report"]
    table = next(n for n in server.files(drawn) if n.startswith("media/table/contexts"))
    held = json.loads(server.file(drawn, table))
    writers = ["original, greedy", "seed=0", "seed=1", "seed=2"]
    assert held["columns"] == ["context", *writers, "as it really goes on"]
    assert len(held["data"]) == len(record["samples"])
    for path in (tmp_path / "outputs").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def killed(who: Identity) -> None:
    """Track the beginning of a run, and die."""
    with tracked(online(who)) as tracker:
        tracker.row(ROWS[0])
        tracker.row(ROWS[1])
        time.sleep(3)  # it may arrive, or not
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_member_that_is_begun_again_goes_on_with_its_run(server: Server, who: Identity) -> None:
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(who,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    track(online(who))
    assert who.id is not None
    check_whole(server, who.id)


def test_offline_then_sync_is_the_same_and_a_second_sync_adds_nothing(
    server: Server, who: Identity
) -> None:
    outputs = who.folder.parent
    track(online(who, mode="offline"), rows=1)  # an attempt that did not get far
    track(online(who, mode="offline"))
    assert sync(outputs) == 1
    assert who.id is not None
    check_whole(server, who.id)
    before = server.runs()[who.id], server.file(who.id, "wandb-history.jsonl")
    assert sync(outputs) == 0
    after = server.runs()[who.id], server.file(who.id, "wandb-history.jsonl")
    assert before[1] == after[1]
    check_whole(server, who.id)


def test_a_server_that_dies_in_the_middle_costs_nothing_and_gets_the_rest_later(
    server: Server, who: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        with tracked(online(who, timeout=4)) as tracker:
            tracker.row(ROWS[0])
            time.sleep(2)
            server.kill()
            for row in ROWS[1:]:
                tracker.row(row)
            tracker.finish(RECORD)
            begun = time.monotonic()
        assert time.monotonic() - begun < 30  # a bound on the wait, not a measurement
        wandb.teardown()
        assert [r.levelname for r in caplog.records if r.name == LOGGER] == ["WARNING"]
        assert "hyperfit-dashboard sync" in caplog.text
        assert len(unsent(who.folder.parent)) == 1
        with pytest.raises(UserError, match="cannot be reached"):
            sync(who.folder.parent)
        assert len(unsent(who.folder.parent)) == 1
    finally:
        server.start()
    assert sync(who.folder.parent) == 1
    assert who.id is not None
    check_whole(server, who.id)
    assert unsent(who.folder.parent) == []


@pytest.mark.parametrize("asked", [True, False])
def test_tuned_parameters_are_sent_only_if_asked(
    server: Server, who: Identity, tmp_path: Path, asked: bool
) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"tuned")
    with tracked(online(who, checkpoint=asked)) as tracker:
        tracker.finish(RECORD | {"artefacts": {"tuned": str(tmp_path)}})
    artefacts = server.get(f"api/v2/runs/{who.id}/artifacts")["artifacts"]
    assert (f"model-{who.id}" in {one["name"] for one in artefacts}) == asked


class _Refuses(http.server.BaseHTTPRequestHandler):
    """Answers everything with one status, or never."""

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
    handler = type("Handler", (_Refuses,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("what", "status"), [("refuses the login", 401), ("is out of quota", 402), ("is slow", None)]
)
def test_a_server_that_does_not_take_it_leaves_a_run_that_syncs(
    server: Server, who: Identity, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, what: str, status: int | None,
) -> None:  # fmt: skip
    with refusing(status) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        wandb.teardown()
        begun = time.monotonic()
        track(online(who, timeout=3))
        assert time.monotonic() - begun < 40, what  # a bound on the wait, not a measurement
    assert [r.levelname for r in caplog.records if r.name == LOGGER] == ["WARNING"]
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    assert sync(who.folder.parent) == 1
    assert who.id is not None
    check_whole(server, who.id)


def passed_on(
    handler: http.server.BaseHTTPRequestHandler, beyond: str, body: bytes | None
) -> tuple[int, bytes]:
    """Return the answer of another server to the request that a handler has got."""
    request = urllib.request.Request(beyond + handler.path, body, method=handler.command)  # noqa: S310
    for name in ("Authorization", "Content-Type", "Content-Encoding"):
        if name in handler.headers:
            request.add_header(name, handler.headers[name])
    try:
        with urllib.request.urlopen(request, timeout=10) as found:  # noqa: S310
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class _Listens(http.server.BaseHTTPRequestHandler):
    """Hands everything to the real server, and keeps what begins a run."""

    begun: ClassVar[list[dict[str, Any]]]
    beyond: ClassVar[str]

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        if self.path.endswith("graphql") and b"upsertBucket" in (body or b""):
            self.begun.append(json.loads(body or b"")["variables"])
        status, words = passed_on(self, self.beyond, body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(words)))
        self.end_headers()
        self.wfile.write(words)

    do_GET = do_POST = do_PUT = _pass_on

    def log_message(self, *_: object) -> None:
        pass


def test_group_and_job_type_are_said_to_the_server(
    server: Server, who: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read on their way there: this server answers no question about them."""
    begun: list[dict[str, Any]] = []
    handler = type("Handler", (_Listens,), {"begun": begun, "beyond": server.url})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.server_port}")
        wandb.teardown()
        track(online(who))
        listener.shutdown()
    assert who.id is not None
    check_whole(server, who.id)
    first = begun[0]
    assert (first["name"], first["groupName"], first["jobType"]) == (who.id, "s", "member")


class _Records(http.server.BaseHTTPRequestHandler):
    """Keeps the views it is sent, as W&B does, and hands all else to the real server."""

    views: ClassVar[dict[str, dict[str, Any]]]
    beyond: ClassVar[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = json.loads(body)
        query, given = asked.get("query", ""), asked.get("variables", {})
        if "upsertView" in query:
            view = self._kept(given)
            answer = {"data": {"upsertView": {"view": view, "inserted": not given.get("id")}}}
        elif "allViews" in query:
            found = [v for v in self.views.values() if v["name"] == given["viewName"]]
            edges = [{"node": view} for view in found]
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
            answer = {"data": {"view": self.views.get(given["reportId"])}}
        else:
            # openwandb does not know that an empty name is none
            named = {k: v for k, v in asked.items() if (k, v) != ("operationName", "")}
            self._answer(*passed_on(self, self.beyond, json.dumps(named).encode()))
            return
        self._answer(200, json.dumps(answer).encode())

    def _answer(self, status: int, words: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(words)

    def _kept(self, given: dict[str, Any]) -> dict[str, Any]:
        key = given.get("id") or base64.b64encode(f"View:{len(self.views)}".encode()).decode()
        project = {"id": "1", "name": given["projectName"], "entityName": given["entityName"]}
        when = "2026-01-01T00:00:00"
        self.views[key] = {
            **{k: given.get(k) for k in ("name", "displayName", "description", "spec", "type")},
            "id": key, "project": project, "createdAt": when, "updatedAt": when,
        }  # fmt: skip
        return self.views[key]

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def recording(beyond: str) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    views: dict[str, dict[str, Any]] = {}
    handler = type("Handler", (_Records,), {"views": views, "beyond": beyond})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", views
        server.shutdown()


def test_the_dashboard_is_sent_once_and_made_again_in_place(
    server: Server, who: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    track(online(who))  # a project that has a run
    with recording(server.url) as (url, views):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        wandb.teardown()
        first = workspace.build(None, "hyperfitting", tmp_path)
        assert sorted(view["type"] for view in views.values()) == ["project-view", "runs"]
        sent = {key: view["spec"] for key, view in views.items()}
        second = workspace.build(None, "hyperfitting", tmp_path)
    assert first == second
    assert len(views) == 2
    for view in views.values():
        for section in workspace.SECTIONS:
            assert section.name in view["spec"]
        for name in ("choice.value.model", "epoch/val/loss", "texts_coloured"):
            assert name in view["spec"]
    for key, spec in sent.items():
        assert spec.count('"viewType"') == views[key]["spec"].count('"viewType"') > 10


def test_every_panels_metric_is_in_a_real_run(server: Server, tmp_path: Path) -> None:
    done = hyperfit(
        tmp_path, "preset=debug", "tracking=online", "hydra.run.dir=run", "tracking.timeout=60",
        "tracking.project=panels", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = server.get("api/v2/projects/default/panels/runs")["runs"]
    place = f"files/default/panels/{run['run_id']}"
    lines = server.read(f"{place}/wandb-history.jsonl").splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    summary = set(json.loads(server.read(f"{place}/wandb-summary.json")))
    for section in workspace.SECTIONS:
        for panel in section.panels():
            assert set(history_of(panel)) <= logged, section.name
            assert set(summary_of(panel)) <= summary, section.name
    config = {k: v["value"] for k, v in json.loads(run["config_json"]).items()}
    assert {"model", "dataset", "tuning", "decode"} <= set(config["choice"])


def history_of(panel: Any) -> list[str]:
    """Return the keys of the history that a panel draws."""
    if isinstance(panel, wr.LinePlot):
        return [panel.x, *panel.y]
    if isinstance(panel, wr.MediaBrowser):
        return list(panel.media_keys)
    return [panel.table_name] if isinstance(panel, wr.WeavePanelSummaryTable) else []


def summary_of(panel: Any) -> list[str]:
    """Return the summary metrics that a panel draws."""
    if isinstance(panel, wr.ScatterPlot):
        return [panel.x.name, panel.y.name]
    return list(panel.metrics) if isinstance(panel, wr.BarPlot) else []
