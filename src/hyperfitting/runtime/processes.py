"""Processes: ranks, ending together with the parent, and the threads and GPUs that they use."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Read by the numerical libraries when they are loaded, so they are set before a process starts."""
_CUDA_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # of Linux, of WSL
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


def is_distributed() -> bool:
    """Return whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_worker_rank() -> bool:
    """Return whether this process is a rank above 0."""
    return is_distributed() and int(os.environ["RANK"]) > 0


def limit_spinning() -> None:
    """Let idle OpenMP threads sleep soon, in this process and those that it starts.

    By default libgomp's threads spin for long between parallel regions. Two trainings of two
    threads each on two cores then take 2.4 times as long as with this number of iterations, which
    costs a single training nothing (docs/speed.md). Called before torch loads libgomp; what the
    user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


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


def visible_gpus() -> list[str]:
    """Return the CUDA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Indices, UUIDs (`GPU-…`) or MIG instances (`MIG-…`). No CUDA context is created, and torch is
    imported only where there is a driver.
    """
    if not any(driver.exists() for driver in _CUDA_DRIVERS):
        return []
    import torch

    n_gpus = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(index) for index in range(n_gpus)]
    return [name.strip() for name in listed.split(",")][:n_gpus]  # CUDA stops at an invalid name


@contextmanager
def child_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Give processes that start inside this context environment variables.

    For process APIs that take no environment, such as `multiprocessing`.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
