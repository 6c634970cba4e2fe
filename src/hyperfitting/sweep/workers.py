"""Worker processes on this machine that execute one run after the other.

Workers are spawned, so that memory that one leaks is freed when it exits, and one that the system
kills leaves the others running: its run is repeated, up to `hydra.sweeper.max_attempts` times.
"""

import logging
import multiprocessing as mp
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import cloudpickle
from hydra.core.singleton import Singleton

from hyperfitting.runtime import preemption
from hyperfitting.runtime.preemption import Preempted
from hyperfitting.runtime.processes import (
    child_environment,
    exit_with_parent,
    thread_env,
    visible_gpus,
)
from hyperfitting.sweep.config import HydraSetup
from hyperfitting.sweep.jobs import compose_job, execute_job
from hyperfitting.sweep.state import RunFolder

LOG_FILE = "workers.log"
log = logging.getLogger(__name__)
_JOIN_SECONDS = 5


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    """Sends a job's number and overrides; receives the number when the job has ended."""
    job: int | None = None
    """Index of the job that it executes; None: idle."""


def run_with_workers(
    workers: int, hydra: HydraSetup, jobs: Sequence[Sequence[str]], first: int = 0
) -> None:
    """Execute runs in worker processes; return when all have ended.

    Args:
        workers: number of processes, at least 1.
        hydra: what Hydra passed to the launcher.
        jobs: overrides of each run.
        first: number of the first job.
    """
    # Hydra's objects contain functions, which only cloudpickle can send to another process
    payload = cloudpickle.dumps((hydra, Singleton.get_state()))
    queue = list(range(len(jobs)))
    deaths: Counter[int] = Counter()
    count = min(workers, len(jobs))
    environments = worker_environments(count)
    with _pool(payload, environments) as pool:
        while queue or any(worker.job is not None for worker in pool):
            for worker in pool:
                if worker.job is None and queue:
                    worker.job = queue.pop(0)
                    with suppress(OSError):  # it has died, which is handled below
                        worker.connection.send((first + worker.job, list(jobs[worker.job])))
            wait([worker.connection for worker in pool if worker.job is not None])
            for index, worker in enumerate(pool):
                if worker.job is None or not worker.connection.poll():
                    continue
                job, worker.job = worker.job, None
                if _has_completed(worker):
                    continue
                deaths[job] += 1
                if deaths[job] < hydra.config.hydra.sweeper.max_attempts:
                    queue.insert(0, job)
                else:
                    _run_folder(hydra, jobs[job]).mark_failed(deaths[job])
                pool[index] = _start(payload, environments[index])


@contextmanager
def _pool(payload: bytes, environments: Sequence[dict[str, str]]) -> Iterator[list[_Worker]]:
    """Run a worker in each environment; the caller replaces those that die."""
    pool = [_start(payload, environment) for environment in environments]
    try:
        yield pool
    except Preempted:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:  # without a timeout: they write their checkpoints
            worker.process.join()
        raise
    finally:
        for worker in pool:
            worker.connection.close()
            worker.process.join(timeout=_JOIN_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()


def _has_completed(worker: _Worker) -> bool:
    """Return whether a worker has completed its job; if not, it has died."""
    try:
        worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        return False
    return True


def parallel_seconds(durations: Sequence[float], workers: int) -> float:
    """Return how long runs take that ``workers`` divide between them: at least the longest."""
    return max(sum(durations) / workers, max(durations, default=0.0))


def warn_of_shared_gpus(n_jobs: int) -> None:
    """Log that joblib's processes share a GPU. ``n_jobs``: how many; negative: one per core."""
    if n_jobs != 1 and visible_gpus():
        log.warning(
            "joblib's processes all train on the first GPU; hydra/launcher=workers gives each "
            "worker its own"
        )


def worker_environments(count: int) -> list[dict[str, str]]:
    """Return the environment variables of each of ``count`` workers.

    Several workers divide the CPU cores and the visible GPUs between them, one GPU each; if there
    are fewer GPUs than workers, some share one.
    """
    if count == 1:
        return [{}]
    threads = thread_env(max(1, (os.cpu_count() or 1) // count))
    gpus = visible_gpus()
    if 0 < len(gpus) < count:
        log.warning(
            "%d workers share %d GPU%s: runs that train there at the same time may run out of its "
            "memory (hydra.launcher.workers=%d)",
            count,
            len(gpus),
            "s" * (len(gpus) > 1),
            len(gpus),
        )
    return [
        threads | ({"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {})
        for index in range(count)
    ]


def _start(payload: bytes, environment: dict[str, str]) -> _Worker:
    """Start a worker."""
    spawn = mp.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, payload, os.getpid()), daemon=True)
    with child_environment(environment):
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(connection: Connection, payload: bytes, parent_pid: int) -> None:
    """Execute jobs as they arrive, until the connection is closed."""
    hydra, singletons = cloudpickle.loads(payload)
    _redirect_output(Path(hydra.config.hydra.sweep.dir) / LOG_FILE)
    exit_with_parent(parent_pid)
    Singleton.set_state(singletons)
    preemption.install_handlers()
    with suppress(EOFError, KeyboardInterrupt, Preempted, BrokenPipeError):
        while True:
            number, overrides = connection.recv()
            execute_job(hydra, number, overrides)
            connection.send(number)


def _redirect_output(path: Path) -> None:
    """Append the output of this process to a file: the terminal shows the whole sweep."""
    with path.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())


def _run_folder(hydra: HydraSetup, overrides: Sequence[str]) -> RunFolder:
    composed = compose_job(hydra, 0, overrides)
    return RunFolder(Path(composed.hydra.sweep.dir) / composed.hydra.sweep.subdir)
