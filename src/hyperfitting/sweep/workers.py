"""Processes of this machine that take one member after the other.

Each is new (`spawn`), so that what one leaves in memory is gone when it ends, and one that the
system kills takes nobody with it: its member is begun again, a few times.
"""

import multiprocessing as mp
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import cloudpickle
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import run_job
from omegaconf import DictConfig, open_dict

from hydra_plugins.hyperfitting_members import Hydra
from hyperfitting import preemption
from hyperfitting.errors import UserError
from hyperfitting.preemption import Preempted
from hyperfitting.sweep.state import Folder

LOG = "workers.log"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Worker:
    process: BaseProcess
    line: Connection
    """Numbers of members go in; they come back when done."""
    job: int | None = None


def run(workers: int, hydra: Hydra, jobs: Sequence[Sequence[str]], first: int = 0) -> None:
    """Run members, ``workers`` at once; return when all have ended.

    Args:
        workers: processes.
        hydra: what it gave the launcher.
        jobs: overrides of each member.
        first: number of the first.

    Raises:
        UserError: there are to be fewer workers than one.
    """
    if workers < 1:
        raise UserError(
            "out of range", field="hydra.launcher.workers", value=workers, valid="1 or more"
        )
    # Hydra's objects hold functions, which only cloudpickle can send to a process of our own
    sent = cloudpickle.dumps((hydra, Singleton.get_state()))
    waiting = list(range(len(jobs)))
    killed = dict.fromkeys(waiting, 0)
    count = min(workers, len(jobs))
    with _at_work(sent, count) as running:
        while waiting or any(worker.job is not None for worker in running):
            for worker in running:
                if worker.job is None and waiting:
                    worker.job = waiting.pop(0)
                    with suppress(OSError):  # it has died: seen below
                        worker.line.send((first + worker.job, list(jobs[worker.job])))
            busy = [worker for worker in running if worker.job is not None]
            wait([worker.line for worker in busy])
            for number, worker in enumerate(running):
                if worker.job is None or not worker.line.poll():
                    continue
                job, worker.job = worker.job, None
                if _has_answered(worker):
                    continue
                killed[job] += 1
                if killed[job] < hydra.config.hydra.sweeper.attempts:
                    waiting.insert(0, job)
                else:
                    _folder(hydra, jobs[job]).give_up(killed[job])
                running[number] = _begin(sent, count)


@contextmanager
def _at_work(sent: bytes, count: int) -> Iterator[list[_Worker]]:
    """Have ``count`` workers in this context. (Who uses it may replace some.)"""
    running = [_begin(sent, count) for _ in range(count)]
    try:
        yield running
    except Preempted:
        for worker in running:
            worker.process.terminate()
        for worker in running:  # they write their checkpoints
            worker.process.join()
        raise
    finally:
        for worker in running:
            worker.line.close()
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()


def _has_answered(worker: _Worker) -> bool:
    """Return whether a worker says that it is done; if not, it has died."""
    try:
        worker.line.recv()
    except (EOFError, OSError):
        worker.process.join()
        return False
    return True


def _begin(sent: bytes, workers: int) -> _Worker:
    spawn = mp.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, sent), daemon=True)
    with _threads(max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None):
        process.start()
    theirs.close()
    return _Worker(process, ours)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """Have processes that begin in this context use so many threads, unless the user says else.

    The libraries read these variables when they are loaded: later would be too late for some.
    """
    new = [] if n is None else [name for name in THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(new, str(n)))
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def _work(line: Connection, sent: bytes) -> None:
    """Run members as they come, until there are no more."""
    hydra, singletons = cloudpickle.loads(sent)
    _write_to(Path(hydra.config.hydra.sweep.dir) / LOG)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    Singleton.set_state(singletons)
    preemption.listen()
    with suppress(EOFError, KeyboardInterrupt, Preempted, BrokenPipeError):
        while True:
            number, overrides = line.recv()
            run_member(hydra, number, overrides)
            line.send(number)


def _write_to(path: Path) -> None:
    """Have whatever this process prints written to a file: the terminal shows the whole sweep."""
    with path.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())


def _die_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def load(hydra: Hydra, number: int, overrides: Sequence[str]) -> DictConfig:
    """Return the composed config of one member."""
    loaded: DictConfig = hydra.context.config_loader.load_sweep_config(
        hydra.config, list(overrides)
    )
    with open_dict(loaded):
        loaded.hydra.job.id = loaded.hydra.job.num = number
    return loaded


def run_member(hydra: Hydra, number: int, overrides: Sequence[str]) -> None:
    """Run one member as Hydra does; the task says in its folder how it ended."""
    HydraConfig.instance().set_config(hydra.config)
    run_job(
        task_function=hydra.task,
        config=load(hydra, number, overrides),
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=hydra.context,
    )


def _folder(hydra: Hydra, overrides: Sequence[str]) -> Folder:
    loaded = load(hydra, 0, overrides)
    return Folder(Path(loaded.hydra.sweep.dir) / loaded.hydra.sweep.subdir)
