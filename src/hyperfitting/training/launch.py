"""Training in several processes of this machine: starts the ranks, follows and supervises them.

The ranks are subprocesses with torchrun's environment, started by torch's own API; this process
hosts their rendezvous store, as torchrun's agent does. It does not train: it follows
`history.jsonl`, forwards preemption signals, and ends all ranks when one has died.
"""

import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import TimeoutExpired

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SignalException,
    Std,
    SubprocessContext,
    start_processes,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from hyperfitting.data.sequences import load_sequences
from hyperfitting.errors import UserError
from hyperfitting.progress import Advance, MetricsRow, ProgressReporter
from hyperfitting.runtime import preemption
from hyperfitting.runtime.files import write_json
from hyperfitting.runtime.preemption import Preempted
from hyperfitting.runtime.processes import thread_env
from hyperfitting.training import history
from hyperfitting.training.batches import steps_per_epoch, tokens_between
from hyperfitting.training.train import log_epoch
from hyperfitting.training.worker import TrainingTask

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.1
_SECONDS_TO_FAIL = 10.0
"""In which the other ranks notice that one has died, and record their own errors."""
_TORCH_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""`start_processes` replaces their handlers."""

log = logging.getLogger(__name__)


def launch(task: TrainingTask, n: int, progress: ProgressReporter) -> Iterator[MetricsRow]:
    """Train in ``n`` processes of this machine; yields what `train` yields.

    Raises:
        Preempted: a signal was received; a checkpoint is written.
        UserError: a rank has died, or raised one.
    """
    trainer, shape = task.cfg.trainer, load_sequences(task.sequences).train.shape
    follower = HistoryFollower(task.work)
    advance: Advance | None = None
    step = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        preemption.defer_signals(),
        ExitStack() as stack,
    ):
        workers = WorkerGroup(task, n, Path(folder))
        stack.callback(workers.kill)
        while True:
            running, started = workers.poll(), follower.has_started
            rows = follower.read()
            if advance is None and started:  # these rows are of before a resume
                step = int(rows[-1]["step"]) if rows else 0
                remaining = tokens_between(trainer, shape, step)
                advance = stack.enter_context(progress("training", remaining, "tokens"))
            for row in rows:
                if advance is not None and row["step"] > step:
                    n_tokens = tokens_between(trainer, shape, step, int(row["step"]))
                    step = int(row["step"])
                    epoch = math.ceil(step / steps_per_epoch(trainer, shape[0]))
                    advance(n_tokens, epoch=epoch, loss=row["train/loss"])
                if "epoch" in row:
                    log_epoch(row, trainer)
                yield row
            if not running:
                return
            time.sleep(_POLL_SECONDS)


class HistoryFollower:
    """Reads the rows of a training in another process, as they are appended.

    A training that starts or resumes replaces `history.jsonl`, keeping only valid rows
    (`TrainingHistory`). So nothing is read before the file is another one than at construction.

    Args:
        folder: of the training.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._replaced_inode = self._inode()
        self._offset = 0

    @property
    def has_started(self) -> bool:
        """Whether the training has started, so that the rows of the file are valid."""
        return self._inode() != self._replaced_inode

    def read(self) -> list[MetricsRow]:
        """Return the rows that are new since the last call, with their validation metrics."""
        if not self.has_started:
            return []
        with (self._folder / history.HISTORY_FILE).open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        lines = text[: text.rfind(b"\n") + 1]
        self._offset += len(lines)
        rows = history.parse_rows(lines.decode("utf-8"))
        # an epoch's validation is written before its row
        validations = history.read_validations(self._folder / history.VALIDATION_FILE)
        return list(history.merge(rows, validations))

    def _inode(self) -> int | None:
        with suppress(FileNotFoundError):
            return (self._folder / history.HISTORY_FILE).stat().st_ino
        return None


class WorkerGroup:
    """The processes of a distributed training; constructing this starts them.

    Args:
        task: what they run.
        n: number of processes.
        folder: temporary folder for their task and logs.
    """

    def __init__(self, task: TrainingTask, n: int, folder: Path) -> None:
        job = folder / "job.json"
        write_json(job, {"task": task.to_json(), "parent_pid": os.getpid()})
        self._n = n
        self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        threads = task.cfg.hardware.threads or max(1, (os.cpu_count() or 1) // n)
        environment = thread_env(threads) | {
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
            "MASTER_ADDR": _HOST,
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        envs = {r: environment | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(n)}
        command = ("-m", "hyperfitting.training", str(job))
        logs = DefaultLogsSpecs(log_dir=str(folder), redirects=Std.OUT)
        handlers = {signum: signal.getsignal(signum) for signum in _TORCH_SIGNALS}
        try:
            context = start_processes(
                "train", sys.executable, dict.fromkeys(range(n), command), envs, logs
            )
        except SignalException as error:
            raise Preempted(error.sigval) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                for signum, handler in handlers.items():
                    signal.signal(signum, handler)
        assert isinstance(context, SubprocessContext)  # noqa: S101 - the entrypoint is a command
        self._context = context
        self._forwarded = False

    def poll(self) -> bool:
        """Return whether any rank is running, and forward a received signal to rank 0.

        Raises:
            Preempted: the ranks have written a checkpoint after a signal.
            UserError: a rank has died, or raised one.
        """
        signum = preemption.requested_signal()
        if signum is not None and not self._forwarded:
            self._forwarded = True
            with suppress(ProcessLookupError):
                os.kill(self._context.pids()[0], signum)
        codes = self._exit_codes()
        if any(codes.values()):
            if self._preempted() is None:
                self._wait(_SECONDS_TO_FAIL)
            raise self._preempted() or self._failure()
        return None in codes.values()

    def kill(self) -> None:
        """Kill the ranks that are still running."""
        self._context.close(signal.SIGKILL)

    def _exit_codes(self) -> dict[int, int | None]:
        handlers = self._context.subprocess_handlers
        return {rank: handler.proc.poll() for rank, handler in handlers.items()}

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for handler in self._context.subprocess_handlers.values():
            with suppress(TimeoutExpired):
                handler.proc.wait(max(0.0, deadline - time.monotonic()))

    def _preempted(self) -> Preempted | None:
        """Return the exception to raise if rank 0 ended after a signal, with or without handler."""
        code = self._exit_codes()[0]
        for signum in preemption.SIGNALS:
            if code == 128 + signum or (self._forwarded and code == -signum):
                return Preempted(signum)
        return None

    def _failure(self) -> UserError:
        """Return the error to raise when some ranks have ended with an error."""
        pids, error_files = self._context.pids(), self._context.error_files
        codes = {rank: code for rank, code in self._exit_codes().items() if code}
        # one rank's death makes the collectives of the others fail: the first one is the cause
        first = sorted(codes, key=lambda rank: (codes[rank], _time_of(error_files[rank]), rank))
        failures = [ProcessFailure(r, pids[r], codes[r], error_files[r]) for r in first]
        for failure in failures:
            name, _, message = _error(failure).partition(": ")
            if name == UserError.__name__:
                return UserError(message)
        cause = failures[0]
        how = f"failed ({_error(cause).splitlines()[0]})"
        if cause.exitcode < 0:
            how = f"was killed ({signal.Signals(-cause.exitcode).name})"
        return UserError(
            f"rank {cause.local_rank} of {self._n} {how}: all ranks have ended",
            hint="the same command resumes from the last checkpoint; if memory ran out: a lower "
            "hardware.micro_batch_size, hardware.activation_checkpointing=true, or more "
            "hardware.num_processes",
        )


def _time_of(error_file: str) -> float:
    """Return when an error was recorded; infinite if none was."""
    path = Path(error_file)
    return path.stat().st_mtime_ns if path.exists() else math.inf


def _error(failure: ProcessFailure) -> str:
    """Return the type and message of the exception that ended a rank, as it recorded them."""
    recorded = failure.error_file_data.get("message")
    if not isinstance(recorded, dict):
        return f"exit status {failure.exitcode}"
    log.debug("rank %d: %s", failure.local_rank, recorded["extraInfo"]["py_callstack"])
    return str(recorded["message"])
