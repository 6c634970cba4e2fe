"""What a failure looks like: one clear message on stderr, and an exit status.

Tracebacks go to the run's log file; ``HYDRA_FULL_ERROR=1`` prints them.
"""

import io
import logging
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from hyperfitting.config_errors import explain_config
from hyperfitting.errors import Resource, UserError, escape, exhausted_resource
from hyperfitting.formatting import first_line
from hyperfitting.runtime import preemption
from hyperfitting.runtime.files import folder_error
from hyperfitting.runtime.preemption import Preempted

log = logging.getLogger(__name__)
INTERRUPTED = 128 + signal.SIGINT
_CLOSED_PIPE = 128 + signal.SIGPIPE
"""The status of a process that SIGPIPE ended."""
_FULL_ERROR = "HYDRA_FULL_ERROR"
_RESUMES = "the same command resumes where it stopped"
_REMEDIES: dict[Resource, tuple[str, str, str, str]] = {
    "disk": (
        "no space left on the disk", "RLIMIT_FSIZE", "bytes a file",
        "free some, or put the artifacts elsewhere with store=DIR; finished artifacts are kept",
    ),
    "memory": (
        "out of memory", "RLIMIT_AS", "bytes",
        "a lower hardware.micro_batch_size (such as 1), hardware.generation_batch_size or "
        "hardware.evaluation_batch_size; tuning=late_stage; a smaller model",
    ),
    "threads": (
        "no more threads or processes can be started", "RLIMIT_NPROC", "of this user",
        "a lower hydra.launcher.workers; OMP_NUM_THREADS=1; a higher limit (`ulimit -u`; of a "
        "container its pids limit)",
    ),
    "files": (
        "too many files are open", "RLIMIT_NOFILE", "of this process",
        "a higher limit, such as `ulimit -n 4096`; a lower hydra.launcher.workers",
    ),
}  # fmt: skip
"""What is used up, the limit and its unit, and what to try."""


class LoggedError(BaseException):
    """A failure that is in the log file, with the message that is still to be shown.

    It is no `Exception`: Hydra would print the overrides of the failed job above the message.
    """


class ReportedError(Exception):
    """A failure whose message has been shown or recorded already."""


@contextmanager
def record_failures(on_failure: Callable[[str], None]) -> Iterator[None]:
    """Log a failure raised in this context, and record its message.

    Args:
        on_failure: called with the message for the user.

    Raises:
        ReportedError: in place of the exception.
    """
    try:
        with log_failures():
            yield
    except LoggedError as error:
        on_failure(str(error))
        raise ReportedError(str(error)) from error.__cause__


@contextmanager
def log_failures() -> Iterator[None]:
    """Log a failure raised in this context, with its traceback, in the Hydra job's log file.

    Raises:
        LoggedError: in place of the exception, with the message for the user. `exit_status` shows
            it.
    """
    try:
        yield
    except Exception as error:
        if _is_output_closed(error):
            raise
        hydra_cfg = HydraConfig.get()
        message = explain(error, Path(hydra_cfg.runtime.output_dir) / f"{hydra_cfg.job.name}.log")
        log.debug("%s", message)
        logging.getLogger("hyperfitting.traceback").info("failed", exc_info=error)
        raise LoggedError(message) from error


def exit_status(task: Callable[[], Any], resumes: bool = False) -> int:
    """Run the task of a command and return the exit status of the process: 0 only without failures.

    Every command's entry point runs through this: what it prints can be written in any encoding,
    every failure is one message, and a closed stdout pipe ends it silently.

    Args:
        task: what the command does.
        resumes: whether the same command, repeated, continues an interrupted task.
    """
    _print_in_any_encoding()
    logging.raiseExceptions = False  # a log that cannot be written is no reason for tracebacks
    try:
        status = _exit_status(task, resumes)
    except KeyboardInterrupt:  # the second one, while the first was being reported
        status = INTERRUPTED
    except Preempted as preempted:
        status = 128 + preempted.signum
    except SystemExit:  # as after --help, whose text is still in the buffer
        if status := _flush_output():
            return status
        raise
    return _flush_output() or status


def _exit_status(task: Callable[[], Any], resumes: bool) -> int:
    print_traceback = os.environ.get(_FULL_ERROR) == "1"
    advice = f"; {_RESUMES}" if resumes else ""
    try:
        with _raised_by_hydra():
            task()
    except KeyboardInterrupt:
        return _end_by_signal(f"interrupted{advice}", INTERRUPTED)
    except Preempted as preempted:
        return _end_by_signal(f"received {preempted}{advice}", 128 + preempted.signum)
    except (Exception, LoggedError) as error:
        if _is_output_closed(error):
            return _CLOSED_PIPE
        if print_traceback:
            traceback.print_exc()
        if not isinstance(error, ReportedError):
            message = str(error) if isinstance(error, LoggedError) else explain(error, None)
            print_error(f"error: {message}")
        return 1
    except SystemExit as end:
        if end.code == 1 and isinstance(end.__context__, BrokenPipeError):  # by rich
            return _CLOSED_PIPE
        raise
    return 0


@contextmanager
def _raised_by_hydra() -> Iterator[None]:
    """Have Hydra raise its errors instead of printing them."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = before


def _end_by_signal(message: str, status: int) -> int:
    """Print a message, once: from now on a signal ends the process without one."""
    preemption.exit_at_signal(status)
    print_error(message)
    return status


def _print_in_any_encoding() -> None:
    """Write what an encoding lacks as escapes, such as under LC_ALL=C; discard closed outputs."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as with `>&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - stays open
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_output_closed(error: BaseException) -> bool:
    """Return whether the reader of an output has gone, as in ``hyperfit | head``."""
    if not isinstance(error, BrokenPipeError):
        return False  # (and a BrokenPipeError may be of a pipe to another process)
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # not a file, or closed
            poll.register(stream.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _flush_output() -> int:
    """Flush what was printed; return a status other than 0 if that cannot be written."""
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # what is left in the buffer would fail again when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if isinstance(error, BrokenPipeError):
                status = _CLOSED_PIPE
            else:
                print_error(f"error: the output cannot be written: {error.strerror}")
                status = 1
    return status


def print_error(message: str) -> None:
    """Print a message for the user on the standard error."""
    with suppress(OSError):
        print(f"\n{message}", file=sys.stderr, flush=True)


def explain(error: BaseException, log_file: Path | None) -> str:
    """Return the message for the user: what happened, and what to try.

    Args:
        error: any exception.
        log_file: the log that holds its traceback, if there is one.
    """
    if used_up := exhausted_resource(error):
        return _explain_resource(used_up, escape(first_line(error)))
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FloatingPointError):
        return (
            f"non-finite values: {first_line(error)}\n"
            "  try:   model.dtype=float32 and trainer.precision=float32; a lower optimizer.lr; "
            "tuning=none, to check the base model itself"
        )
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return explain_config(error)
    if _is_of_output_folder(error):
        folder = Path(os.fsdecode(error.filename))
        return str(folder_error(folder, error, "hydra.run.dir", "another hydra.run.dir=DIR"))
    details = f"the traceback is in {log_file}" if log_file else f"{_FULL_ERROR}=1 prints it all"
    return f"unexpected {type(error).__name__}: {escape(first_line(error))}; {details}"


def _is_of_output_folder(error: BaseException) -> TypeGuard[OSError]:
    """Return whether Hydra could not create a run's output folder, before the task began."""
    frames = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_hydras = "hydra.core.utils" in frames and not any(
        name.startswith("hyperfitting.") for name in frames[frames.index("hydra.core.utils") :]
    )
    return is_hydras and isinstance(error, OSError) and error.filename is not None


def _explain_resource(used_up: Resource, detail: str) -> str:
    """Return what is used up, the limit that the process has, and what to try."""
    problem, limit, unit, remedy = _REMEDIES[used_up]
    return f"{problem}{_limit(limit, unit)}: {detail}\n  try:   {remedy}; {_RESUMES}"


def _limit(name: str, unit: str) -> str:
    """Return the limit of a resource that is set for this process, in parentheses; "": none."""
    soft, _ = resource.getrlimit(getattr(resource, name))
    return "" if soft == resource.RLIM_INFINITY else f" (limit: {soft} {unit})"
