"""Servers to test against, each in a virtual environment of its own: none is a dependency."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def program(name: str, *requirements: str) -> Path:
    """Return a program, installed in `.venv-NAME` of the checkout at its first use."""
    environment = CHECKOUT / f".venv-{name}"
    path = environment / "bin" / name
    if not path.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(environment / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*pip, *requirements], check=True)
    return path


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], folder: Path, url: str, timeout: float = 600, **environment: str
) -> Iterator[None]:
    """Run a server in a folder, from when its address answers; with a home of its own.

    Args:
        command: that starts it.
        folder: its working folder; `server.log` has its output.
        url: that answers when it is ready.
        timeout: seconds to wait for that.
        environment: further variables.
    """
    kept = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=kept | environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + timeout
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                with urllib.request.urlopen(url, timeout=5):
                    break
            except OSError:
                time.sleep(0.3)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
