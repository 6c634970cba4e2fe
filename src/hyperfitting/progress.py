"""How a step reports its progress, without knowing where it is shown."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

MetricsRow = dict[str, float]
"""Metrics of one optimizer step (`step`, `train/loss`), or of one epoch (with `epoch`)."""


class Advance(Protocol):
    """Reports progress within a task."""

    def __call__(self, n: int, **shown: float) -> None:
        """Report ``n`` more units done; ``shown`` are values to display, such as the loss."""


class ProgressReporter(Protocol):
    """Displays tasks: progress bars on a terminal, status files in a sweep."""

    def __call__(self, task: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Begin a task of ``total`` units, such as "tokens"; 0: the total is unknown."""
        ...


def ignore_advance(n: int, **shown: float) -> None:
    """Report nothing: an `Advance`."""


@contextmanager
def no_op(task: str, total: int, unit: str) -> Iterator[Advance]:
    """Report nothing."""
    yield ignore_advance
