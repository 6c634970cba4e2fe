"""Interleaved timing: ours, the peer, ours, the peer, …, so that load affects both alike."""

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
    """How many times faster, or more expensive, ours is than the peer: ``what`` says which."""
    what: str
    ours: Timing
    peer: Timing
    more: dict[str, Any]
    """Anything else that was measured with it."""

    def details(self) -> dict[str, Any]:
        """Return it as JSON-serializable values."""
        return asdict(self)


def interleaved(
    ours: Callable[[], object], peer: Callable[[], object], repeats: int
) -> tuple[Timing, Timing]:
    """Time two ways to do one job, in turn. One unmeasured round of ours comes first."""
    ours()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for job, seconds in zip((ours, peer), times, strict=True):
            start = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - start)
    return Timing(times[0]), Timing(times[1])


def seconds(job: Callable[[], object], repeats: int) -> Timing:
    """Time one job alone."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return Timing(times)
