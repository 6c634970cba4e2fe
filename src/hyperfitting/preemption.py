"""To be told to end, and end well: a cluster wants the machine back, and says so by a signal.

On SIGTERM, SIGUSR1 or SIGUSR2 a training ends after the update that it is at, with a checkpoint;
what is not training ends at once. A second signal does not wait. The same command goes on.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
Handlers = dict[int, Any]


class Preempted(BaseException):
    """This process has been told to end. (No error: `except Exception` lets it pass.)"""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


_waits = False
_asked: int | None = None


def listen() -> Handlers:
    """Have signals end this process as said above; return what was to be done before."""
    global _asked  # noqa: PLW0603 - a process may run one member after the other
    if threading.current_thread() is not threading.main_thread():
        return {}
    _asked = None
    return {signum: signal.signal(signum, _told) for signum in SIGNALS}


def hand_over(before: Handlers) -> None:
    """Do what was to be done, before `listen`, when the machine is wanted back.

    (A launcher that begins jobs again has asked for SIGUSR2, and does it there. SLURM then sends
    SIGTERM to what it is to begin again: that comes in the middle of it, and is no news.)
    """
    handler = before.get(signal.SIGUSR2)
    if callable(handler) and handler is not _told:
        ignore()
        handler(signal.SIGUSR2, None)


def ignore() -> None:
    """Leave signals to the process that leads this one."""
    for signum in (*SIGNALS, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


def _told(signum: int, _: FrameType | None) -> None:
    global _asked  # noqa: PLW0603 - as the signal handler is
    if _waits and _asked is None:
        _asked = signum
        return
    raise Preempted(signum)


@contextmanager
def waits() -> Iterator[None]:
    """In this context a signal is kept until `asked` finds it."""
    global _waits  # noqa: PLW0603
    _waits = True
    try:
        yield
    finally:
        _waits = False


def asked() -> int | None:
    """Return the signal by which this process was told to end, if it was."""
    return _asked


def end_if_asked() -> None:
    """End now, if a signal has come that nobody has found.

    Raises:
        Preempted: one has.
    """
    if _asked is not None:
        raise Preempted(_asked)
