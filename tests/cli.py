"""The command line in processes of its own: forks, which start at once, and the installed script.

Importing torch and transformers takes five times as long as the debug run. So a server process
(that of `multiprocessing`) imports everything once, and each command is a fork of it: a real
process with its own environment, working folder, output and signals, which can be killed.
What a fork cannot show, such as output while importing, is tested with `installed`.

A command on the debug preset finds what does not depend on a tuning (the base model, its texts and
outputs) in its store, as the second run of a user does: half of the work of a debug run. Tests of
how these come about, or of how much is built, begin with an empty store (``from_nothing=True``).
"""

import atexit
import functools
import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import util
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from hydra.core.singleton import Singleton

import hyperfitting

_server = multiprocessing.get_context("forkserver")
_src = Path(hyperfitting.__path__[0]).parent
_modules = [
    ".".join(path.relative_to(_src).with_suffix("").parts)
    for path in sorted(_src.glob("hyperfitting/**/*.py"))
    # but wandb: when it is imported it makes a folder that each process deletes when it ends
    if path.name not in ("__init__.py", "__main__.py") and path.parent.name != "tracking"
]
_server.set_forkserver_preload(
    [*_modules, "transformers.tokenization_utils_tokenizers", "tests.cli"]
)
_start_interpreter: Any = util.spawnv_passfds


def environment(**more: str) -> dict[str, str]:
    """A user's environment without W&B login or Hub token, single-threaded, buffered."""
    removed = ("WANDB", "HF_", "HYDRA", "PYTHONUNBUFFERED")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(removed)}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def command(*arguments: str) -> list[str]:
    """Return the command line of the installed script."""
    return [str(Path(sys.executable).with_name("hyperfit")), *arguments]


def installed(cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the installed script in a folder, as a user does."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def start_in_fork(target: Callable[..., object], *args: Any) -> ForkServerProcess:
    """Call a function of a module in a new process, a fork of the server; return the process."""
    process = _server.Process(target=target, args=args)
    with mock.patch.dict(os.environ, environment(), clear=True):  # that of the server
        process.start()
    return process


class Fork:
    """A command in a fork, with the methods of `subprocess.Popen`; it leads a process group."""

    def __init__(
        self,
        cwd: Path,
        arguments: Sequence[str],
        env: dict[str, str],
        before: Callable[[], object] | None = None,
    ) -> None:
        self._output = tempfile.TemporaryDirectory(prefix="hyperfit-")
        for stream in ("stdout", "stderr"):
            Path(self._output.name, stream).touch()
        self._process = start_in_fork(_run, cwd, list(arguments), env, self._output.name, before)
        self.pid: int = self._process.pid or 0

    def poll(self) -> int | None:
        """Return the exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        """Send a signal to this process alone."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def wait(self, timeout: float = 300) -> int:
        """Return the exit status; after ``timeout`` seconds kill the process group.

        Raises:
            TimeoutError: it took longer.
        """
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            self.kill_group()
            raise TimeoutError(self._read("stderr"))
        return status

    def wait_until(self, condition: Callable[[], object], timeout: float = 300) -> None:
        """Wait until a condition holds, which must happen before the command ends."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, self._read("stderr")
            assert time.monotonic() < deadline, self._read("stderr")
            time.sleep(0.005)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait; return what it has written to stdout and stderr."""
        self.wait(timeout)
        return self._read("stdout"), self._read("stderr")

    def kill_group(self) -> None:
        """Kill the process and those that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    def _read(self, stream: str) -> str:
        return Path(self._output.name, stream).read_text()


_started: list[Fork] = []


@functools.cache
def _base_outputs() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder whose store has what a debug run without a tuning builds."""
    folder = tempfile.TemporaryDirectory(prefix="hyperfit-base-")
    fork = Fork(Path(folder.name), ["preset=debug", "tuning=none"], environment())
    assert fork.wait() == 0, fork.communicate()[1]
    return folder


def start(
    cwd: Path,
    *arguments: str,
    before: Callable[[], object] | None = None,
    from_nothing: bool = False,
    **more: str,
) -> Fork:
    """Start the command line in a folder, with more environment variables.

    Args:
        cwd: The folder; made if needed.
        arguments: Of the command line.
        before: A function of a module, called in the process before the command.
        from_nothing: Do not put the base model's artifacts into the store of a debug run.
        more: Environment variables.
    """
    cwd.mkdir(exist_ok=True)
    store = cwd / "outputs/store"
    if "preset=debug" in arguments and not from_nothing and not store.exists():
        shutil.copytree(Path(_base_outputs().name, "outputs/store"), store)
    _started.append(Fork(cwd, arguments, environment(**more), before))
    return _started[-1]


def kill_started() -> None:
    """Kill the commands that still run: a test that fails leaves some."""
    while _started:
        _started.pop().kill_group()


def hyperfit(
    cwd: Path,
    *arguments: str,
    timeout: float = 300,
    before: Callable[[], object] | None = None,
    from_nothing: bool = False,
    **more: str,
) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a folder to its end, with the arguments of `start`."""
    process = start(cwd, *arguments, before=before, from_nothing=from_nothing, **more)
    stdout, stderr = process.communicate(timeout)
    return subprocess.CompletedProcess(arguments, process.wait(), stdout, stderr)


def below(folder: Path, pattern: str = "*") -> list[Path]:
    """All below a folder in which another process works, whose end matches a pattern.

    (`Path.glob` raises if a folder is renamed while it looks inside.)
    """
    found = [Path(at, name) for at, dirs, files in os.walk(folder) for name in dirs + files]
    return [path for path in found if path.match(pattern)]


def _run(
    cwd: Path,
    arguments: list[str],
    env: dict[str, str],
    output: str,
    before: Callable[[], object] | None,
) -> None:
    """Be the process of a command."""
    from hyperfitting.run import main

    gc.freeze()  # collections would visit, and so copy, every page of the server's imports
    os.setsid()
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_APPEND), fd)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["hyperfit", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)
    util.spawnv_passfds = _fork_interpreter
    try:
        if before is not None:
            before()
        main()
    finally:
        _end_interpreter()


def _fork_interpreter(path: bytes, args: Sequence[str], passfds: Sequence[int]) -> int:
    """Start the process of a `spawn` context: a fork of this one, without what `main` set up."""
    if "--multiprocessing-fork" not in args:
        return int(_start_interpreter(path, args, passfds))
    if pid := os.fork():
        return pid
    status = 1
    try:
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_DFL)
        _redirect_to_null({0, 1, 2, *passfds})
        Singleton._instances = {}
        sys.argv = ["-c", *args[-1:]]
        exec(args[-2], {})  # noqa: S102 - what the interpreter would have executed
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        with suppress(Exception):
            _end_interpreter()
        os._exit(status)


def _end_interpreter() -> None:
    """Do what an interpreter does at its end, in its order: end the threads, then atexit."""
    threading._shutdown()
    atexit._run_exitfuncs()


def _redirect_to_null(kept: set[int]) -> None:
    """Close all files but ``kept``; objects may still close their numbers, which stay taken."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - kept - {null}:
        os.dup2(null, fd)
