"""The annotation page under load: 50 annotators, 100 requests a second for a minute, on loopback.

Every judgment is flushed to disk before its request is answered; none may be lost or doubled.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tests.preference_load import annotate
from tests.preference_study import Server, make_study, shown_by_annotator

from benchmarks.timing import Result, Timing
from hyperfitting.preference.items import write_task

ANNOTATORS, RATE, SECONDS = 50, 100.0, 60.0
TARGET = 0.1
"""Seconds within which 95% of the requests shall be answered."""


def run() -> Iterator[Result]:
    """Yield the 95th percentile of the time of an answer, relative to what is wanted."""
    names = [f"annotator{number}" for number in range(ANNOTATORS)]
    task = make_study(names, n_items=int(SECONDS * RATE / ANNOTATORS / 2) + 10)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, task)
        server = Server(folder)
        server.start()
        load = annotate(server.links, RATE, SECONDS)
        server.end(signal.SIGINT)
        assert shown_by_annotator(folder, task) == load.judged
    assert load.errors == []
    p50, p95, p99 = (float(np.percentile(load.seconds, p)) for p in (50, 95, 99))
    yield Result(
        "annotation_p95",
        p95 / TARGET,
        f"seconds within which 95% of {RATE:g} requests a second are answered, over {TARGET} s",
        Timing([p50, p95, p99]),
        Timing([TARGET]),
        {
            "requests": len(load.seconds),
            "judgments": sum(map(len, load.judged.values())),
            "p50, seconds": p50,
            "p99, seconds": p99,
            "slowest, seconds": max(load.seconds),
            "load average": os.getloadavg()[0],
        },
    )
