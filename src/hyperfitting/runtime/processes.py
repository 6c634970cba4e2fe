"""Subprocesses: ending together with the parent, and the number of threads that they use."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Read by the numerical libraries when they are loaded, so they are set before a process starts."""
_POLL_SECONDS = 0.5


def exit_with_parent(parent_pid: int | None = None) -> None:
    """End this process as soon as its parent has ended, whatever it is waiting for.

    Args:
        parent_pid: pid of the parent, passed by it: it may have ended before this call. None:
            the present parent.
    """
    expected = os.getppid() if parent_pid is None else parent_pid

    def watch() -> None:
        while os.getppid() == expected:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def thread_env(n: int | None) -> dict[str, str]:
    """Return the environment variables that give a subprocess ``n`` threads.

    Args:
        n: threads; none: no variables.

    Returns:
        Without the variables that the user has set already.
    """
    if n is None:
        return {}
    return {name: str(n) for name in THREAD_VARIABLES if name not in os.environ}


@contextmanager
def child_threads(n: int | None) -> Iterator[None]:
    """Give processes that start inside this context ``n`` threads, as `thread_env` does.

    For process APIs that take no environment, such as `multiprocessing`.
    """
    variables = thread_env(n)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
