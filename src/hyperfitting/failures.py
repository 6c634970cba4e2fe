"""What happens when something goes wrong: one clear message, and an exit status that says so.

Tracebacks go to the run's log, not to the user.
"""

import errno
import logging
import os
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
from hyperfitting.preemption import Preempted

log = logging.getLogger(__name__)
INTERRUPTED = 130
_FULL_ERROR = "HYDRA_FULL_ERROR"


class Told(Exception):
    """A failure that the user has been told of."""


@contextmanager
def reported() -> Iterator[None]:
    """Run one config in this context: a failure is told at once."""
    with noted(lambda message: tell(f"error: {message}")):
        yield


@contextmanager
def noted(note: Callable[[str], None]) -> Iterator[None]:
    """Run in this context: a failure is logged, and `note` is told what to tell the user.

    Raises:
        Told: instead of what was raised.
    """
    try:
        yield
    except Exception as error:
        hydra_cfg = HydraConfig.get()
        message = explain(error, Path(hydra_cfg.runtime.output_dir) / f"{hydra_cfg.job.name}.log")
        log.debug("%s", message)
        logging.getLogger("hyperfitting.traceback").info("failed", exc_info=error)
        note(message)
        raise Told(message) from error


def exit_status(task: Callable[[], Any]) -> int:
    """Run the Hydra task and return the exit status of the process: 0 only if all went well."""
    wanted_full = os.environ.get(_FULL_ERROR) == "1"
    os.environ[_FULL_ERROR] = "1"  # Hydra is to raise its errors here rather than print them
    try:
        task()
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on where it stopped")
        return INTERRUPTED
    except Preempted as told:
        tell(f"told to end ({told}); the same command goes on where it stopped")
        return 128 + told.signum
    except Exception as error:
        if wanted_full:
            traceback.print_exc()
        if not isinstance(error, Told):
            tell("error: " + explain(error, None))
        return 1
    return 0


def tell(message: str) -> None:
    """Tell the user, beside the output."""
    print(f"\n{message}", file=sys.stderr, flush=True)


def explain(error: BaseException, log_file: Path | None) -> str:
    """Return what to tell a user about an exception."""
    if isinstance(error, UserError):
        return str(error)
    if _is_no_space(error):
        return (
            f"no space left on the disk: {_first_line(error)}\n"
            "  try:   free some, or put the artefacts elsewhere with store=DIR; "
            "all that was finished is kept, and the same command goes on"
        )
    if is_out_of_memory(error):
        return (
            f"out of memory: {_first_line(error)}\n"
            "  try:   a lower hardware.micro_batch_size (such as 1), "
            "hardware.generation_batch_size or hardware.evaluation_batch_size; "
            "tuning=late_stage; a smaller model; the same command goes on"
        )
    if isinstance(error, FloatingPointError):
        return (
            f"the model's numbers went wrong: {_first_line(error)}\n"
            "  try:   model.dtype=float32 and trainer.precision=float32; a lower optimizer.lr; "
            "and that the model itself is sound, with tuning=none"
        )
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _explain_config(error)
    where = f"; the traceback is in {log_file}" if log_file else f"; {_FULL_ERROR}=1 shows more"
    return f"unexpected {type(error).__name__}: {_first_line(error)}{where}"


def _explain_config(error: BaseException) -> str:
    """Return Hydra's message, with near matches for an option or field that does not exist."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {error.message.splitlines()[0]}, so it is no override"
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
    lines = [line for line in str(error).splitlines() if line.strip()]
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
    return "\n  ".join(lines)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_no_space(error: BaseException | None) -> bool:
    """Return whether the disk is full, also behind what torch.save makes of that."""
    if error is None:
        return False
    return (
        (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in str(error)
        or _is_no_space(error.__cause__ or error.__context__)
    )
