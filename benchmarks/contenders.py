"""Contenders: each in a process of its own, so that none owes its speed or memory to another.

They take turns at rounds of work, and meet the same machine.
"""

import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Round = Callable[[], dict[str, Any]]
"""Does a piece of work, and says what was measured."""


@dataclass
class Contender:
    """A process that does rounds when it is told to."""

    connection: Connection

    def round(self) -> dict[str, Any]:
        """Have it do a round; return what it measured."""
        self.connection.send("go")
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return what it says next.

        Raises:
            RuntimeError: it failed; its traceback is on the terminal.
        """
        try:
            found: dict[str, Any] = self.connection.recv()
        except EOFError:
            raise RuntimeError("a contender failed") from None
        return found


def peak_memory() -> int:
    """Return the most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(connection: Connection, start: Callable[..., Round], arguments: tuple[Any, ...]) -> None:
    work = start(*arguments)
    connection.send({})
    while connection.recv() == "go":
        connection.send({**work(), "peak_memory": peak_memory()})


@contextmanager
def contending(*starts: tuple[Callable[..., Round], tuple[Any, ...]]) -> Iterator[list[Contender]]:
    """Start contenders, one after another: each a function and its arguments."""
    context = multiprocessing.get_context("spawn")
    processes, contenders = [], []
    try:
        for start, arguments in starts:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, start, arguments), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            contenders.append(Contender(ours))
            contenders[-1].answer()
        yield contenders
        for contender in contenders:
            contender.connection.send("stop")
    finally:
        for process in processes:
            process.join(10)
            process.terminate()


def in_turn(contenders: list[Contender], rounds: int) -> list[list[dict[str, Any]]]:
    """Return what each contender measured in each round; a round of warming up comes first."""
    for contender in contenders:
        contender.round()
    found: list[list[dict[str, Any]]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, measured in zip(contenders, found, strict=True):
            measured.append(contender.round())
    return found
