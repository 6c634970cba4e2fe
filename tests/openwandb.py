"""A W&B server, openwandb, and servers in front of it that refuse, listen, or store views."""

import base64
import http.server
import json
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from tests.own_environment import program

VERSION = "openwandb==0.5.25"
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
        request = urllib.request.Request(f"{self.url}/{path}", sent)
        request.add_header("Content-Type", "application/json")
        credentials = base64.b64encode(f"api:{KEY}".encode()).decode()
        request.add_header("Authorization", f"Basic {credentials}")
        with urllib.request.urlopen(request, timeout=10) as answer:
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


def forward(
    handler: http.server.BaseHTTPRequestHandler, upstream: str, body: bytes | None
) -> tuple[int, bytes]:
    """Forward a handler's request to another server; return the status and body of its answer."""
    request = urllib.request.Request(upstream + handler.path, body, method=handler.command)
    for name in ("Authorization", "Content-Type", "Content-Encoding"):
        if name in handler.headers:
            request.add_header(name, handler.headers[name])
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class ListeningHandler(http.server.BaseHTTPRequestHandler):
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
