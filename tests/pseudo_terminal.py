"""A command on a terminal of 80 columns: what it shows, keys that are pressed, how it ends."""

import os
import pty
import re
import select
import signal
import termios
import time
from collections.abc import Callable, Sequence
from typing import Self

ROWS, COLUMNS = 24, 80
CTRL_C = b"\x03"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_CONTROLS = re.compile(r"(\x1b\[[?;\d]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)")


class Terminal:
    """A command on a terminal of its own; killed at the end of the context if it still runs."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self.output = ""
        self._status: int | None = None
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            try:
                os.execve(command[0], command, env | {"TERM": "xterm-256color"})  # noqa: S606
            finally:
                os._exit(127)
        termios.tcsetwinsize(self._fd, (ROWS, COLUMNS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)

    def press(self, key: bytes) -> None:
        """Press a key."""
        os.write(self._fd, key)

    def read_until(self, condition: Callable[[str], object], timeout: float = 300) -> None:
        """Read the output until a condition of all of it holds."""
        deadline = time.monotonic() + timeout
        while not condition(self.output):
            assert self._read(deadline - time.monotonic()), self.output

    def end(self, timeout: float = 60) -> int:
        """Read the output to its end; return the exit status."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status

    def _read(self, timeout: float) -> bool:
        """Read what has been written since; return whether there can be more."""
        ready, _, _ = select.select([self._fd], [], [], max(0.0, timeout))
        assert ready, self.output
        try:
            self.output += os.read(self._fd, 65536).decode("utf-8", "replace")
        except OSError:  # nothing has the terminal open any more
            return False
        return True


def shown(output: str) -> list[str]:
    """Return the lines that a terminal shows after this output, with those scrolled away."""
    lines, row, column = [""], 0, 0
    for control, text in _CONTROLS.findall(output):
        for character in text:
            if column == COLUMNS:
                row, column = row + 1, 0
                lines += [""] * (row == len(lines))
            line = lines[row].ljust(column)
            lines[row] = line[:column] + character + line[column + 1 :]
            column += 1
        if control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif control.endswith("A"):  # up
            row -= int(control[2:-1])
        elif control == "\x1b[2K":  # erase the line
            lines[row] = ""
        elif control:
            assert control.endswith("m") or control in (HIDE_CURSOR, SHOW_CURSOR), control
    return lines
