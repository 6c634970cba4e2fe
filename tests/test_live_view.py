"""The live view of a sweep: counts and the remaining time."""

import time
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from hyperfitting.sweep.live_view import _LiveView, live_view
from hyperfitting.sweep.runs import SweepRun
from hyperfitting.sweep.state import RunFolder, Status

CONSOLE = Console(width=120, force_terminal=True, color_system=None)


def rendered(view: _LiveView) -> str:
    with CONSOLE.capture() as shown:
        CONSOLE.print(view.render())
    return shown.get().splitlines()[0]


def test_the_remaining_time_is_divided_between_the_workers(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    def headline(workers: int) -> str:
        view = _LiveView(CONSOLE, tmp_path, ["a", "b", "c"], 0, 0, workers)
        RunFolder(tmp_path / "a").write_status(Status("running", started=time.time() - 300.4))
        view.planned_seconds = dict.fromkeys(("a", "b", "c"), 600.0)
        return rendered(view)

    # of one ten minutes are left, less the five it has run, and of two all ten
    assert "about 25 min 00 s left" in headline(1)
    assert "about 12 min 30 s left" in headline(2)
    assert "about 10 min 00 s left" in headline(9)  # not before the longest has ended


def test_a_failed_run_that_is_not_repeated_counts_as_failed(tmp_path: Path) -> None:
    runs = [SweepRun(f"seed={seed}", {}, ()) for seed in range(4)]
    configs: Any = {run.name: None for run in runs}  # there is no estimate of the time
    terminal = StringIO()
    console = Console(width=120, file=terminal, force_terminal=True)
    with live_view(console, tmp_path, configs, runs[2:], n_finished=1, workers=1):
        deadline = time.monotonic() + 60
        while "elapsed" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "1 of 4 finished, 1 failed, " in terminal.getvalue()
