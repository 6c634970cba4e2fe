"""Interleaved timing: ours, the peer, ours, the peer, …, so that both meet the same machine."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of several repeats."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle repeat."""
        return median(self.seconds)

    def __str__(self) -> str:
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median:.3g} s [{low:.3g}, {high:.3g}]"


@dataclass(frozen=True)
class Result:
    """One comparison."""

    key: str
    """Its name in bench.json."""
    ratio: float
    """What stands there: how many times faster or dearer ours is, as ``what`` says."""
    what: str
    ours: Timing
    peer: Timing
    more: dict[str, Any]
    """Anything else that was measured with it."""

    def details(self) -> dict[str, Any]:
        """Return it as JSON can say it."""
        return asdict(self)


def interleaved(
    ours: Callable[[], object], peer: Callable[[], object], repeats: int
) -> tuple[Timing, Timing]:
    """Time two ways to do one job, in turn. One unmeasured round of ours comes first."""
    ours()
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for job, seconds in zip((ours, peer), found, strict=True):
            start = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - start)
    return Timing(found[0]), Timing(found[1])


def seconds(job: Callable[[], object], repeats: int) -> Timing:
    """Time one job alone."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        found.append(time.perf_counter() - start)
    return Timing(found)
