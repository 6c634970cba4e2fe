"""A server on 127.0.0.1 that speaks the Hub's protocol, with faults that a test switches on.

It serves what `huggingface_hub` asks for: information on a repository, its tree, and its files.
Weights and tables are LFS objects on another host (`localhost`, not `127.0.0.1`), as on the Hub. It
also takes uploads by the LFS protocol (not Xet's): a new repository, its objects, and a commit.
"""

import json
import re
import socket
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from yaml import safe_load

_LFS = (".safetensors", ".bin", ".pt", ".parquet")
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree)/([^/?]+))?")
_UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
_LFS_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


Answer = tuple[int, dict[str, str], bytes]
"""HTTP status, headers and body."""


@dataclass
class Fault:
    """What happens to requests instead of, or on top of, the right answer."""

    request: str
    """Regular expression that is searched in "METHOD PATH"."""
    status: int = 0
    """The answer's HTTP status; 0: the right answer."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of the answer, or all besides its length if ``status`` is given."""
    body: bytes | None = None
    """The answer's body instead of the right one."""
    send_bytes: int | None = None
    """The connection is closed after so many bytes of the body."""
    times: int = 1_000_000
    """How many requests it happens to."""


@dataclass
class Repository:
    """The files of each commit, and which commit each branch or tag is."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    visibility: str = "public"


class HubServer(ThreadingHTTPServer):
    """The Hub. ``requests`` are those that came, as "METHOD PATH", with their headers.

    Names of headers are in lower case.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Uploaded LFS objects, by SHA-256."""
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.is_silent = False
        """Connections are accepted, and nothing is answered."""
        self.connections: list[socket.socket] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def push(
        self, kind: str, name: str, files: dict[str, bytes | str], branch: str = "main"
    ) -> str:
        """Commit files to a repository (`models` or `datasets`); return the commit."""
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository())
        content = {p: f.encode() if isinstance(f, str) else f for p, f in files.items()}
        commit = _git_sha1(repr((name, len(repository.commits), sorted(content))).encode())
        repository.commits[commit] = content
        repository.refs[branch] = commit
        return commit

    def fail(self, request: str, status: int = 0, **fault: Any) -> None:
        """Switch a fault on."""
        self.faults.append(Fault(request, status, **fault))

    def seen(self, request: str) -> int:
        """Return how many requests matched a regular expression."""
        return sum(bool(re.search(request, line)) for line, _ in self.requests)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        if not self.is_silent:
            super().process_request(request, client_address)

    def stop(self) -> None:
        """Die: refuse connections, and close those that are open."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, path: str) -> Answer:
        """Return the right answer."""
        if match := _API.fullmatch(path):
            return self._information(*match.groups())
        if match := _RESOLVE.fullmatch(path):
            return self._file(*match.groups())
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if path == f"/cdn/{sha256(content).hexdigest()}":
                        return 200, {}, content
        return 404, {}, b""

    def take(self, path: str, body: bytes) -> Answer:
        """Return the answer to what a client sends."""
        if path.startswith("/upload/"):
            self.objects[sha256(body).hexdigest()] = body
            return 200, {}, b""
        if match := _UPLOAD.fullmatch(path):
            return (
                self._preupload(body)
                if match[2] == "preupload"
                else self._commit_files(match[1], body)
            )
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if _LFS_BATCH.fullmatch(path):
            return _json({"objects": [self._upload_action(o) for o in json.loads(body)["objects"]]})
        is_card = path == "/api/validate-yaml"
        return _validate(json.loads(body)["content"]) if is_card else (404, {}, b"")

    def _create(self, asked: dict[str, Any]) -> Answer:
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        status = 409 if f"models/{name}" in self.repositories else 200
        visibility = asked.get("visibility", "public")
        self.repositories.setdefault(f"models/{name}", Repository(visibility=visibility))
        return _json({"url": f"{self.url}/{name}"}, status)

    @staticmethod
    def _preupload(body: bytes) -> Answer:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {p: "lfs" if p.endswith(_LFS) else "regular" for p in paths}
        return _json(
            {"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]}
        )

    def _upload_action(self, item: dict[str, Any]) -> dict[str, Any]:
        href = f"http://localhost:{self.server_port}/upload/{item['oid']}"
        return item | {"actions": {"upload": {"href": href}}}

    def _commit_files(self, name: str, body: bytes) -> Answer:
        files: dict[str, bytes | str] = {}
        for line in body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        commit = self.push("models", name, files)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})

    def _information(self, kind: str, name: str, what: str | None, revision: str | None) -> Answer:
        repository = self.repositories.get(f"{kind}/{name}")
        if repository is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = self._commit(repository, unquote(revision or "main"))
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = repository.commits[commit]
        answer: Any = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
        if what == "tree":
            answer = [_tree_entry(path, content) for path, content in files.items()]
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def _file(self, prefix: str | None, name: str, revision: str, file: str) -> Answer:
        repository = self.repositories.get(f"{prefix or 'models/'}{name}") or Repository()
        commit = self._commit(repository, unquote(revision)) or ""
        content = repository.commits.get(commit, {}).get(unquote(file))
        headers = {"X-Repo-Commit": commit}
        if content is None:
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b""
        if not file.endswith(_LFS):
            return 200, headers | {"ETag": f'"{_git_sha1(content)}"'}, content
        digest = sha256(content).hexdigest()
        headers["Location"] = f"http://localhost:{self.server_port}/cdn/{digest}"
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return 302, headers, b""

    @staticmethod
    def _commit(repository: Repository, revision: str) -> str | None:
        return revision if revision in repository.commits else repository.refs.get(revision)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self._respond(self.server.answer)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._read_body()
        self._respond(lambda path: self.server.take(path, body))

    do_PUT = do_POST

    def _read_body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):  # chunked
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _respond(self, answer: Callable[[str], Answer]) -> None:
        path = urlsplit(self.path).path
        line = f"{self.command} {path}"
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((line, headers))
        status, headers, body = answer(path)
        fault = next(
            (f for f in self.server.faults if f.times > 0 and re.search(f.request, line)), Fault("")
        )
        fault.times -= 1
        if fault.status:
            headers, body = {}, b""
        status, body = fault.status or status, body if fault.body is None else fault.body
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and status == 200:
            size, body, status = len(body), body[int(start[1]) :], 206
            headers["Content-Range"] = f"bytes {start[1]}-{size - 1}/{size}"
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers | fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: fault.send_bytes])
            if fault.send_bytes is not None:
                self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run the server in a thread."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def _validate(card: str) -> Answer:
    """Refuse a README.md whose `base_model` is no id of a model, as the Hub does."""
    base = safe_load(card.split("---")[1]).get("base_model", "any/model")
    problem = f'"base_model" with value "{base}" is not valid. Use a model id from …'
    return _json({}) if base.count("/") == 1 else _json({"errors": [{"message": problem}]}, 400)


def _json(value: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _git_sha1(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
    if path.endswith(_LFS):
        digest = sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\n"
        entry["oid"] = _git_sha1(pointer.encode())
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": len(pointer)}
    return entry
