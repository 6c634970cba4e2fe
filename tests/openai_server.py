"""A server on 127.0.0.1 that speaks OpenAI's chat completions, with faults that a test scripts."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str], str]
"""From the prompt to the answer's text."""


@dataclass
class Fault:
    """What happens to one request instead of the right answer, or on top of it."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """The answer's body instead of the right one."""
    send_bytes: int | None = None
    """The connection is closed after so many bytes of the body; -1: before the status."""
    seconds: float = 0.0
    """How long the answer takes."""
    finish_reason: str = "stop"


class OpenAIServer(ThreadingHTTPServer):
    """The server. ``requests`` are the bodies that came, ``times`` when, ``keys`` with which key.

    Args:
        reply: answers the last message.
    """

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.faults: deque[Fault] = deque()
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str] = []
        self.usage: dict[str, int] | None = {"prompt_tokens": 100, "completion_tokens": 10}
        self.delay = 0.0
        """Of every answer, in seconds."""
        self.most_at_once = self._at_once = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def prompts(self) -> list[str]:
        """Return the prompts that came, with what was added to them."""
        return ["\n".join(m["content"] for m in r["messages"]) for r in self.requests]

    @contextmanager
    def counted(self) -> Iterator[Fault]:
        """Count a request among those at once; yield its fault."""
        with self.lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.faults.popleft() if self.faults else Fault()
        try:
            yield fault
        finally:
            with self.lock:
                self._at_once -= 1

    def completion(self, body: dict[str, Any], finish_reason: str) -> bytes:
        """Return the right answer."""
        message = {"role": "assistant", "content": self.reply(body["messages"][-1]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        usage = self.usage and self.usage | {"total_tokens": sum(self.usage.values())}
        return json.dumps(answer | {"choices": [choice], "usage": usage}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OpenAIServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.counted() as fault:
            with server.lock:
                server.requests.append(body)
                server.times.append(time.monotonic())
                server.keys.append(self.headers["Authorization"])
            time.sleep(server.delay + fault.seconds)
            content = fault.body
            if content is None:
                content = server.completion(body, fault.finish_reason)
        if fault.send_bytes == -1:
            self.close_connection = True
            return
        try:
            self.send_response(fault.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in fault.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: fault.send_bytes])
        except OSError:  # the client has given up
            self.close_connection = True
        if fault.send_bytes is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(reply: Reply) -> Iterator[OpenAIServer]:
    """Yield a server that runs."""
    with OpenAIServer(reply) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
