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
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb

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

    def read(self, path: str) -> str:
        request = urllib.request.Request(f"{self.url}/{path}")  # noqa: S310 (our own server)
        credentials = base64.b64encode(f"api:{KEY}".encode()).decode()
        request.add_header("Authorization", f"Basic {credentials}")
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 (our own server)
            return str(answer.read().decode())

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def runs(self) -> dict[str, dict[str, Any]]:
        found = self.get("api/v2/projects/default/hyperfitting/runs")["runs"]
        return {run["run_id"]: run for run in found}

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
    return Identity("member", folder, compose("preset=debug"), {"model": "m"}, "s")


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
