"""To be told to end, and end well: a cluster wants the machine back, and says so by a signal.

On SIGTERM or SIGUSR1 a training ends after the update that it is at, with a checkpoint; what is
not trained ends at once. A second signal does not wait. The same command goes on.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """This process has been told to end. (No error: `except Exception` lets it pass.)"""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


_waits = False
_asked: int | None = None


def listen() -> None:
    """From now on, signals end this process as said above."""
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, _told)


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
