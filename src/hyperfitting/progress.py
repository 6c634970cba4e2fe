"""How a step tells that it gets on, without knowing who looks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Row = dict[str, float]
"""Numbers of one update, or of one epoch, of a training; see `history.json`."""


class Advance(Protocol):
    """What a task is told as it gets on."""

    def __call__(self, n: int, **shown: float) -> None:
        """Say that ``n`` more units are done; ``shown`` are numbers worth a look, as the loss."""


class Progress(Protocol):
    """Where tasks are shown."""

    def __call__(self, task: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Begin a task of ``total`` units, such as "tokens"; 0: nobody knows how many."""
        ...


def _nothing(n: int, **shown: float) -> None:
    pass


@contextmanager
def silent(task: str, total: int, unit: str) -> Iterator[Advance]:
    """Show nothing."""
    yield _nothing
