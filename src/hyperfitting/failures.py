"""What a failure looks like: one clear message on stderr, and an exit status.

Tracebacks go to the run's log file; ``HYDRA_FULL_ERROR=1`` prints them.
"""

import errno
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from hyperfitting.errors import UserError, is_out_of_memory, near_matches
from hyperfitting.formatting import first_line
from hyperfitting.runtime.preemption import Preempted

log = logging.getLogger(__name__)
INTERRUPTED = 128 + signal.SIGINT
_FULL_ERROR = "HYDRA_FULL_ERROR"
_RESUMES = "the same command resumes where it stopped"


class ReportedError(Exception):
    """A failure whose message has been shown or recorded already."""


@contextmanager
def report_failures() -> Iterator[None]:
    """Print and log a failure raised in this context.

    Raises:
        ReportedError: in place of the exception.
    """
    with log_failures(lambda message: print_error(f"error: {message}")):
        yield


@contextmanager
def log_failures(on_failure: Callable[[str], None]) -> Iterator[None]:
    """Log a failure raised in this context, with its traceback, in the Hydra job's log file.

    Args:
        on_failure: called with the message for the user.

    Raises:
        ReportedError: in place of the exception.
    """
    try:
        yield
    except Exception as error:
        if _is_stdout_closed(error):
            raise
        hydra_cfg = HydraConfig.get()
        message = explain(error, Path(hydra_cfg.runtime.output_dir) / f"{hydra_cfg.job.name}.log")
        log.debug("%s", message)
        logging.getLogger("hyperfitting.traceback").info("failed", exc_info=error)
        on_failure(message)
        raise ReportedError(message) from error


def exit_status(task: Callable[[], Any]) -> int:
    """Run the Hydra task and return the exit status of the process: 0 only without failures."""
    print_traceback = os.environ.get(_FULL_ERROR) == "1"
    os.environ[_FULL_ERROR] = "1"  # Hydra raises its errors instead of printing them
    try:
        task()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print_error(f"interrupted; {_RESUMES}")
        return INTERRUPTED
    except Preempted as preempted:
        print_error(f"received {preempted}; {_RESUMES}")
        return 128 + preempted.signum
    except Exception as error:
        if _is_stdout_closed(error):
            return _end_quietly()
        if print_traceback:
            traceback.print_exc()
        if not isinstance(error, ReportedError):
            print_error("error: " + explain(error, None))
        return 1
    return 0


def _is_stdout_closed(error: Exception) -> bool:
    """Return whether the reader of the standard output has gone, as in ``hyperfit | head``."""
    if not isinstance(error, BrokenPipeError):
        return False  # (and a BrokenPipeError may be of a pipe to another process)
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _end_quietly() -> int:
    """Discard the output that nobody reads; return the status of a process that SIGPIPE ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def print_error(message: str) -> None:
    """Print a message for the user on the standard error."""
    print(f"\n{message}", file=sys.stderr, flush=True)


def explain(error: BaseException, log_file: Path | None) -> str:
    """Return the message for the user: what happened, and what to try.

    Args:
        error: any exception.
        log_file: the log that holds its traceback, if there is one.
    """
    if isinstance(error, UserError):
        return str(error)
    if _is_no_space(error):
        return (
            f"no space left on the disk: {first_line(error)}\n"
            "  try:   free some, or put the artifacts elsewhere with store=DIR; "
            f"finished artifacts are kept, and {_RESUMES}"
        )
    if is_out_of_memory(error):
        return (
            f"out of memory: {first_line(error)}\n"
            "  try:   a lower hardware.micro_batch_size (such as 1), "
            "hardware.generation_batch_size or hardware.evaluation_batch_size; "
            f"tuning=late_stage; a smaller model; {_RESUMES}"
        )
    if isinstance(error, FloatingPointError):
        return (
            f"non-finite values: {first_line(error)}\n"
            "  try:   model.dtype=float32 and trainer.precision=float32; a lower optimizer.lr; "
            "tuning=none, to check the base model itself"
        )
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _explain_config(error)
    details = f"the traceback is in {log_file}" if log_file else f"{_FULL_ERROR}=1 prints it all"
    return f"unexpected {type(error).__name__}: {first_line(error)}; {details}"


def _explain_config(error: BaseException) -> str:
    """Return Hydra's message, with near matches for an option or field that does not exist."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {error.message.splitlines()[0]}, so it is not an override"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return str(
            UserError(
                "no such option",
                field=group,
                value=option,
                valid=", ".join(error.options),
                hint=near_matches(option, error.options),
            )
        )
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        parent, name = cause.parent_node, str(cause.key)
        if parent is not None and hasattr(parent, "keys") and name not in list(parent.keys()):
            return str(
                UserError(
                    "no such field",
                    field=cause.full_key or name,
                    value="…",
                    valid=", ".join(map(str, parent.keys())),
                    hint=near_matches(name, map(str, parent.keys())),
                )
            )
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return "\n  ".join(text for text in str(error).splitlines() if text.strip())


def _is_no_space(error: BaseException | None) -> bool:
    """Return whether the disk is full, also when torch.save raised something else because of it."""
    if error is None:
        return False
    return (
        (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in str(error)
        or _is_no_space(error.__cause__ or error.__context__)
    )
