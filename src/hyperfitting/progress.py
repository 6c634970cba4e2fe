"""How a step tells that it gets on, without knowing who looks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Say that ``n`` more units are done; ``shown`` are numbers worth a look, such as the loss."""

    def __call__(self, n: int, **shown: float) -> None: ...


class Progress(Protocol):
    """Begin a task of ``total`` units (such as "tokens"); it ends with the context."""

    def __call__(self, task: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...


def _nothing(n: int, **shown: float) -> None:
    pass


@contextmanager
def silent(task: str, total: int, unit: str) -> Iterator[Advance]:
    """Show nothing."""
    yield _nothing
