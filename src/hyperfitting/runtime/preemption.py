"""Preemption: on SIGTERM, SIGUSR1 or SIGUSR2 training writes a checkpoint and the process exits.

Training finishes the optimizer step that it is in; anything else is interrupted at once. A second
signal interrupts at once too, if it is a second request: one that is sent to the process group
reaches a child from its parent as well. The same command resumes.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
Handlers = dict[int, Any]
_REQUEST_SECONDS = 5.0
"""Signals within this time of one that was handled are the same request."""


class Preempted(BaseException):
    """A preemption signal was received. (Not an Exception: `except Exception` lets it pass.)"""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


_deferred = False
_requested: int | None = None
_handled_at = -math.inf


def install_handlers() -> Handlers:
    """Install the handlers of `SIGNALS`, and return those that they replace.

    Outside the main thread nothing is installed, and the result is empty.
    """
    global _requested, _handled_at
    if threading.current_thread() is not threading.main_thread():
        return {}
    _requested, _handled_at = None, -math.inf
    return {signum: signal.signal(signum, _handle) for signum in SIGNALS}


def forward_signal(replaced: Handlers) -> None:
    """Call the SIGUSR2 handler that `install_handlers` replaced, such as a launcher's requeue.

    While it requeues the job, SLURM sends SIGTERM to it; that signal is ignored.
    """
    handler = replaced.get(signal.SIGUSR2)
    if callable(handler) and handler is not _handle:
        ignore_signals()
        handler(signal.SIGUSR2, None)


def ignore_signals() -> None:
    """Ignore `SIGNALS` and SIGINT in this process: another process handles them."""
    for signum in (*SIGNALS, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


def exit_at_signal(status: int) -> None:
    """From now on let any of `SIGNALS` and SIGINT end this process at once, with this status."""
    if threading.current_thread() is threading.main_thread():
        for signum in (*SIGNALS, signal.SIGINT):
            signal.signal(signum, lambda *_: os._exit(status))


def _handle(signum: int, _: FrameType | None) -> None:
    global _requested, _handled_at  # noqa: PLW0603 - state of the signal handler
    now = time.monotonic()
    if now - _handled_at < _REQUEST_SECONDS:
        return
    _handled_at = now
    if _deferred and _requested is None:
        _requested = signum
        return
    raise Preempted(signum)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Inside this context the first signal only sets `requested_signal`."""
    global _deferred  # noqa: PLW0603 - state of the signal handler
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def requested_signal() -> int | None:
    """Return the signal that was deferred, or None."""
    return _requested


def raise_if_requested() -> None:
    """End this process now if a signal was deferred.

    Raises:
        Preempted: a signal was deferred.
    """
    if _requested is not None:
        raise Preempted(_requested)
