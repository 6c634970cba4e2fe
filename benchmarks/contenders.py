"""Implementations to compare, each in a process of its own, so that none shares another's caches.

They take turns at rounds of work, so that each meets the same state of the machine.
"""

import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Round = Callable[[], dict[str, Any]]
"""Does one round of work, and returns what it measured."""


@dataclass
class Contender:
    """A process that runs rounds on request."""

    connection: Connection

    def round(self) -> dict[str, Any]:
        """Run a round, and return what it measured."""
        self.connection.send("go")
        return self.receive()

    def receive(self) -> dict[str, Any]:
        """Return the next result.

        Raises:
            RuntimeError: it has failed; its traceback is on the terminal.
        """
        try:
            result: dict[str, Any] = self.connection.recv()
        except EOFError:
            raise RuntimeError("a contender failed") from None
        return result


def peak_memory() -> int:
    """Return the peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(connection: Connection, start: Callable[..., Round], arguments: tuple[Any, ...]) -> None:
    run_round = start(*arguments)
    connection.send({})
    while connection.recv() == "go":
        connection.send({**run_round(), "peak_memory": peak_memory()})


@contextmanager
def contending(*starts: tuple[Callable[..., Round], tuple[Any, ...]]) -> Iterator[list[Contender]]:
    """Start one process after another, each given as a function and its arguments."""
    context = multiprocessing.get_context("spawn")
    processes, contenders = [], []
    try:
        for start, arguments in starts:
            connection, child_connection = context.Pipe()
            process = context.Process(
                target=_serve, args=(child_connection, start, arguments), daemon=True
            )
            process.start()
            processes.append(process)
            child_connection.close()
            contenders.append(Contender(connection))
            contenders[-1].receive()
        yield contenders
        for contender in contenders:
            contender.connection.send("stop")
    finally:
        for process in processes:
            process.join(10)
            process.terminate()


def in_turn(contenders: list[Contender], rounds: int) -> list[list[dict[str, Any]]]:
    """Return what each measured in each round, after one warm-up round."""
    for contender in contenders:
        contender.round()
    results: list[list[dict[str, Any]]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, measured in zip(contenders, results, strict=True):
            measured.append(contender.round())
    return results
